"""A start for new small models from which restoring is learnt at once: the addresses of a copy laid into the weights.

Restoring needs two addresses: a latent query must find its tokens, and the decoder must find the latent that holds the
token it is about to write, and the token's place in it. From random weights that takes a small model thousands of
steps, and jumps in length undo it. Here both halves are GPT-2s (learned absolute positions), and one attention layer
of each starts with k heads that do nothing else: head r of query j reads token k j + r into slot r of latent j, and at
text position i head i mod k of the decoder reads its slot of latent i // k. Everything is an ordinary weight, and
trains on; the other heads and layers start at random, as always, but quiet. A further head of the decoder ends a text
that fills all latents. The decoder copies only if the prompt asks for the text: one head of its first layer looks for
the prompt's cue, so that other prompts start from nothing.

The hidden state is divided into the content of tokens, the address of the own position (latent and place), the tag of
a latent (the address of the tokens it reads), its flag, the mode, what the prompt asks for, and the mark of the
position behind the last address. An address is a signed
unit vector, one of 2 m in m dimensions, so that two of them agree, oppose each other, or have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.modeling_c3 import C3ForConditionalGeneration


# Lengths of the parts of a state: the embedding of a token, an address, the tag of a query, and in the decoder the tag
# of a latent and its flag. They decide what share of a state a norm leaves to each.
CONTENT, ADDRESS, QUERY_TAG, LATENT_TAG, FLAG = 1.5, 1.0, 1.5, 3.0, 2.0
# The decoder's sink carries the opposite of the flag. It is read by all heads but one, so it is made long: what
# training adds to it stays small beside its flag.
SINK = 40.0
# The mode: plus is the text. The cue's position is marked with as much.
MODE = 1.0
# Of the position behind the last address: as long as an address, so that a norm leaves the same share to the rest.
END = 2**0.5 * ADDRESS
# Of flag, mode and end. It has no mean, which a norm would spread over the state.
DIRECTION = torch.tensor([0.5**0.5, -(0.5**0.5)])
# Share of an embedding that a slot keeps; the rest is random, so that other paths see words as unlike as ever.
KEPT = 0.9
# Length of what a head writes: into a slot, and into the content of the decoder, where the last word still stands.
SLOT, COPY = 1.0, 6.0
# Attention logits: of an address that agrees, and of a latent for a decoder head whose turn it is, and is not. The
# sink has the opposite of the last two (and more, as it holds nothing else).
MATCH, OPEN, SHUT = 20.0, 10.0, -30.0
# Attention logits of the cue's word, of its position, and of the sink, which only both together exceed.
WORD, POSITION, NO_CUE = 40.0, 20.0, 50.0
# Output of the random rest of each block, relative to its usual start: quiet beside the copy, but not silent.
OTHER_PATHS = 0.1


@dataclass(frozen=True)
class _Layout:
    """Where things lie in a hidden state of `width`, in order; see the module for the parts."""

    width: int
    head_size: int
    tokens_per_latent: int
    num_latents: int

    @property
    def latent_dims(self) -> int:
        return -(-self.num_latents // 2)

    @property
    def place_dims(self) -> int:
        return -(-self.tokens_per_latent // 2)

    @property
    def content(self) -> int:
        return self.width - 2 * self.latent_dims - self.place_dims - 6

    @property
    def slot_size(self) -> int:
        return min(self.content // self.tokens_per_latent, self.head_size)

    @property
    def own(self) -> slice:
        return slice(self.content, self.content + self.latent_dims)

    @property
    def place(self) -> slice:
        return slice(self.own.stop, self.own.stop + self.place_dims)

    @property
    def tag(self) -> slice:
        return slice(self.place.stop, self.place.stop + self.latent_dims)

    @property
    def flag(self) -> slice:
        return slice(self.tag.stop, self.tag.stop + 2)

    @property
    def mode(self) -> slice:
        return slice(self.flag.stop, self.flag.stop + 2)

    @property
    def end(self) -> slice:
        return slice(self.mode.stop, self.mode.stop + 2)

    @property
    def root(self) -> float:
        """What GPT-2 divides the product of query and key by."""
        return self.head_size**0.5

    def norm(self, *lengths: float) -> float:
        """What a layer norm multiplies a state by whose parts have these lengths (and whose mean is about zero)."""
        return self.width**0.5 / math.hypot(*lengths)

    def latent_address(self, latent: int) -> torch.Tensor:
        return addresses(torch.tensor([latent]), self.latent_dims)[0]

    def place_address(self, place: int) -> torch.Tensor:
        return addresses(torch.tensor([place]), self.place_dims)[0]

    def slot(self, place: int) -> slice:
        return slice(place * self.slot_size, (place + 1) * self.slot_size)


def start_with_copying(
    model: C3ForConditionalGeneration, prompt_ids: Sequence[int], cue: int, end_id: int, tokens_per_latent: int
) -> None:
    """Lay the addresses of a copy into a new model, in place.

    Texts of up to `tokens_per_latent * num_latents` tokens are copied from the start, and end there.

    Args:
        model: two GPT-2 halves of the same width and number of heads over one vocabulary.
        prompt_ids: the prompt that asks for the text back, up to where the text begins.
        cue: place in the prompt of a token that other prompts do not have there.
        end_id: the token behind the text.
        tokens_per_latent: k, fewer than there are heads.

    Raises:
        ValueError: if a half is no GPT-2, the halves differ in shape, or `tokens_per_latent` tokens do not fit into a
            latent or their addresses into a head.
    """
    config = model.config.text_config
    layout = _Layout(
        width=config.hidden_size,
        head_size=config.hidden_size // config.num_attention_heads,
        tokens_per_latent=tokens_per_latent,
        num_latents=model.config.num_latents,
    )
    _check(model, layout)
    encoder, decoder = model.model.encoder, model.model.language_model
    with torch.no_grad():
        codes = make_codes(config.vocab_size, layout.slot_size) / layout.slot_size**0.5
        basis = torch.linalg.qr(torch.randn(layout.content, layout.content))[0]
        kept, rest = basis[: layout.slot_size], basis[layout.slot_size :]
        other = nn.functional.normalize(torch.randn(len(codes), len(rest)), dim=1)
        table = torch.zeros_like(decoder.wte.weight)
        table[:, : layout.content] = CONTENT * (KEPT * codes @ kept + (1 - KEPT**2) ** 0.5 * other @ rest)
        for half in (encoder, decoder):
            _quieten(half)
            half.wte.weight.copy_(table)
        _lay_encoder(model, layout, kept, table[end_id])
        _lay_decoder(decoder, layout, kept, prompt_ids)
        _lay_end(decoder, layout, kept, table[end_id], first_text=len(prompt_ids) - 1)
        _lay_cue(decoder, layout, prompt_ids, cue)


def make_codes(num_words: int, size: int) -> torch.Tensor:
    """Codes of words, `(num_words, size)` of signs, any two as unlike as can easily be had.

    The first columns count in binary, each of the others is a parity of digits. With six parities for up to 26 digits
    any two words differ in four places or more, as in an extended Hamming code; with fewer in at least one.

    Raises:
        ValueError: if `size` signs do not tell the words apart.
    """
    num_digits = max(1, (num_words - 1).bit_length())
    if size < num_digits:
        raise ValueError(
            f"`copy_start` keeps {size} dimensions of each word, and {num_words} words need at least {num_digits}. "
            "Take a wider model or fewer tokens a latent."
        )
    num_parities = min(size - num_digits, 8)
    # A digit counts in three or five parities, or in two or four if those run out, and no two digits in the same ones.
    choices = sorted(range(2**num_parities), key=lambda c: (c.bit_count() < 2, c.bit_count() % 2 == 0, c.bit_count()))
    chosen = torch.tensor([choices[digit % len(choices)] for digit in range(num_digits)])
    counts = chosen[:, None] >> torch.arange(size - num_digits) & 1
    digits = torch.arange(num_words)[:, None] >> torch.arange(num_digits) & 1
    return 1.0 - 2.0 * torch.cat([digits, digits @ counts % 2], dim=1)


def addresses(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Addresses of `numbers`, `(len(numbers), size)`: signed unit vectors, and zero outside 0 ... 2 size - 1."""
    table = torch.eye(size).repeat_interleave(2, dim=0)
    table[1::2] *= -1
    known = (numbers >= 0) & (numbers < 2 * size)
    return table[numbers.clamp(0, 2 * size - 1)] * known[:, None]


