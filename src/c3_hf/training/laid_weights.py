"""What weights are laid out by hand with: where things lie in a hidden state, how long they are, addresses and codes.

The hidden state is divided into the content of tokens, the address of the own position (latent and place), the tag of
a latent (the address of the tokens it reads), its flag, the mode, what the prompt asks for, and the mark of the
position behind the last address. For finding (`c3_hf.training.find_start`) there is more: the place of what was found
(its latent takes the room of the tag, which only latents have), signs of the two words before, and in a latent signs
of the last two words of the latent before it. An address is a signed unit vector, one of 2 m in m dimensions, so that
two of them agree, oppose each other, or have nothing in common, and one linear map leads from each to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


# Lengths of the parts of a state: the embedding of a token, an address, the tag of a query, and in the decoder the tag
# of a latent and its flag. They decide what share of a state a norm leaves to each.
CONTENT, ADDRESS, QUERY_TAG, LATENT_TAG, FLAG = 1.5, 1.0, 1.5, 3.0, 2.0
# The decoder's sink carries the opposite of the flag. It is read by all heads but one, so it is made long: what
# training adds to it stays small beside its flag.
SINK = 40.0
# The mode: plus repeats the text, minus finds a place in it. The cue's position is marked with as much.
MODE = 1.0
# Of a word before, and of the latent and the place of what was found.
PREVIOUS, FOUND = 1.0, 1.0
# Of flag, mode and end. It has no mean, which a norm would spread over the state.
DIRECTION = torch.tensor([0.5**0.5, -(0.5**0.5)])
# Share of an embedding that a slot keeps; the rest is random, so that other paths see words as unlike as ever.
KEPT = 0.9
# Length of what a head writes into a slot.
SLOT = 1.0
# Words before the present one that finding looks at.
DISTANCES = (1, 2)
# Attention logit of an address that agrees.
MATCH = 20.0
# Attention logits of a cue's word, of its position, and of the sink, which only both together exceed.
WORD, POSITION, NO_CUE = 40.0, 20.0, 50.0


@dataclass(frozen=True)
class Layout:
    """Where things lie in a hidden state of `width`, in order; see the module for the parts.

    Attributes:
        signs: of the code of a word before; 0 in a model that does not find.
    """

    width: int
    head_size: int
    tokens_per_latent: int
    num_latents: int
    signs: int = 0

    @property
    def latent_dims(self) -> int:
        return -(-self.num_latents // 2)

    @property
    def place_dims(self) -> int:
        return -(-self.tokens_per_latent // 2)

    @property
    def content(self) -> int:
        finding = self.place_dims + 2 * len(DISTANCES) * self.signs if self.signs else 0
        return self.width - 2 * self.latent_dims - self.place_dims - 6 - finding

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
    def found(self) -> slice:
        """Place of what was found, beside its latent in `tag`."""
        return slice(self.end.stop, self.end.stop + self.place_dims)

    def previous(self, distance: int) -> slice:
        """Signs of the word `distance` positions before."""
        start = self.found.stop + (distance - 1) * self.signs
        return slice(start, start + self.signs)

    def past(self, distance: int) -> slice:
        """In a latent, signs of the word `distance` positions before its first."""
        start = self.found.stop + (len(DISTANCES) + distance - 1) * self.signs
        return slice(start, start + self.signs)

    @property
    def root(self) -> float:
        """What GPT-2 divides the product of query and key by."""
        return self.head_size**0.5

    def norm(self, *lengths: float) -> float:
        """What a layer norm multiplies a state by whose parts have these lengths (and whose mean is about zero)."""
        return self.width**0.5 / math.hypot(*lengths)

    @property
    def text_norm(self) -> float:
        """Of a position in the reply, behind the first layer."""
        previous = [PREVIOUS] * len(DISTANCES) if self.signs else []
        return self.norm(CONTENT, ADDRESS, ADDRESS, MODE, *previous)

    @property
    def slot_lengths(self) -> list[float]:
        """Lengths of what a full latent holds of words: all slots together, and the signs of each past word."""
        past = SLOT * (self.signs / self.slot_size) ** 0.5
        return [SLOT * self.tokens_per_latent**0.5, *[past] * len(DISTANCES)]

    @property
    def latent_norm(self) -> float:
        """Of a full latent in the decoder."""
        return self.norm(*self.slot_lengths, LATENT_TAG, FLAG)

    def latent_address(self, latent: int) -> torch.Tensor:
        return addresses(torch.tensor([latent]), self.latent_dims)[0]

    def place_address(self, place: int) -> torch.Tensor:
        return addresses(torch.tensor([place]), self.place_dims)[0]

    def slot(self, place: int) -> slice:
        return slice(place * self.slot_size, (place + 1) * self.slot_size)


class Head:
    """One attention head of a GPT-2; its parts are views of the layer's weights.

    Attributes:
        query, key, value: `(width, head_size)`.
        query_bias: `(head_size,)`.
        out: `(head_size, width)`.
    """

    def __init__(self, attention: nn.Module, layout: Layout, number: int) -> None:
        width, size = layout.width, layout.head_size
        columns = [slice(part * width + number * size, part * width + (number + 1) * size) for part in range(3)]
        self.query, self.key, self.value = (attention.c_attn.weight[:, column] for column in columns)
        self.query_bias = attention.c_attn.bias[columns[0]]
        self.out = attention.c_proj.weight[columns[0]]

    def clear(self) -> Head:
        """Set all but the biases to zero, which they are in a new model anyway."""
        for view in (self.query, self.key, self.value, self.out):
            view.zero_()
        return self


def make_codes(num_words: int, size: int) -> torch.Tensor:
    """Codes of words, `(num_words, size)` of signs, any two as unlike as can easily be had.

    The first columns count in binary, each of the others is a parity of digits. With six parities for up to 26 digits
    any two words differ in four places or more, as in an extended Hamming code; with fewer in at least one.

    Raises:
        ValueError: if `size` signs do not tell the words apart.
    """
    num_digits = code_digits(num_words)
    if size < num_digits:
        raise ValueError(
            f"`copy_start` keeps {size} dimensions of each word, and {num_words} words need at least {num_digits}. "
            "Take a wider model or fewer tokens a latent."
        )
    num_parities = min(size - num_digits, 8)
    # A digit counts in three or five parities, or in two or four if those run out, and no two digits in the same ones.
    choices = sorted(range(2**num_parities), key=lambda c: (c.bit_count() < 2, c.bit_count() % 2 == 0, c.bit_count()))
    chosen = torch.tensor([choices[digit % len(choices)] for digit in range(num_digits)])
    counts = chosen[:, None] >> torch.arange(num_parities) & 1
    digits = torch.arange(num_words)[:, None] >> torch.arange(num_digits) & 1
    codes = 1.0 - 2.0 * torch.cat([digits, digits @ counts % 2], dim=1)
    # Columns that are left repeat the first ones with the other sign, so that codes have little of a mean.
    return torch.cat([codes, -codes], dim=1).repeat(1, -(-size // codes.shape[1]))[:, :size]


def code_digits(num_words: int) -> int:
    """Leading signs of a code, which are the number of the word."""
    return max(1, (num_words - 1).bit_length())


def addresses(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Addresses of `numbers`, `(len(numbers), size)`: signed unit vectors, and zero outside 0 ... 2 size - 1."""
    table = torch.cat([torch.eye(size), -torch.eye(size)])
    known = (numbers >= 0) & (numbers < 2 * size)
    return table[numbers.clamp(0, 2 * size - 1)] * known[:, None]


