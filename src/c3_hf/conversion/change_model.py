"""Changes to an existing C3 model: another number of latents, or another half of the same shape."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from c3_hf.conversion.causal_lm import find_body
from c3_hf.conversion.new_model import fill_queries
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration


def resize_latents(
    model: C3ForConditionalGeneration, num_latents: int, *, reinitialise: bool = False, seed: int = 0
) -> str:
    """Change the number of latents of a model, in place.

    A longer table keeps the trained queries and gets new ones behind them; a shorter one keeps the first. The model
    computes something else afterwards and needs training: the decoder has never seen that number of latents.

    Args:
        model: the model.
        num_latents: the new number, at least 1.
        reinitialise: draw all queries anew.
        seed: seed of the new queries.

    Returns:
        What was done with the queries, in words.

    Raises:
        ValueError: if `num_latents` is not positive.
    """
    if num_latents < 1:
        raise ValueError(f"`num_latents` must be at least 1, got {num_latents}.")
    old = model.model.latent_queries.weight
    before = old.shape[0]
    kept = 0 if reinitialise else min(before, num_latents)
    table = nn.Embedding(num_latents, old.shape[1], device=old.device, dtype=old.dtype)
    with torch.no_grad():
        table.weight[:kept] = old[:kept]
    model.model.latent_queries = table
    model.config.num_latents = num_latents
    fill_queries(model, kept, torch.Generator().manual_seed(seed))
    return f"{kept} of {before} queries kept, {before - kept} dropped, {num_latents - kept} drawn anew"


def replace_halves(
    model: C3ForConditionalGeneration, encoder: str | Path | None = None, decoder: str | Path | None = None
) -> None:
    """Put other weights into one or both halves, for example an exported half that was trained on, in place.

    Args:
        model: the model; queries, projector and settings stay.
        encoder: folder or Hub id of a causal language model shaped like the encoder; its head is dropped.
        decoder: likewise for the decoder, with its head.

    Raises:
        ValueError: if a half has other tensors or shapes than the one it replaces.
    """
    if encoder is not None:
        _replace(model.model.encoder, AutoModelForCausalLM.from_pretrained(encoder, dtype=model.dtype), "encoder")
    if decoder is not None:
        causal_lm = AutoModelForCausalLM.from_pretrained(decoder, dtype=model.dtype)
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
