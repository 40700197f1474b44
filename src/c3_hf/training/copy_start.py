"""A start for new small models from which restoring is learnt at once: the addresses of a copy laid into the weights.

Restoring needs two addresses: a latent query must find its tokens, and the decoder must find the latent that holds the
token it is about to write, and the token's place in it. From random weights that takes a small model thousands of
steps, and jumps in length undo it. Here both halves are GPT-2s (learned absolute positions), and the first attention
layer of each starts with heads that compare sinusoidal features of positions: query j reads the tokens k j ...
k j + k - 1, each through its own heads into its own slot of the latent, and the decoder at text position i reads slot
i mod k of latent i // k. Everything is an ordinary weight, and trains on.

The hidden state is divided into the content of tokens, features of the own position, and features of the text position
that a latent begins with, its tag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.modeling_c3 import C3ForConditionalGeneration


NUM_FREQUENCIES = 15
# Cosines, sines, a constant and a zero.
NUM_FEATURES = 2 * NUM_FREQUENCIES + 2
AMPLITUDE = 1 / 4
# The features tell positions apart up to about half a period of the slowest, 260 tokens.
FASTEST, SLOWEST = 1.3, 0.012
# Output of the random rest of each block, relative to its usual start: quiet beside the copy, but not silent.
OTHER_PATHS = 0.2


@dataclass(frozen=True)
class _Layout:
    """Where things lie in the hidden state, and what the heads look for.

    Attributes:
        tokens_per_latent: k, tokens that share a latent.
        num_heads, head_size: of the attention of both halves.
        content: width of the content; the features of the own position start there.
        tag: where the features of the tag start.
        frequencies: `(NUM_FREQUENCIES,)`, in radians a token.
        mixing: `(content // k, content)`, orthonormal rows: from the content of a token to a slot.
        sharpness: attention logit of the token looked for, over that of unrelated ones.
    """

    tokens_per_latent: int
    num_heads: int
    head_size: int
    content: int
    tag: int
    frequencies: torch.Tensor
    mixing: torch.Tensor
    sharpness: float


def start_with_copying(
    model: C3ForConditionalGeneration, prompt_ids: Sequence[int], tokens_per_latent: int, sharpness: float = 30.0
) -> None:
    """Lay the addresses of a copy into a new model, in place.

    Args:
        model: two GPT-2 halves of the same width and number of heads over one vocabulary.
        prompt_ids: the prompt that asks for the text back, up to where the text begins.
        tokens_per_latent: k; texts of up to `k * num_latents` tokens are copied from the start. Divides the number of
            heads.
        sharpness: attention logit of the token looked for, over that of unrelated ones.

    Raises:
        ValueError: if a half is no GPT-2, the halves differ in shape, a head is too narrow for the features, or
            `tokens_per_latent` does not divide the number of heads.
    """
    _check(model, tokens_per_latent)
    config = model.config.text_config
    with torch.no_grad():
        content = config.hidden_size - 2 * NUM_FEATURES
        tables = _lay_tables(model, content, tokens_per_latent)
        layout = _Layout(
            tokens_per_latent=tokens_per_latent,
            num_heads=config.num_attention_heads,
            head_size=config.hidden_size // config.num_attention_heads,
            content=content,
            tag=content + NUM_FEATURES,
            frequencies=tables,
            mixing=torch.linalg.qr(torch.randn(content, content))[0][: content // tokens_per_latent],
            sharpness=sharpness,
        )
        _lay_reading(model.model.encoder.h[0].attn, layout)
        _lay_writing(model.model.language_model.h[0].attn, layout, first_text=len(prompt_ids) - 1)


def position_features(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Features of positions, `(num_positions, NUM_FEATURES)`: cosines, sines, a constant and a zero."""
    angles = positions[:, None].float() * frequencies
    constant = torch.ones(len(positions), 1)
    return torch.cat([angles.cos(), angles.sin(), constant, 0 * constant], dim=1) * AMPLITUDE


def shift_matrix(shift: int, frequencies: torch.Tensor) -> torch.Tensor:
    """The matrix that takes the features of x, a row, to those of x + shift, square over cosines and sines."""
    cos, sin = torch.diag((shift * frequencies).cos()), torch.diag((shift * frequencies).sin())
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)], dim=0)


def _lay_tables(model: C3ForConditionalGeneration, content: int, tokens_per_latent: int) -> torch.Tensor:
    """Embeddings, queries and projector; returns the frequencies of the features."""
    encoder, decoder = model.model.encoder, model.model.language_model
    tag = content + NUM_FEATURES
    # The harmonics of k tell the places within a latent apart exactly.
    harmonics = 2 * math.pi / tokens_per_latent * torch.arange(1, tokens_per_latent // 2 + 1)
    others = torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), NUM_FREQUENCIES - len(harmonics))
    frequencies = torch.cat([harmonics, others])
    table = torch.zeros_like(decoder.wte.weight)
    table[:, :content].normal_(std=content**-0.5)
    for half in (encoder, decoder):
        half.wte.weight.copy_(table)
        half.wpe.weight.zero_()
        half.wpe.weight[:, content:tag] = position_features(torch.arange(half.wpe.num_embeddings), frequencies)
        for block in half.h:
            block.attn.c_proj.weight.mul_(OTHER_PATHS)
            block.mlp.c_proj.weight.mul_(OTHER_PATHS)
    queries = model.model.latent_queries.weight
    queries.zero_()
    queries[:, tag:] = position_features(torch.arange(len(queries)) * tokens_per_latent, frequencies)
    projector = model.model.projector
    projector.weight.zero_()
    # The encoder's last norm makes a state of length sqrt(width); the latents return to the scale of embeddings.
    projector.weight.fill_diagonal_(1.7 / table.shape[1] ** 0.5)
    projector.weight[content:tag].zero_()
    projector.bias.zero_()
    return frequencies


