"""Proof that a converted model is its source: tensors by their hashes, outputs by an independent computation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from c3_hf.conversion.plan import HEAD
from c3_hf.conversion.released import ReleasedCheckpoint
from c3_hf.conversion.weights import Digest, list_tensors, load_tensor, scan_weights
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration
from c3_hf.modeling.prompt_c3 import TokenReader


# Texts written for this purpose: two scripts, code, digits, one token, nothing.
SAMPLE_TEXTS = (
    "The lighthouse keeper wrote down the weather twice a day, once at dawn and once when the lamp was lit.",
    "春天的早晨，老人坐在门前的石凳上，慢慢地喝完了一碗热茶。",
    "def area(width, height):\n    return width * height  # 3.50 * 12 = 42\n",
    "Yes",
    "",
)
SAMPLE_PROMPT = "Repeat the text: "
# Largest difference of a logit, as a share of the largest logit, that rounding explains. The two computations do the
# same operations in a slightly different order; measured on the golden checkpoints they agree exactly in float32.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Sample:
    """One context and one prompt as token ids; the prompt holds the full block of placeholders."""

    context_ids: list[int]
    prompt_ids: list[int]


def verify_tensors(folder: Path, digests: dict[str, Digest]) -> int:
    """Read the written shards again and compare every tensor with its source.

    Args:
        digests: target name to digest, from the reading of the source.

    Returns:
        The number of tensors, all equal.

    Raises:
        ValueError: if a tensor is missing, surplus or different; all are named.
    """
    written = scan_weights({tensor.name: tensor for tensor in list_tensors(folder)})
    wrong = [
        name
        for name in sorted(written.keys() | digests.keys())
        if name not in written or name not in digests or written[name].stored != digests[name].written
    ]
    if wrong:
        raise ValueError(
            f"verification failed: {len(wrong)} tensors on disk are not those of the source: {', '.join(wrong[:10])}. "
            "Check the disk and convert again."
        )
    return len(written)


def make_samples(config: C3Config, tokenizer: PreTrainedTokenizerFast | None) -> list[Sample]:
    """Token ids to compare the two computations on; without a tokenizer, ids drawn from both vocabularies."""
    block = [
        config.context_start_token_id,
        *[config.context_token_id] * config.num_latents,
        config.context_end_token_id,
    ]
    if tokenizer is not None:
        prompt_ids = tokenizer(SAMPLE_PROMPT, add_special_tokens=False)["input_ids"]
        contexts = TokenReader(tokenizer).read_plain(list(SAMPLE_TEXTS))
        return [Sample(ids, block + prompt_ids) for ids, _ in contexts]
    size = min(config.context_start_token_id, config.context_end_token_id, config.context_token_id)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(0, size, (length,), generator=generator).tolist() for length in (64, 33, 17, 1, 0)]
    return [Sample(draw, draw[:3] + block + draw[3:9]) for draw in draws]


def verify_forward(
    folder: Path, checkpoint: ReleasedCheckpoint, config: C3Config, samples: list[Sample], dtype: torch.dtype
) -> dict:
    """Compare the converted model's logits with those of an independent computation on the source weights.

    Args:
        dtype: type to compute in. One half of the source is in memory at a time, then the converted model.

    Returns:
        The figures for the receipt: samples, largest difference, largest logit, share of equal most likely tokens.

    Raises:
        ValueError: if the largest difference is more than rounding explains, or an output is not finite.
    """
    expected = reference_logits(checkpoint, samples, dtype)
    model = C3ForConditionalGeneration.from_pretrained(folder, config=config, dtype=dtype).eval()
    differences, largest, same, total = [], 0.0, 0, 0
    for sample, reference in tqdm(list(zip(samples, expected)), desc="converted model", disable=None):
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([sample.prompt_ids]),
                context_input_ids=torch.tensor([sample.context_ids], dtype=torch.long),
            )
        logits = output.logits[0].double()
        differences.append(float((logits - reference).abs().max()))
        largest = max(largest, float(reference.abs().max()))
        same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        total += len(logits)
    limit = TOLERANCES[dtype] * largest
    if not max(differences) <= limit:
        raise ValueError(
            f"verification failed: logits differ by up to {max(differences):.3g} from an independent computation on "
            f"the source weights, expected at most {limit:.3g} in {dtype}. Please report it with the source's name."
        )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "samples": [{"context_tokens": len(s.context_ids), "prompt_tokens": len(s.prompt_ids)} for s in samples],
        "max_difference": max(differences),
        "max_logit": largest,
        "argmax_agreement": same / total,
    }


def reference_logits(checkpoint: ReleasedCheckpoint, samples: list[Sample], dtype: torch.dtype) -> list[torch.Tensor]:
    """What the original computes, from stock Qwen2 models and the source's own files and configurations.

    Returns:
        For each sample, logits of shape `(prompt_length, vocab_size)` in float64, as computed in `dtype`.
    """
    main = {tensor.name: tensor for tensor in checkpoint.main_tensors}
    encoder = _stock_half(checkpoint.encoder_config, checkpoint.encoder_weights(), dtype)
    queries = load_tensor(main["model.Q.weight"]).to(dtype)
    weight = load_tensor(main["model.mm_projector.weight"]).to(dtype)
    bias = load_tensor(main["model.mm_projector.bias"]).to(dtype)
    start, num_latents = checkpoint.main_config["im_start_token"], checkpoint.main_config["latent_token_len"]
    latents = []
    for sample in tqdm(samples, desc="source encoder", disable=None):
        with torch.inference_mode():
            text = encoder.embed_tokens(torch.tensor([*sample.context_ids, start]))
            embeds = torch.cat([text, queries]).unsqueeze(0)
            states = encoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -num_latents:]
            latents.append(nn.functional.linear(states, weight, bias))
    del encoder
    decoder = _stock_half(checkpoint.main_config, checkpoint.decoder_weights(), dtype)
    tied = HEAD not in main or checkpoint.main_config.get("tie_word_embeddings", False)
    head = decoder.embed_tokens.weight if tied else load_tensor(main[HEAD]).to(dtype)
    logits = []
    for sample, block in tqdm(list(zip(samples, latents)), desc="source decoder", disable=None):
        with torch.inference_mode():
            ids = torch.tensor(sample.prompt_ids)
            embeds = decoder.embed_tokens(ids)
            first = sample.prompt_ids.index(start) + 1
            embeds = torch.cat([embeds[:first], block, embeds[first + num_latents :]]).unsqueeze(0)
            states = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
            logits.append(nn.functional.linear(states, head).double())
    return logits


def _stock_half(fields: dict, weights: dict, dtype: torch.dtype) -> Qwen2Model:
    """A stock Qwen2 body with the source's weights, sliding windows off."""
    skipped = ("auto_map", "architectures", "model_type", "layer_types", "use_sliding_window")
    half_config = Qwen2Config(**{k: v for k, v in fields.items() if k not in skipped}, use_sliding_window=False)
    with torch.device("meta"):
        half = Qwen2Model(half_config)
    state = {
        name.removeprefix("model."): load_tensor(tensor).to(dtype)
        for name, tensor in weights.items()
        if name.startswith("model.")
    }
    half.load_state_dict(state, assign=True)
    half.rotary_emb = type(half.rotary_emb)(half_config)
    return half.eval()
