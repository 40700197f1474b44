"""New C3 models: from any two causal language models, or by changing one that exists.

How the new parts begin (the paper starts from pretrained halves and says nothing about the rest):

- A new token's embedding is the mean of the table's used rows plus noise of a hundredth of their deviation, so that it
  is likely in no place at first (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
- A latent query is drawn dimension by dimension from a normal with the mean and deviation of the encoder's token
  embeddings, so that the encoder reads it like a token.
- The projector's weights are drawn from a normal whose deviation makes a latent, at the start, as large as the
  decoder's token embeddings: measured on the encoder's outputs at the queries, not assumed. Its bias is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from c3_hf.conversion.chat_templates import keep_own_template
from c3_hf.conversion.configs import generation_config
from c3_hf.conversion.halves import as_plain_fast, find_body, load_half, load_tokenizer
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration
from c3_hf.modeling.processing_c3 import C3Processor
from c3_hf.modeling.prompt_c3 import (
    CONTEXT_END_TOKEN,
    CONTEXT_START_TOKEN,
    CONTEXT_TOKEN,
    INLINE_CONTEXT_END_TOKEN,
    INLINE_CONTEXT_START_TOKEN,
    STOP_TOKEN,
    TURN_TOKEN,
    TokenReader,
    install_escapes,
)


NOISE_OF_NEW_ROWS = 0.01
MARKERS = (TURN_TOKEN, STOP_TOKEN, CONTEXT_START_TOKEN, CONTEXT_END_TOKEN, CONTEXT_TOKEN)
INLINE_MARKERS = (INLINE_CONTEXT_START_TOKEN, INLINE_CONTEXT_END_TOKEN)

# Ordinary text on which two tokenizers must give the same ids to count as one: scripts, code, white space, digits,
# emoji, combining marks, rare words.
PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Antidisestablishmentarianism; floccinaucinihilipilification!",
    "def f(x):\n\treturn {'a': x ** 2}  # 0x1F\n\n\n",
    "1234567890 3.14159 1,000,000 2024-02-29T12:00:00Z",
    "  leading,   inner   and trailing   ",
    "春眠不觉晓，处处闻啼鸟。",
    "Привет, мир! Γειά σου Κόσμε. مرحبا بالعالم. こんにちは世界。안녕하세요.",
    "cafe\u0301 naïve Ærøskøbing ﬁne ½ ①",
    "😀👩‍👩‍👧‍👦 🇨🇳",
    '<p class="x">&nbsp;</p> {"k": [null, true]} \\frac{1}{2}',
    "\r\nline\r\n",
    "a\u00a0b\u2003c\u200bd",
)


@dataclass(frozen=True)
class NewModel:
    """A model ready to train, and what was decided on the way.

    Attributes:
        shared_vocabulary: whether both halves read the same tokenizer.
    """

    model: C3ForConditionalGeneration
    processor: C3Processor
    shared_vocabulary: bool


def from_encoder_decoder_pretrained(
    encoder: str | Path,
    decoder: str | Path,
    num_latents: int = 32,
    *,
    latent_stride: int | None = None,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
) -> NewModel:
    """Join two causal language models to a C3 model that is ready to train.

    Args:
        encoder: folder, Hub id or GGUF file of the model that reads contexts; its head is dropped.
        decoder: likewise of the model that answers. Its own chat template is kept beside C3's, see
            [`keep_own_template`].
        num_latents: latents a context is compressed into.
        latent_stride: most tokens of text a latent stands for, whose positions it then keeps, see [`C3Config`].
        dtype: floating-point type of the whole; "auto" for the decoder's.
        seed: seed of the new parts.

    Raises:
        ValueError: if a number is out of range, the decoder's output is more than a matrix product of its last hidden
            states (soft-capped or scaled logits), which a C3 model could not reproduce, a model is no body with a
            head, or the decoder's tokenizer has no end token.
        TypeError: if a tokenizer is not a fast one.
        FileNotFoundError: if a GGUF file is absent.
    """
    # Says what is wrong with the numbers before anything is loaded.
    C3Config(num_latents=num_latents, latent_stride=latent_stride)
    generator = _generator(seed)
    decoder_lm = load_half(decoder, dtype)
    encoder_lm = load_half(encoder, decoder_lm.dtype)
    decoder_tokenizer = load_tokenizer(decoder)
    tokenizer, encoder_tokenizer = as_plain_fast(decoder_tokenizer), as_plain_fast(load_tokenizer(encoder))
    shared = tokenizers_agree(encoder_tokenizer, tokenizer)

    known, encoder_known = (set(each.get_vocab().values()) for each in (tokenizer, encoder_tokenizer))
    add_markers(tokenizer, inline=shared)
    install_escapes(tokenizer)
    keep_own_template(tokenizer, decoder_tokenizer.chat_template)
    grow_embeddings(decoder_lm, tokenizer, known, generator)
    if not shared:
        encoder_tokenizer.add_tokens([CONTEXT_START_TOKEN], special_tokens=True)
    reader = tokenizer if shared else encoder_tokenizer
    grow_embeddings(encoder_lm, reader, encoder_known, generator)
    start_id = reader.convert_tokens_to_ids(CONTEXT_START_TOKEN)

    config = _make_config(encoder_lm, decoder_lm, tokenizer, start_id, num_latents, latent_stride, shared)
    model = _join(encoder_lm, decoder_lm, config)
    fill_queries(model, 0, generator)
    fill_projector(model, generator)
    model.generation_config = generation_config(config, tokenizer.bos_token_id, tokenizer.pad_token_id)
    processor = C3Processor(
        tokenizer, num_latents=num_latents, encoder_tokenizer=None if shared else encoder_tokenizer
    )
    return NewModel(model, processor, shared)


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"`seed` must be 0 to 2**63 - 1, got {seed}.")
    return torch.Generator().manual_seed(seed)


def grow_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: set[int], generator: torch.Generator
) -> None:
    """Give every id of `tokenizer` that is not in `known` a row in the model's tables, as described above."""
    new = sorted(set(tokenizer.get_vocab().values()) - known)
    table = model.get_input_embeddings()
    used = torch.tensor(sorted(token_id for token_id in known if token_id < table.num_embeddings))
    if new and new[-1] >= table.num_embeddings:
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings()]
    if head is not None and head.weight is not tables[0].weight:
        tables.append(head)
    for module in tables:
        with torch.no_grad():
            rows = module.weight[used].float()
            noise = torch.randn(len(new), rows.shape[1], generator=generator)
            module.weight[new] = (rows.mean(0) + NOISE_OF_NEW_ROWS * rows.std(0) * noise).to(module.weight.dtype)