def _lay_reading(attention: nn.Module, layout: _Layout) -> None:
    """Encoder: head r mod k of query j compares its tag, k j, shifted by r, with the positions of the tokens."""
    weight = _clear(attention)
    width, size = attention.c_proj.weight.shape[0], layout.head_size
    for head in range(layout.num_heads):
        place = head % layout.tokens_per_latent
        _lay_comparison(weight, layout, head, query_at=layout.tag, key_at=layout.content, shift=place)
        piece, slot = _piece(layout, head)
        count = piece.stop - piece.start
        value = 2 * width + head * size
        weight[: layout.content, value : value + count] = layout.mixing[piece].T
        attention.c_proj.weight[head * size : head * size + count, slot] = 0.09 * torch.eye(count)


def _lay_writing(attention: nn.Module, layout: _Layout, first_text: int) -> None:
    """Decoder: head r mod k compares the position in the text, less r, with the tags, and reads slot r."""
    weight = _clear(attention)
    width, size = attention.c_proj.weight.shape[0], layout.head_size
    for head in range(layout.num_heads):
        place = head % layout.tokens_per_latent
        shift = -first_text - place
        _lay_comparison(weight, layout, head, query_at=layout.content, key_at=layout.tag, shift=shift)
        # Heads whose place it is not find no tag that fits; they are kept off the latents altogether.
        constant, column = 2 * NUM_FREQUENCIES, head * size + 2 * NUM_FREQUENCIES
        weight[layout.content + constant, column] = 0.72 * layout.sharpness**0.5
        weight[layout.tag + constant, width + column] = -0.72 * layout.sharpness**0.5
        piece, slot = _piece(layout, head)
        count = piece.stop - piece.start
        value = 2 * width + head * size
        weight[slot, value : value + count] = torch.eye(count)
        attention.c_proj.weight[head * size : head * size + count, : layout.content] = 1.7 * layout.mixing[piece]


def _clear(attention: nn.Module) -> torch.Tensor:
    attention.c_attn.weight.zero_()
    attention.c_proj.weight.zero_()
    return attention.c_attn.weight


def _lay_comparison(weight: torch.Tensor, layout: _Layout, head: int, query_at: int, key_at: int, shift: int) -> None:
    """Queries and keys of one head whose logit is highest where the shifted features agree."""
    width, size, used = weight.shape[0], layout.head_size, 2 * NUM_FREQUENCIES
    scale = math.sqrt(layout.sharpness / 18)
    start = head * size
    weight[query_at : query_at + used, start : start + used] = scale * shift_matrix(shift, layout.frequencies)
    weight[key_at : key_at + used, width + start : width + start + used] = scale * torch.eye(used)


def _piece(layout: _Layout, head: int) -> tuple[slice, slice]:
    """Rows of the mixing that a head carries, and the columns of the content where its slot keeps them."""
    slot_size = layout.content // layout.tokens_per_latent
    parts = layout.num_heads // layout.tokens_per_latent
    place, part = head % layout.tokens_per_latent, head // layout.tokens_per_latent
    piece = slice(part * slot_size // parts, (part + 1) * slot_size // parts)
    return piece, slice(place * slot_size + piece.start, place * slot_size + piece.stop)


def _check(model: C3ForConditionalGeneration, tokens_per_latent: int) -> None:
    encoder, decoder = model.config.encoder_config, model.config.text_config
    if {encoder.model_type, decoder.model_type} != {"gpt2"}:
        raise ValueError(
            f"`copy_start` is laid into GPT-2 halves, got {encoder.model_type!r} and {decoder.model_type!r}. Leave it "
            "out, or give both configurations `model_type: gpt2`."
        )
    names = ("hidden_size", "num_attention_heads", "vocab_size")
    shapes = [tuple(getattr(config, name) for name in names) for config in (encoder, decoder)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"`copy_start` needs two halves with the same {names}, got {shapes[0]} and {shapes[1]}.")
    head_size = decoder.hidden_size // decoder.num_attention_heads
    slot_size = (decoder.hidden_size - 2 * NUM_FEATURES) // tokens_per_latent if tokens_per_latent > 0 else 0
    if tokens_per_latent < 1 or decoder.num_attention_heads % tokens_per_latent:
        raise ValueError(
            f"`copy_start` must divide the number of heads, {decoder.num_attention_heads}, got {tokens_per_latent}."
        )
    carried = -(-slot_size * tokens_per_latent // decoder.num_attention_heads)
    if head_size < NUM_FEATURES or carried > head_size:
        raise ValueError(
            f"`copy_start` needs heads of at least {max(NUM_FEATURES, carried)} dimensions, got {head_size}. Take a "
            "wider model or fewer heads."
        )