def _quieten(half: nn.Module) -> None:
    half.wpe.weight.zero_()
    for block in half.h:
        block.attn.c_proj.weight.mul_(OTHER_PATHS)
        block.mlp.c_proj.weight.mul_(OTHER_PATHS)


def _lay_positions(half: nn.Module, layout: _Layout, first_text: int) -> None:
    """Address of the text token at each position: its latent, and its place there."""
    numbers = torch.arange(half.wpe.num_embeddings) - first_text
    inside = (numbers >= 0) & (numbers < layout.tokens_per_latent * layout.num_latents)
    latent, place = numbers // layout.tokens_per_latent, numbers % layout.tokens_per_latent
    half.wpe.weight[:, layout.own] = ADDRESS * addresses(latent.where(inside, -1), layout.latent_dims)
    half.wpe.weight[:, layout.place] = ADDRESS * addresses(place.where(inside, -1), layout.place_dims)


def _lay_encoder(model: C3ForConditionalGeneration, layout: _Layout, kept: torch.Tensor, end: torch.Tensor) -> None:
    """The last layer reads: queries ask by their tags, tokens answer by their positions."""
    encoder, queries, projector = model.model.encoder, model.model.latent_queries.weight, model.model.projector
    _lay_positions(encoder, layout, first_text=0)
    # The token between a context and the queries is read as the one behind the text.
    encoder.wte.weight[model.config.context_start_token_id] = end
    queries.zero_()
    queries[:, layout.tag] = QUERY_TAG * addresses(torch.arange(len(queries)), layout.latent_dims)
    attention = encoder.h[-1].attn
    token = layout.norm(CONTENT, ADDRESS, ADDRESS)
    query = layout.norm(ADDRESS, ADDRESS, QUERY_TAG)
    for place in range(layout.tokens_per_latent):
        head = _Head(attention, layout, place)
        head.query[layout.tag, : layout.latent_dims] = torch.eye(layout.latent_dims) / (query * QUERY_TAG)
        head.key[layout.own, : layout.latent_dims] = (
            MATCH * layout.root * torch.eye(layout.latent_dims) / (token * ADDRESS)
        )
        head.query_bias[layout.latent_dims] = 1.0
        head.key[layout.place, layout.latent_dims] = (
            MATCH * layout.root * layout.place_address(place) / (token * ADDRESS)
        )
        head.value[: layout.content, : layout.slot_size] = kept.T
        scale = SLOT / (token * CONTENT * KEPT)
        head.out[: layout.slot_size, layout.slot(place)] = scale * torch.eye(layout.slot_size)
    latent = layout.norm(SLOT * layout.tokens_per_latent**0.5, ADDRESS, ADDRESS, QUERY_TAG)
    scales = torch.full((layout.width,), 1 / latent)
    scales[layout.own.start : layout.place.stop] = 0
    scales[layout.tag] *= LATENT_TAG / QUERY_TAG
    projector.weight.copy_(torch.diag(scales))
    projector.bias.zero_()
    projector.bias[layout.flag] = FLAG * DIRECTION


