"""The models that are measured, and how much of what is measured on each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin

from c3_hf import C3Config, C3ForConditionalGeneration, tiny_model_path
from c3_hf.evaluation.provenance import weights_fingerprint
from c3_hf.latents.decoding import generate_in_stretches


SEED = 0
# Options of generate() for greedy decoding to the last token that is allowed: no vocabulary has an id like this.
ENDLESS: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": [1 << 30], "pad_token_id": 0}
# Context tokens in a batch from which on a CPU times one round and no warm-up: it is minutes long.
ONE_ROUND = 1 << 15
# Tokens of the original's restoring prompt around its block of placeholders.
PROMPT_LENGTH_BEFORE, PROMPT_LENGTH_AFTER = 21, 9


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        batches: context length in tokens to the batch sizes it is measured at.
        new_tokens: tokens generated for each text.
        segment_length: tokens compressed into one block of latents where a long text is.
        text_lengths: lengths in tokens for the comparison with the full text.
        scaling_lengths: lengths in tokens for the slope of compressing.
        repeats: timed rounds.
        warmup: rounds before them.
        restore_lengths: shortest and longest of the 64 segments that are restored together.
        whole_batches: batch sizes at which replies as long as the shortest context are measured, too.
    """

    batches: dict[int, tuple[int, ...]]
    new_tokens: int
    segment_length: int
    text_lengths: tuple[int, ...]
    scaling_lengths: tuple[int, ...]
    repeats: int = 5
    warmup: int = 1
    restore_lengths: tuple[int, int] = (16, 128)
    whole_batches: tuple[int, ...] = ()


SCALES = {
    "toy": Scale(
        {16: (1, 2), 32: (2,)}, 4, 16, (64, 128), (64, 256), repeats=2, restore_lengths=(2, 4), whole_batches=(2,)
    ),
    # A block holds 640 tokens; the decoder has 8,192 positions.
    "tiny": Scale(
        {256: (1, 8, 64), 640: (1, 16)},
        128,
        640,
        (640, 1920, 6400),
        (10_000, 30_000, 100_000),
        repeats=3,
        restore_lengths=(32, 256),
        whole_batches=(64,),
    ),
    "medium": Scale(
        {256: (1, 8, 16, 64), 1024: (1, 8, 64), 4096: (1, 8, 64)},
        64,
        640,
        (1280, 2560),
        (10_240,),
        repeats=3,
        whole_batches=(16, 64),
    ),
    # Small enough for a CPU to read 65,536 tokens, once.
    "small": Scale({256: (1, 64), 1024: (64,)}, 64, 640, (1024, 4096, 16384, 65536), (10_240,), repeats=1, warmup=0),
    "released": Scale(
        dict.fromkeys((256, 1024, 4096), (1, 8, 64)),
        128,
        640,
        (1024, 4096, 16384, 65536),
        (10_000, 100_000, 1_000_000),
        warmup=2,
    ),
}


