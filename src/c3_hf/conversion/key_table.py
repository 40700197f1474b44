"""Which original tensor becomes which of ours, and which are left out for what reason: data, and the lookup in it.

A source pattern is a regular expression that must match a whole tensor name; the target may use its groups. The tables
are read from the top, the first match counts. A descendant of the original that differs by names only is one more row.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Rename(NamedTuple):
    """Tensors whose name matches `source` are stored as `target`."""

    source: str
    target: str


class Drop(NamedTuple):
    """Tensors whose name matches `source` are left out."""

    source: str
    reason: str


# The main folder of the release: decoder, latent queries, projector.
MAIN_RENAMES = (
    Rename(r"model\.Q\.weight", r"model.latent_queries.weight"),
    Rename(r"model\.mm_projector\.(weight|bias)", r"model.projector.\1"),
    Rename(r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    Rename(r"(lm_head\.weight)", r"\1"),
    # Descendants that save the whole model in one folder, as a plain save_pretrained of the original's class does.
    Rename(r"model\.llm1\.model\.((?:embed_tokens|layers|norm)\..+)", r"model.encoder.\1"),
)
# The subfolder llm1: the encoder as a causal language model.
ENCODER_RENAMES = (Rename(r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.encoder.\1"),)

MAIN_DROPS = (
    Drop(r"model\.llm1\.lm_head\.weight", "the encoder's head is never used: only its hidden states are read"),
    Drop(r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"),
)
ENCODER_DROPS = (
    Drop(r"lm_head\.weight", "the encoder's head is never used: only its hidden states are read"),
    Drop(r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"),
)
TIED_HEAD = "tie_word_embeddings is true: the head is the embedding table"
EQUAL_HEAD = "equal to the embedding table, byte for byte: the head is tied"

# Ours back to the original's two folders.
ORIGINAL_MAIN_RENAMES = (
    Rename(r"model\.latent_queries\.weight", r"model.Q.weight"),
    Rename(r"model\.projector\.(weight|bias)", r"model.mm_projector.\1"),
    Rename(r"model\.language_model\.(.+)", r"model.\1"),
    Rename(r"(lm_head\.weight)", r"\1"),
)
ORIGINAL_ENCODER_RENAMES = (Rename(r"model\.encoder\.(.+)", r"model.\1"),)


def original_name(name: str) -> str:
    """The original's name of our tensor `name`, with its folder: "model.Q.weight", "llm1/model.norm.weight"."""
    encoder_name = find_target(name, ORIGINAL_ENCODER_RENAMES)
    if encoder_name is not None:
        return f"llm1/{encoder_name}"
    return find_target(name, ORIGINAL_MAIN_RENAMES) or name


def find_target(name: str, renames: tuple[Rename, ...]) -> str | None:
    """The name that `name` is stored under according to `renames`, or None if no row matches."""
    for row in renames:
        match = re.fullmatch(row.source, name)
        if match:
            return match.expand(row.target)
    return None


def find_drop_reason(name: str, drops: tuple[Drop, ...]) -> str | None:
    """Why `name` is left out according to `drops`, or None if no row matches."""
    for row in drops:
        if re.fullmatch(row.source, name):
            return row.reason
    return None