def _lay_decoder(decoder: nn.Module, layout: _Layout, kept: torch.Tensor, prompt_ids: Sequence[int]) -> None:
    """The middle layer writes: positions in the text ask the tags, and heads whose turn it is not read the sink.

    The layers before it can find out what the prompt wants, and those behind it can think the answer over.
    """
    _lay_positions(decoder, layout, first_text=len(prompt_ids) - 1)
    # The sink, the first token, has nothing to say.
    decoder.wpe.weight[0] = -decoder.wte.weight[prompt_ids[0]]
    decoder.wpe.weight[0, layout.flag] = -SINK * DIRECTION
    attention = _copying_layer(decoder).attn
    token = layout.norm(CONTENT, ADDRESS, ADDRESS, MODE)
    latent = layout.norm(SLOT * layout.tokens_per_latent**0.5, LATENT_TAG, FLAG)
    for place in range(layout.tokens_per_latent):
        head = _Head(attention, layout, place)
        head.query[layout.own, : layout.latent_dims] = torch.eye(layout.latent_dims) / (token * ADDRESS)
        head.key[layout.tag, : layout.latent_dims] = (
            MATCH * layout.root * torch.eye(layout.latent_dims) / (latent * LATENT_TAG)
        )
        head.query[layout.place, layout.latent_dims] = (OPEN - SHUT) * layout.place_address(place) / (token * ADDRESS)
        _lay_gate(head, layout, layout.latent_dims, token, latent)
        head.value[layout.slot(place), : layout.slot_size] = torch.eye(layout.slot_size)
        head.out[: layout.slot_size, : layout.content] = COPY / (latent * SLOT) * kept


