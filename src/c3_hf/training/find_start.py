"""Finding, laid into a new model beside copying: a reply begun with words of the text goes on from them.

Where the prompt asks for it, each position of the reply looks for its last three words in the latents and reads what
comes behind them. Three layers of the decoder work together:

- the first notes the two words before, a few signs of their codes, beside the word itself;
- before the copying layer, one head for each slot of a latent compares the word and its history with its slot and
  those before it. Only where every sign agrees it reads the latent, else the sink, and writes the address of the slot
  behind. This is the induction of language models (Olsson et al. 2022, arXiv 2209.11895), but into latents of many
  tokens each;
- the heads of the copying layer take that address, if there is one, for that of the position.

A word that does not come with the same signs elsewhere is found; of two places that agree the mean is read, which is
neither. Words of a latent's beginning have their history in the latent, where two more heads of the encoder write it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..modeling.modeling_c3 import C3ForConditionalGeneration
from .laid_weights import (
    ADDRESS,
    CONTENT,
    DIRECTION,
    DISTANCES,
    FLAG,
    FOUND,
    KEPT,
    LATENT_TAG,
    MODE,
    PREVIOUS,
    SINK,
    SLOT,
    Head,
    Layout,
    lay_cue,
    lay_reader,
    next_address,
)


# Signs of the code that are compared, of the word and of each word before. One agrees by chance half of the time: few
# other words agree in all, and a word that comes again is told apart by those before it.
WORD_SIGNS, SIGNS = 9, 5
# Heads of the decoder's first layer: two for cues, one for each word before.
FIRST_LAYER_HEADS = 2 + len(DISTANCES)
# Dimensions in which a place is told from the others by two waves.
WAVE_DIMS = 4
# Attention logits that the own latent has before the one in front of it, and nearly what the place sought has before
# any other.
NEAR = 30.0
# Attention logit of a word and history whose signs agree, all of them.
SAME = 420.0
# Of latents beside other positions, whose content would be taken for slots.
ONLY_LATENTS = 100.0
# Length of the mark by which the sink is told from latents and from other positions.
ASIDE = 10.0
# How the address found outweighs the position's own in the queries of the copying heads: attention logits of latent
# and place, relative to an address of length 1.
FOUND_LATENT, FOUND_PLACE = 3.0, 200.0


def check_finding(model: C3ForConditionalGeneration, layout: Layout) -> None:
    """Raise `ValueError` if finding does not fit into the model."""
    config = model.config.text_config
    if layout.tokens_per_latent % 2:
        # Only then the last place of a latent and the first one of the next are neighbours as addresses.
        raise ValueError(f"`find_start` needs an even `copy_start`, got {layout.tokens_per_latent}.")
    needed_heads = max(layout.tokens_per_latent + len(DISTANCES), FIRST_LAYER_HEADS)
    if config.num_attention_heads < needed_heads or config.num_hidden_layers < 4:
        raise ValueError(
            f"`find_start` with `copy_start` {layout.tokens_per_latent} needs at least {needed_heads} heads and a "
            f"decoder of 4 layers, got {config.num_attention_heads} heads and {config.num_hidden_layers} layers."
        )
    needed_size = max(WORD_SIGNS + len(DISTANCES) * layout.signs + 1, layout.latent_dims + WAVE_DIMS)
    if layout.head_size < needed_size or layout.slot_size < WORD_SIGNS:
        raise ValueError(
            f"`find_start` needs heads of at least {needed_size} dimensions and {WORD_SIGNS} dimensions of each word "
            f"in a latent, got {layout.head_size} and {layout.slot_size}. Take a wider model, fewer latents or fewer "
            "tokens a latent."
        )


def lay_finding(
    model: C3ForConditionalGeneration, layout: Layout, kept: torch.Tensor, word: int, cue: int, copying: nn.Module
) -> None:
    """Lay finding into a model in which copying lies already, in place.

    Args:
        model: two GPT-2 halves.
        layout: with `signs`.
        kept: `(slot_size, content)`, directions of the code of a word in its embedding.
        word: the token at `cue` that asks for it.
        cue: place in the prompt.
        copying: the decoder's copying layer.
    """
    encoder, decoder = model.model.encoder, model.model.language_model
    signs = kept[: layout.signs]
    lay_cue(decoder, layout, word, cue, -MODE, number=1)
    for distance in DISTANCES:
        _lay_past(encoder.h[-1].attn, layout, signs, distance)
        _lay_previous(decoder.h[0].attn, layout, signs, distance)
    decoder.wpe.weight[0, layout.end] = ASIDE * DIRECTION
    _lay_search(decoder.h[list(decoder.h).index(copying) - 1].attn, layout, kept[:WORD_SIGNS])
    for place in range(layout.tokens_per_latent):
        head = Head(copying.attn, layout, place)
        size = layout.latent_dims
        head.query[layout.tag, :size] = FOUND_LATENT * torch.eye(size) / (layout.text_norm * FOUND)
        head.query[layout.found, size] = FOUND_PLACE * layout.place_address(place) / (layout.text_norm * FOUND)


def _lay_past(attention: nn.Module, layout: Layout, signs: torch.Tensor, distance: int) -> None:
    """A head of the encoder's last layer notes in each latent a word from the end of the latent before it."""
    head = Head(attention, layout, layout.tokens_per_latent + distance - 1)
    place, before = layout.tokens_per_latent - distance, next_address(layout.latent_dims).T
    lay_reader(head, layout, before, place, signs, into=layout.past(distance))


