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
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from c3_hf.conversion.causal_lm import find_body
from c3_hf.conversion.marker_tokens import add_markers, as_plain_fast, tokenizers_agree
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
    install_escapes,
)


NOISE_OF_NEW_ROWS = 0.01
MAX_NEW_TOKENS = 4096


@dataclass(frozen=True)
class NewModel:
    """A model ready to train, and what was decided on the way.

    Attributes:
        model: the model.
        processor: its processor.
        shared_vocabulary: whether both halves read the same tokenizer.
    """

    model: C3ForConditionalGeneration
    processor: C3Processor
    shared_vocabulary: bool


def make_model(
    encoder: str | Path,
    decoder: str | Path,
    num_latents: int = 32,
    *,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
) -> NewModel:
    """Join two causal language models to a C3 model that is ready to train.

    Args:
        encoder: folder or Hub id of the model that reads contexts; its head is dropped.
        decoder: folder or Hub id of the model that answers.
        num_latents: latents a context is compressed into.
        dtype: floating-point type of the whole; "auto" for the decoder's.
        seed: seed of the new parts.

    Raises:
        ValueError: if the decoder's output is more than a matrix product of its last hidden states (soft-capped or
            scaled logits), which a C3 model could not reproduce, a model is no body with a head, or the decoder's
            tokenizer has no end token.
        TypeError: if a tokenizer is not a fast one.
    """
    decoder_lm = AutoModelForCausalLM.from_pretrained(decoder, dtype=dtype).eval()
    encoder_lm = AutoModelForCausalLM.from_pretrained(encoder, dtype=decoder_lm.dtype).eval()
    tokenizer, encoder_tokenizer = (as_plain_fast(AutoTokenizer.from_pretrained(lm)) for lm in (decoder, encoder))
    shared = tokenizers_agree(encoder_tokenizer, tokenizer)
    generator = torch.Generator().manual_seed(seed)

    known = set(tokenizer.get_vocab().values())
    add_markers(tokenizer, inline=shared)
    install_escapes(tokenizer)
    grow_embeddings(decoder_lm, tokenizer, known, generator)
    if shared:
        grow_embeddings(encoder_lm, tokenizer, known, generator)
        start_id = tokenizer.convert_tokens_to_ids(CONTEXT_START_TOKEN)
    else:
        encoder_known = set(encoder_tokenizer.get_vocab().values())
        encoder_tokenizer.add_tokens([CONTEXT_START_TOKEN], special_tokens=True)
        grow_embeddings(encoder_lm, encoder_tokenizer, encoder_known, generator)
        start_id = encoder_tokenizer.convert_tokens_to_ids(CONTEXT_START_TOKEN)

    model = _join(
        encoder_lm, decoder_lm, _make_config(encoder_lm, decoder_lm, tokenizer, start_id, num_latents, shared)
    )
    fill_queries(model, 0, generator)
    fill_projector(model, generator)
    _set_generation_defaults(model, tokenizer)
    processor = C3Processor(
        tokenizer, num_latents=num_latents, encoder_tokenizer=None if shared else encoder_tokenizer
    )
    return NewModel(model, processor, shared)


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
    shared: bool,
) -> C3Config:
    ids = tokenizer.convert_tokens_to_ids
    text_config = decoder_lm.config
    text_config.eos_token_id = [ids(STOP_TOKEN), tokenizer.eos_token_id]
    names = [lm.config._name_or_path for lm in (decoder_lm, encoder_lm)]
    config = C3Config(
        text_config=text_config,
        encoder_config=encoder_lm.config,
        num_latents=num_latents,
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


def _set_generation_defaults(model: C3ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = model.generation_config
    settings.eos_token_id = list(model.config.text_config.eos_token_id)
    settings.pad_token_id = tokenizer.pad_token_id
    settings.bos_token_id = tokenizer.bos_token_id
    settings.do_sample = False
    settings.max_new_tokens = MAX_NEW_TOKENS