def _lay_end(decoder: nn.Module, layout: _Layout, kept: torch.Tensor, end: torch.Tensor, first_text: int) -> None:
    """A head of the same layer reads the end in the first latent's tag at the position behind the last address."""
    position, first = first_text + layout.tokens_per_latent * layout.num_latents, layout.latent_address(0)
    if position >= decoder.wpe.num_embeddings:
        return
    decoder.wpe.weight[position, layout.end] = END * DIRECTION
    word = layout.norm(CONTENT, END, MODE)
    latent = layout.norm(SLOT * layout.tokens_per_latent**0.5, LATENT_TAG, FLAG)
    head = _Head(_copying_layer(decoder).attn, layout, number=layout.tokens_per_latent)
    head.query[layout.end, 0] = (OPEN - SHUT) * DIRECTION / (word * END)
    _lay_gate(head, layout, 0, word, latent)
    head.query_bias[1] = 1.0
    head.key[layout.tag, 1] = MATCH * layout.root * first / (latent * LATENT_TAG)
    # The sink has no tag, so that nothing is written elsewhere.
    head.value[layout.tag, 0] = first / (latent * LATENT_TAG)
    head.out[0, : layout.content] = COPY / (CONTENT * KEPT) * end[: layout.content] @ kept.T @ kept


def _lay_gate(head: _Head, layout: _Layout, dim: int, position: float, latent: float) -> None:
    """Latents are read in the mode of the text where the query's `dim` says that it is the head's turn; else the sink.

    Without the cue every gate is shut, and those of heads whose turn it is not doubly. `position` and `latent` are the
    norms of the states that ask and answer.
    """
    head.query[layout.mode, dim] = (OPEN - SHUT) / 2 * DIRECTION / (position * MODE)
    head.query_bias[dim] = SHUT - (OPEN - SHUT) / 2
    head.key[layout.flag, dim] = layout.root * DIRECTION / (latent * FLAG)


def _lay_cue(decoder: nn.Module, layout: _Layout, prompt_ids: Sequence[int], cue: int) -> None:
    """A head of the first layer reads the cue where it stands, else the sink, and writes the mode."""
    embedding = decoder.wte.weight[prompt_ids[cue]]
    decoder.wpe.weight[cue, layout.mode] = MODE * DIRECTION
    word, sink = layout.norm(CONTENT, MODE), layout.norm(SINK)
    head = _Head(decoder.h[0].attn, layout, number=0)
    head.query_bias[0] = layout.root
    head.key[:, 0] = WORD * embedding / (word * CONTENT**2)
    head.key[layout.mode, 0] = POSITION * DIRECTION / (word * MODE)
    head.key[layout.flag, 0] = -NO_CUE * DIRECTION / (sink * SINK)
    head.value[:, 0] = embedding / (word * CONTENT**2)
    head.value[layout.flag, 0] = DIRECTION / (sink * SINK)
    head.out[0, layout.mode] = MODE * DIRECTION


def _copying_layer(decoder: nn.Module) -> nn.Module:
    return decoder.h[len(decoder.h) // 2]


class _Head:
    """One attention head of a GPT-2, cleared; its parts are views of the layer's weights.

    Attributes:
        query, key, value: `(width, head_size)`.
        query_bias: `(head_size,)`.
        out: `(head_size, width)`.
    """

    def __init__(self, attention: nn.Module, layout: _Layout, number: int) -> None:
        width, size = layout.width, layout.head_size
        columns = [slice(part * width + number * size, part * width + (number + 1) * size) for part in range(3)]
        self.query, self.key, self.value = (attention.c_attn.weight[:, column] for column in columns)
        self.query_bias = attention.c_attn.bias[columns[0]]
        self.out = attention.c_proj.weight[columns[0]]
        for view in (self.query, self.key, self.value, self.out):
            view.zero_()


def _check(model: C3ForConditionalGeneration, layout: _Layout) -> None:
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
    if not 1 <= layout.tokens_per_latent < decoder.num_attention_heads:
        raise ValueError(
            f"`copy_start` may be 1 to {decoder.num_attention_heads - 1}, one less than the number of heads, got "
            f"{layout.tokens_per_latent}."
        )
    if decoder.num_hidden_layers < 2:
        raise ValueError(
            f"`copy_start` needs a decoder of 2 layers or more, one for the prompt and one for the copy, got "
            f"{decoder.num_hidden_layers}."
        )
    if layout.head_size < layout.latent_dims + 1:
        raise ValueError(
            f"`copy_start` needs heads of at least {layout.latent_dims + 1} dimensions for {layout.num_latents} "
            f"latents, got {layout.head_size}. Take a wider model, fewer heads or fewer latents."
        )