def _lay_previous(attention: nn.Module, layout: Layout, signs: torch.Tensor, distance: int) -> None:
    """A head of the decoder's first layer notes the word some positions before.

    It is the one with that place in the same latent's share of the text, or if there is none yet, in the share before.
    The place is sought by two waves over its number, as a head has no room for address and place.
    """
    head = Head(attention, layout, 1 + distance).clear()
    latents, places = layout.latent_dims, layout.place_dims
    token = layout.norm(CONTENT, ADDRESS, ADDRESS)
    angles = torch.arange(places)[:, None] * torch.tensor([1, places // 2 | 1]) * math.pi / places
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    back = torch.linalg.matrix_power(next_address(places).T, distance)
    own, place = slice(0, latents), slice(latents, latents + WAVE_DIMS)
    head.query[layout.own, own] = (2 * torch.eye(latents) + next_address(latents).T) / (token * ADDRESS)
    head.key[layout.own, own] = NEAR * layout.root * torch.eye(latents) / (token * ADDRESS)
    head.query[layout.place, place] = back @ waves / (token * ADDRESS)
    head.key[layout.place, place] = 1.5 * NEAR * layout.root * waves / (token * ADDRESS)
    scale = (layout.slot_size / layout.signs) ** 0.5 / (token * CONTENT * KEPT)
    head.value[: layout.content, : layout.signs] = scale * signs.T
    head.out[: layout.signs, layout.previous(distance)] = PREVIOUS * torch.eye(layout.signs)


def _lay_search(attention: nn.Module, layout: Layout, word: torch.Tensor) -> None:
    """Heads compare word and history with their slots, and write the address of the next slot where all signs agree.

    Codes are brought to signs of +-1, so that each sign that agrees adds as much to the logit, and one that does not
    leaves it under that of the sink.
    """
    token, latent = layout.text_norm, layout.latent_norm
    sink = SINK * layout.norm(SINK, ASIDE) / (latent * FLAG)
    aside = ASIDE * layout.norm(SINK, ASIDE)
    gate = WORD_SIGNS + len(DISTANCES) * layout.signs
    threshold = SAME * (1 - 1 / gate)
    each = SAME / gate * layout.root * layout.slot_size**0.5 / (latent * SLOT)
    size, last = layout.latent_dims, layout.tokens_per_latent - 1
    for place in range(layout.tokens_per_latent):
        head = Head(attention, layout, place).clear()
        slot = layout.slot(place).start
        head.query[: layout.content, :WORD_SIGNS] = layout.slot_size**0.5 * word.T / (token * CONTENT * KEPT)
        head.key[slot : slot + WORD_SIGNS, :WORD_SIGNS] = each * torch.eye(WORD_SIGNS)
        for distance in DISTANCES:
            start = WORD_SIGNS + (distance - 1) * layout.signs
            compared = slice(start, start + layout.signs)
            head.query[layout.previous(distance), compared] = (
                layout.signs**0.5 * torch.eye(layout.signs) / (token * PREVIOUS)
            )
            before = layout.slot(place - distance).start
            signs = slice(before, before + layout.signs) if distance <= place else layout.past(distance - place)
            head.key[signs, compared] = each * torch.eye(layout.signs)
        # 1 if the prompt asks for finding, and 3 or 5 where not even the same words may exceed the sink.
        head.query_bias[gate] = 3.0
        head.query[layout.mode, gate] = 2 * DIRECTION / (token * MODE)
        head.key[layout.flag, gate] = ONLY_LATENTS * layout.root * DIRECTION / (latent * FLAG)
        head.key[layout.end, gate] = (threshold + ONLY_LATENTS * (1 + sink)) * layout.root * DIRECTION / aside
        head.value[layout.tag, :size] = torch.eye(size) / (latent * LATENT_TAG)
        # 1 for latents, and nothing for the sink.
        head.value[layout.flag, size] = DIRECTION / (latent * FLAG)
        head.value[layout.end, size] = sink * DIRECTION / aside
        head.out[:size, layout.tag] = FOUND * (next_address(size) if place == last else torch.eye(size))
        head.out[size, layout.found] = FOUND * layout.place_address(0 if place == last else place + 1)