def _half(vocab_size: int, hidden_size: int, intermediate_size: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _pair(vocab_size: int, encoder: tuple[int, ...], decoder: tuple[int, ...], num_latents: int) -> C3Config:
    """Two halves over one vocabulary whose last ids are the special tokens."""
    names = ("context_start_token_id", "context_end_token_id", "context_token_id")
    return C3Config(
        text_config=_half(vocab_size, *decoder),
        encoder_config=_half(vocab_size, *encoder),
        num_latents=num_latents,
        inline_context_start_token_id=None,
        inline_context_end_token_id=None,
        **{name: vocab_size - 3 + place for place, name in enumerate(names)},
    )


def make_config(shape: str) -> C3Config:
    """Configuration of a random-weight shape: `toy`, `small` (2 M + 4 M), `medium` (100 M + 200 M) or `released`.

    The vocabularies of `small` and `medium` are smaller than the released one, so that head and tables have about the
    same share of the work as there.
    """
    if shape == "toy":
        return _pair(512, (32, 64, 2, 4), (48, 96, 2, 4), 4)
    if shape == "small":
        return _pair(4096, (192, 512, 4, 4), (256, 768, 4, 4), 32)
    if shape == "medium":
        return _pair(32768, (768, 2048, 14, 12), (1024, 3072, 14, 16), 32)
    if shape == "released":
        return C3Config(inline_context_start_token_id=None, inline_context_end_token_id=None)
    raise ValueError(f"`shape` must be toy, tiny, small, medium or released, got {shape!r}.")


def load(
    shape: str, device: torch.device, dtype: torch.dtype
) -> tuple[C3ForConditionalGeneration, ProcessorMixin | None]:
    """The bundled model with its processor, or random weights of a shape, made on the device."""
    if shape == "tiny":
        path = tiny_model_path()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        return model.eval(), AutoProcessor.from_pretrained(path)
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = C3ForConditionalGeneration(make_config(shape))
    finally:
        torch.set_default_dtype(default)
    return model.eval(), None


def describe(shape: str, model: PreTrainedModel) -> dict[str, Any]:
    """What a record says about the model."""
    return {
        "name": shape,
        "weights": weights_fingerprint(model) if shape == "tiny" else "random",
        "encoder_parameters": sum(parameter.numel() for parameter in model.model.encoder.parameters()),
        "decoder_parameters": sum(parameter.numel() for parameter in model.model.language_model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model.config.to_diff_dict(),
    }


@dataclasses.dataclass
class Setup:
    """What a benchmark works on.

    Attributes:
        model: on its device, in evaluation mode.
        processor: only with the trained model.
        scale: how much to measure.
        rates: measured rates of the machine, see `floors.measure_rates`.
    """

    model: C3ForConditionalGeneration
    processor: ProcessorMixin | None
    scale: Scale
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def rounds(self, context_tokens: int) -> dict[str, int]:
        """`warmup` and `repeats` for so many tokens of context in one batch."""
        if self.device.type == "cpu" and context_tokens >= ONE_ROUND:
            return {"warmup": 0, "repeats": 1}
        return {"warmup": self.scale.warmup, "repeats": self.scale.repeats}

    def random_ids(self, *shape: int) -> torch.LongTensor:
        """Ids of ordinary tokens, the same at every call with the same shape."""
        generator = torch.Generator().manual_seed(SEED)
        config = self.model.config
        markers = (config.context_start_token_id, config.context_end_token_id, config.context_token_id)
        highest = min(*markers, config.encoder_config.vocab_size)
        if self.processor is not None:
            highest = min(highest, *self.processor.tokenizer.added_tokens_decoder)
        return torch.randint(highest, shape, generator=generator).to(self.device)

    def prompt_ids(self, batch_size: int, num_contexts: int = 1) -> torch.LongTensor:
        """Restoring prompts `(batch_size, prompt_length)` with a block of placeholders for each context."""
        config = self.model.config
        placeholders = [config.context_token_id] * config.num_latents
        block = [config.context_start_token_id, *placeholders, config.context_end_token_id]
        text = self.random_ids(PROMPT_LENGTH_BEFORE + PROMPT_LENGTH_AFTER)
        blocks = torch.tensor(block * num_contexts, dtype=torch.long, device=self.device)
        prompt = torch.cat([text[:PROMPT_LENGTH_BEFORE], blocks, text[PROMPT_LENGTH_BEFORE:]])
        return prompt.expand(batch_size, -1)

    def generate(self, new_tokens: int, input_ids: torch.LongTensor, **options: Any) -> torch.LongTensor:
        """Exactly `new_tokens` greedy tokens, `(batch_size, prompt_length + new_tokens)`.

        Batches are decoded in stretches on a CPU, as in `c3_hf.latents.decoding.Restorer`. On a GPU the cache is
        static: generate() then compiles the decode step by itself.
        """
        contexts = {"context_input_ids", "context_latents"} & set(options)
        if self.device.type == "cpu" and len(input_ids) > 1 and contexts:
            latents = options.get("context_latents")
            if latents is None:
                latents = self.model.get_context_features(options["context_input_ids"])
            given = {"context_latents": latents.expand(len(input_ids), -1, -1, -1)}
            new_ids = generate_in_stretches(self.model, input_ids, given, new_tokens, None, ENDLESS)
            return torch.cat([input_ids, torch.tensor(new_ids)], dim=1)
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            cache_implementation="static" if self.device.type == "cuda" else None,
            **ENDLESS,
            **options,
        )
