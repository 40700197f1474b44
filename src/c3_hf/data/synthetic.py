"""Kinds of text for the restoring task, so that restoring cannot be guessed from the language alone.

A kind is a function of a `Draw`; it returns text of roughly the asked length or more, which the caller cuts.
`TEXT_KINDS` names those a recipe can mix.
"""

from __future__ import annotations

import base64
import re
import string
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..modeling.prompt_c3 import TokenReader, as_reader


_IDENTIFIERS = (
    "data index value result count total name path line text key item node left right size width first last start end "
    "offset buffer token self other args config state error message parent child cache batch order user row column"
).split()
_VERBS = "get set load save read write find make update check parse build add remove open close merge split".split()


@dataclass(frozen=True)
class Draw:
    """What a kind of text is made from.

    Attributes:
        rng: source of all randomness.
        passage: real text of about `num_tokens` tokens.
        num_tokens: length wanted, in tokens.
        tokenizer: the tokenizer that counts them, or its reader.
    """

    rng: np.random.Generator
    passage: str
    num_tokens: int
    tokenizer: PreTrainedTokenizerBase | TokenReader


def plain(draw: Draw) -> str:
    """The passage as it is."""
    return draw.passage


def shuffled_words(draw: Draw) -> str:
    """The words of the passage (characters where it has no spaces) in random order, joined by single spaces."""
    words = draw.passage.split()
    if len(words) * 12 < len(draw.passage):
        return "".join(draw.rng.permutation(list(draw.passage)))
    return " ".join(words[index] for index in draw.rng.permutation(len(words)))


def shuffled_tokens(draw: Draw) -> str:
    """The tokens of the passage in random order; tokens that are no whole characters are left out."""
    reader = as_reader(draw.tokenizer)
    ids = reader.read_plain([draw.passage])[0][0]
    return reader.tokenizer.decode(draw.rng.permutation(ids[: draw.num_tokens])).replace("\ufffd", "")


def random_tokens(draw: Draw) -> str:
    """Tokens drawn evenly from the vocabulary without its special tokens (which have the highest ids)."""
    tokenizer = as_reader(draw.tokenizer).tokenizer
    first_special = min(tokenizer.added_tokens_decoder)
    return tokenizer.decode(draw.rng.integers(0, first_special, draw.num_tokens + 8)).replace("\ufffd", "")


def digits(draw: Draw) -> str:
    """Random digits, in groups of 1 to 12 with a separator, or without any."""
    separator = str(draw.rng.choice(["", " ", ", ", "\n", "-", "."]))
    raw = "".join(str(digit) for digit in draw.rng.integers(0, 10, draw.num_tokens + 1))
    return separator.join(_groups(draw.rng, raw, 1, 13)) if separator else raw


def hexadecimal(draw: Draw) -> str:
    """Random bytes as hexadecimal digits, or random UUIDs, one a line."""
    raw = draw.rng.bytes(draw.num_tokens + 16)
    if draw.rng.random() < 0.5:
        return raw.hex()
    return "\n".join(str(uuid.UUID(bytes=raw[start : start + 16])) for start in range(0, len(raw) - 15, 16))


def base64_text(draw: Draw) -> str:
    """Random bytes in base64."""
    return base64.b64encode(draw.rng.bytes(2 * draw.num_tokens + 8)).decode("ascii")


def letters(draw: Draw) -> str:
    """Random letters: lower case or mixed, from a small or the whole alphabet, with or without spaces."""
    alphabet = string.ascii_lowercase if draw.rng.random() < 0.6 else string.ascii_letters + string.digits
    if draw.rng.random() < 0.2:
        alphabet = "".join(draw.rng.choice(list(alphabet), 2, replace=False))
    raw = "".join(draw.rng.choice(list(alphabet), 3 * draw.num_tokens + 8))
    return " ".join(_groups(draw.rng, raw, 1, 9)) if draw.rng.random() < 0.5 else raw


def punctuation(draw: Draw) -> str:
    """Random printable ASCII: letters, digits, punctuation and blanks."""
    return "".join(draw.rng.choice(list(string.printable[:95] + "\n\t"), 2 * draw.num_tokens + 8))


def code_like(draw: Draw) -> str:
    """Indented statements over random identifiers and numbers, in the look of Python, C or JSON."""
    lines, length, style = [], 0, int(draw.rng.integers(3))
    while length < 4 * draw.num_tokens:
        lines.append(_statement(draw.rng, style))
        length += len(lines[-1])
    return "\n".join(lines)


def table_like(draw: Draw) -> str:
    """Rows of words and numbers, separated by commas, tabs or bars."""
    separator = str(draw.rng.choice([",", "\t", " | "]))
    words = [word for word in re.findall(r"\w+", draw.passage) if len(word) < 16] or list(_IDENTIFIERS)
    columns, rows, length = int(draw.rng.integers(2, 6)), [], 0
    while length < 4 * draw.num_tokens:
        numbers = [
            f"{draw.rng.uniform(0, 10 ** draw.rng.integers(1, 6)):.{draw.rng.integers(0, 3)}f}"
            for _ in range(columns - 1)
        ]
        rows.append(separator.join([str(draw.rng.choice(words)), *numbers]))
        length += len(rows[-1])
    return "\n".join(rows)


def _statement(rng: np.random.Generator, style: int) -> str:
    first, second, third = (str(word) for word in rng.choice(_IDENTIFIERS, 3))
    verb, number, indent = str(rng.choice(_VERBS)), int(rng.integers(10 ** int(rng.integers(1, 5)))), "    "
    indent *= int(rng.integers(4))
    forms = (
        (
            f"{first} = {second}.{verb}_{third}({number})",
            f"if {first} < {number}:",
            f"for {first} in range({number}):",
            f"return {first}[{second}] + {number}",
            f"def {verb}_{first}({second}, {third}={number}):",
        ),
        (
            f"int {first} = {verb}_{second}({third}, {number});",
            f"if ({first}->{second} != {number}) {{",
            "}",
            f"{first}[{number}] = {second} + {third};",
            f"/* {verb} the {first} of the {second} */",
        ),
        (
            f'"{first}_{second}": {number},',
            f'"{first}": "{verb} {third}",',
            f'"{first}": {{',
            "},",
            f'["{first}", {number}],',
        ),
    )[style]
    return indent + forms[int(rng.integers(len(forms)))]


def _groups(rng: np.random.Generator, raw: str, low: int, high: int) -> list[str]:
    groups, start = [], 0
    while start < len(raw):
        size = int(rng.integers(low, high))
        groups.append(raw[start : start + size])
        start += size
    return groups


TEXT_KINDS: Mapping[str, Callable[[Draw], str]] = MappingProxyType(
    {
        "plain": plain,
        "shuffled_words": shuffled_words,
        "shuffled_tokens": shuffled_tokens,
        "random_tokens": random_tokens,
        "digits": digits,
        "hexadecimal": hexadecimal,
        "base64": base64_text,
        "letters": letters,
        "punctuation": punctuation,
        "code_like": code_like,
        "table_like": table_like,
    }
)