def fill_queries(model: C3ForConditionalGeneration, first: int, generator: torch.Generator) -> None:
    """Draw the latent queries from number `first` on, see the module's description."""
    queries = model.model.latent_queries.weight
    with torch.no_grad():
        table = model.model.encoder.get_input_embeddings()
        rows = table(torch.arange(table.num_embeddings)).float()
        noise = torch.randn(len(queries) - first, rows.shape[1], generator=generator)
        queries[first:] = (rows.mean(0) + rows.std(0) * noise).to(queries.dtype)


def fill_projector(model: C3ForConditionalGeneration, generator: torch.Generator) -> None:
    """Draw the projector's weights, see the module's description."""
    projector, table = model.model.projector, model.model.language_model.get_input_embeddings()
    ids = torch.randint(0, model.config.encoder_config.vocab_size - 1, (4, 32), generator=generator)
    # The start marker is no text: skip its id.
    ids += ids >= model.config.encoder_context_start_token_id
    with torch.no_grad():
        inputs = model.get_encoder_latents(ids).float()
        wanted = table(torch.arange(table.num_embeddings)).float().std()
        deviation = wanted / inputs.square().sum(-1).mean().sqrt()
        weight = deviation * torch.randn(projector.weight.shape, generator=generator)
        projector.weight.copy_(weight)
        projector.bias.zero_()


def _make_config(
    encoder_lm: PreTrainedModel,
    decoder_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder_start_id: int,
    num_latents: int,
    latent_stride: int | None,
    shared: bool,
) -> C3Config:
    ids = tokenizer.convert_tokens_to_ids
    text_config, encoder_config = decoder_lm.config, encoder_lm.config
    text_config.eos_token_id = _stop_ids(decoder_lm, tokenizer)
    names = [half._name_or_path for half in (text_config, encoder_config)]
    for half in (text_config, encoder_config):
        # Else it is written into the model's own config.json: a folder of whoever made it.
        half._name_or_path = ""
    config = C3Config(
        text_config=text_config,
        encoder_config=encoder_config,
        num_latents=num_latents,
        latent_stride=latent_stride,
        context_start_token_id=ids(CONTEXT_START_TOKEN),
        context_end_token_id=ids(CONTEXT_END_TOKEN),
        context_token_id=ids(CONTEXT_TOKEN),
        inline_context_start_token_id=ids(INLINE_CONTEXT_START_TOKEN) if shared else None,
        inline_context_end_token_id=ids(INLINE_CONTEXT_END_TOKEN) if shared else None,
        encoder_context_start_token_id=encoder_start_id,
        base_models=[name for name in names if not Path(name).exists()] or None,
    )
    config.dtype = decoder_lm.dtype
    return config


def _stop_ids(decoder_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where generation stops, each id once: at the end of C3's turns, and where the decoder stops by itself."""
    stop_ids = [tokenizer.convert_tokens_to_ids(STOP_TOKEN), tokenizer.eos_token_id]
    for settings in (decoder_lm.config, decoder_lm.generation_config):
        own = settings.eos_token_id
        stop_ids += own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys(stop_ids))