def next_address(size: int) -> torch.Tensor:
    """`(size, size)`: an address times this is the next one's address; behind the last comes the first."""
    table = torch.eye(size).roll(1, dims=1)
    table[-1, 0] = -1
    return table


def lay_reader(
    head: Head, layout: Layout, latent: torch.Tensor, place: int, directions: torch.Tensor, into: slice
) -> None:
    """A head of the encoder's last layer reads one token into each latent.

    Args:
        head: is cleared.
        layout: of both halves.
        latent: `(latent_dims, latent_dims)`, from the tag of a query to the latent whose token it asks for.
        place: of the token there.
        directions: `(len(into), content)`, what is read of its embedding.
        into: where it is written.
    """
    head.clear()
    size, read = layout.latent_dims, len(directions)
    token, query = layout.norm(CONTENT, ADDRESS, ADDRESS), layout.norm(ADDRESS, ADDRESS, QUERY_TAG)
    head.query[layout.tag, :size] = latent / (query * QUERY_TAG)
    head.key[layout.own, :size] = MATCH * layout.root * torch.eye(size) / (token * ADDRESS)
    head.query_bias[size] = 1.0
    head.key[layout.place, size] = MATCH * layout.root * layout.place_address(place) / (token * ADDRESS)
    head.value[: layout.content, :read] = directions.T
    head.out[:read, into] = SLOT / (token * CONTENT * KEPT) * torch.eye(read)


def lay_cue(decoder: nn.Module, layout: Layout, word: int, cue: int, mode: float, number: int) -> None:
    """A head of the first layer reads `word` at the position of the cue, else the sink, and writes the mode."""
    embedding = decoder.wte.weight[word]
    decoder.wpe.weight[cue, layout.mode] = MODE * DIRECTION
    norm, sink = layout.norm(CONTENT, MODE), layout.norm(SINK)
    head = Head(decoder.h[0].attn, layout, number).clear()
    head.query_bias[0] = layout.root
    head.key[:, 0] = WORD * embedding / (norm * CONTENT**2)
    head.key[layout.mode, 0] = POSITION * DIRECTION / (norm * MODE)
    head.key[layout.flag, 0] = -NO_CUE * DIRECTION / (sink * SINK)
    # The sink holds no word, so that nothing is written without the cue.
    head.value[:, 0] = embedding / (norm * CONTENT**2)
    head.out[0, layout.mode] = mode * DIRECTION