def _join(encoder_lm: PreTrainedModel, decoder_lm: PreTrainedModel, config: C3Config) -> C3ForConditionalGeneration:
    """Put two loaded halves into one model; queries and projector are left empty."""
    with torch.device("meta"):
        model = C3ForConditionalGeneration(config)
    dtype = decoder_lm.dtype
    model.model.latent_queries = nn.Embedding(config.num_latents, config.encoder_config.hidden_size, dtype=dtype)
    model.model.projector = nn.Linear(config.encoder_config.hidden_size, config.text_config.hidden_size, dtype=dtype)
    _, model.model.encoder = find_body(encoder_lm)
    _, model.model.language_model = find_body(decoder_lm)
    model.lm_head = decoder_lm.get_output_embeddings()
    ids = torch.arange(min(16, config.text_config.vocab_size)).unsqueeze(0)
    with torch.inference_mode():
        expected = decoder_lm(input_ids=ids).logits
        logits = model(input_ids=ids).logits
    if not torch.equal(logits, expected):
        raise ValueError(
            f"`decoder` {type(decoder_lm).__name__} does more in its head than multiply by a matrix, for example "
            f"soft-capping of logits: they differ by up to {float((logits - expected).abs().max()):.3g} without it. A "
            "C3 model cannot reproduce that; choose another decoder."
        )
    return model.eval()


def tokenizers_agree(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids for ordinary text, so that both halves can read one vocabulary."""
    first_ids, second_ids = (
        [ids for ids, _ in TokenReader(tokenizer).read_plain(list(PROBES))] for tokenizer in (first, second)
    )
    return first_ids == second_ids


def add_markers(tokenizer: PreTrainedTokenizerBase, inline: bool) -> None:
    """Add the tokens of prompt format and contexts that are not there yet.

    Args:
        tokenizer: the decoder's; changed in place.
        inline: whether to add the two tokens around contexts written in line, which need one vocabulary.

    Raises:
        ValueError: if the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`decoder`: its tokenizer ({type(tokenizer).__name__}) has no `eos_token`, so generation could not stop. "
            "Set one in its tokenizer_config.json."
        )
    vocabulary = tokenizer.get_vocab()
    wanted = MARKERS + (INLINE_MARKERS if inline else ())
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in wanted if text not in vocabulary],
        special_tokens=True,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def resize_latents(
    model: C3ForConditionalGeneration, num_latents: int, *, reinitialise: bool = False, seed: int = 0
) -> str:
    """Change the number of latents of a model, in place.

    A longer table keeps the trained queries and gets new ones behind them; a shorter one keeps the first. The model
    computes something else afterwards and needs training: the decoder has never seen that number of latents.

    Args:
        num_latents: the new number, at least 1.
        reinitialise: draw all queries anew.

    Returns:
        What was done with the queries, in words.

    Raises:
        ValueError: if `num_latents` is not positive, or `seed` is out of range.
    """
    if num_latents < 1:
        raise ValueError(f"`num_latents` must be at least 1, got {num_latents}.")
    generator = _generator(seed)
    old = model.model.latent_queries.weight
    before = old.shape[0]
    kept = 0 if reinitialise else min(before, num_latents)
    table = nn.Embedding(num_latents, old.shape[1], device=old.device, dtype=old.dtype)
    with torch.no_grad():
        table.weight[:kept] = old[:kept]
    model.model.latent_queries = table
    model.config.num_latents = num_latents
    fill_queries(model, kept, generator)
    return f"{kept} of {before} queries kept, {before - kept} dropped, {num_latents - kept} drawn anew"


def replace_halves(
    model: C3ForConditionalGeneration, encoder: str | Path | None = None, decoder: str | Path | None = None
) -> None:
    """Put other weights into one or both halves, for example an exported half that was trained on, in place.

    Args:
        model: the model; queries, projector and settings stay.
        encoder: folder, Hub id or GGUF file of a causal language model shaped like the encoder; its head is dropped.
        decoder: likewise for the decoder, with its head.

    Raises:
        ValueError: if a half has other tensors or shapes than the one it replaces.
    """
    if encoder is not None:
        _replace(model.model.encoder, load_half(encoder, model.dtype), "encoder")
    if decoder is not None:
        causal_lm = load_half(decoder, model.dtype)
        _replace(model.model.language_model, causal_lm, "decoder")
        if not model.config.tie_word_embeddings:
            model.lm_head.load_state_dict(causal_lm.get_output_embeddings().state_dict())


def _replace(half: nn.Module, causal_lm: nn.Module, name: str) -> None:
    try:
        half.load_state_dict(find_body(causal_lm)[1].state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"`{name}` is not shaped like the {name} it replaces: {error}. To join halves of other shapes, make a new "
            "model from two models instead of changing one."
        ) from error
