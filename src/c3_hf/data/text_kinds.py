"""Kinds of text to restore, made of real text, of the vocabulary or of chance.

A kind, named by `TEXT_KINDS`, is a function of a `Draw`; it returns text of roughly the asked length or more, which
the caller cuts. Kinds beside plain text are there so that the text cannot be guessed from the language alone.
"""

from __future__ import annotations

import base64
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..modeling.prompt_c3 import DEFAULT_SYSTEM_PROMPT, RESTORE_PROMPT, TokenReader, as_reader
from .tasks import CONTINUE_PROMPT, FIND_PROMPT


# First and last code points: most of these letters and signs are several tokens of a small vocabulary, which has bytes
# for them that other text hardly shows. Every first byte of two to four is among them: one that was never shown to a
# model it gives back as another, wherever it stands.
_SCRIPTS = (
    (0x00A1, 0x024F),  # Latin with marks
    (0x0250, 0x02FF),  # phonetic letters
    (0x0300, 0x036F),  # marks by themselves
    (0x0391, 0x03C9),  # Greek
    (0x0400, 0x052F),  # Cyrillic
    (0x0531, 0x0587),  # Armenian
    (0x05D0, 0x05EA),  # Hebrew
    (0x0621, 0x06D3),  # Arabic
    (0x0710, 0x07EA),  # Syriac, Thaana, N'Ko
    (0x0904, 0x0939),  # Devanagari
    (0x0E01, 0x0E2E),  # Thai
    (0x10D0, 0x10F0),  # Georgian
    (0x2010, 0x2BFF),  # punctuation, arrows, mathematics, boxes, signs
    (0x3041, 0x30FE),  # kana
    (0x3400, 0x4DBF),  # rare Han
    (0x4E00, 0x9FFF),  # Han
    (0xA000, 0xA48C),  # Yi
    (0xAC00, 0xD7A3),  # Hangul
    (0xFF01, 0xFFFD),  # full and half width
    (0x1D400, 0x1D6A3),  # letters of mathematics
    (0x1F300, 0x1FAFF),  # emoji
    (0x20000, 0x2A6DF),  # rarer Han
)


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
    """Tokens drawn evenly from the vocabulary."""
    ids = _vocabulary_ids(draw, draw.num_tokens + 8)
    return as_reader(draw.tokenizer).tokenizer.decode(ids).replace("\ufffd", "")


def few_tokens(draw: Draw) -> str:
    """Tokens drawn evenly from the vocabulary, of which 1 to 64 make up three tenths of the text to all of it.

    What a token that a latent holds several times adds to the reading of the latent's other places does not cancel
    out, as it nearly does between tokens that all differ.
    """
    words = _random_words(draw)
    few = words[: int(2 ** draw.rng.uniform(0, 6))]
    return _strewn(draw.rng, words, few, min(1.0, draw.rng.uniform(0.3, 1.7)))


def prompt_words(draw: Draw) -> str:
    """Tokens drawn evenly from the vocabulary, and between them, a twentieth of the text to half of it, those that
    prompts are made of.

    A decoder learns from the words of a prompt what it is asked for, and then stops or goes on as they say where they
    stand in the text it gives back.
    """
    reader = as_reader(draw.tokenizer)
    prompts = [DEFAULT_SYSTEM_PROMPT, RESTORE_PROMPT, CONTINUE_PROMPT, FIND_PROMPT]
    ids = np.concatenate([ids for ids, _ in reader.read_plain(prompts)])
    of_prompts = np.array(reader.tokenizer.batch_decode(ids[:, None]), dtype=object)
    return _strewn(draw.rng, _random_words(draw), of_prompts, draw.rng.uniform(0.05, 0.5))


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


def scripts(draw: Draw) -> str:
    """Words of random characters of `_SCRIPTS`: all words of one script, or each of another."""
    one = draw.rng.random() < 0.5
    words, length, (first, last) = [], 0, draw.rng.choice(_SCRIPTS)
    while length <= draw.num_tokens:
        if not one:
            first, last = draw.rng.choice(_SCRIPTS)
        words.append("".join(map(chr, draw.rng.integers(first, last + 1, draw.rng.integers(1, 11)))))
        length += len(words[-1])
    return " ".join(words)


def code_like(draw: Draw) -> str:
    """Indented statements, comments and entries in the look of Python, C or JSON, or lines that share one random form.

    Names and the words of comments come from all of the vocabulary, other ones in each text: names that return from
    text to text become what a model expects of code, and it reads them where others stand.
    """
    drawn = [word.strip() for word in _vocabulary_words(draw, 256)]
    words = np.array([word for word in drawn if word.isalnum()] or list(string.ascii_lowercase), dtype=object)
    names = np.array([_name(draw.rng, words) for _ in range(int(draw.rng.integers(6, 64)))], dtype=object)
    style = int(draw.rng.integers(4))
    line = partial(_statement, style) if style < 3 else partial(_record, _record_form(draw.rng, names))
    lines, length = [], 0
    while length < 3 * draw.num_tokens:
        lines.append(line(draw.rng, names, words))
        length += len(lines[-1])
    return "\n".join(lines)


def table_like(draw: Draw) -> str:
    """Rows of words and numbers, separated by commas, tabs or bars."""
    separator = str(draw.rng.choice([",", "\t", " | "]))
    words = [word for word in re.findall(r"\w+", draw.passage) if len(word) < 16] or list(string.ascii_lowercase)
    columns, rows, length = int(draw.rng.integers(2, 6)), [], 0
    while length < 4 * draw.num_tokens:
        numbers = [
            f"{draw.rng.uniform(0, 10 ** draw.rng.integers(1, 6)):.{draw.rng.integers(0, 3)}f}"
            for _ in range(columns - 1)
        ]
        rows.append(separator.join([str(draw.rng.choice(words)), *numbers]))
        length += len(rows[-1])
    return "\n".join(rows)


def _vocabulary_ids(draw: Draw, count: int) -> np.ndarray:
    """`count` ids drawn evenly from the vocabulary without its special tokens, which have the highest ids."""
    return draw.rng.integers(0, min(as_reader(draw.tokenizer).tokenizer.added_tokens_decoder), count)


def _vocabulary_words(draw: Draw, count: int) -> list[str]:
    """`count` tokens drawn evenly from the vocabulary, without those that are no whole characters."""
    decoded = as_reader(draw.tokenizer).tokenizer.batch_decode(_vocabulary_ids(draw, count)[:, None])
    return [word for word in decoded if "\ufffd" not in word]


def _random_words(draw: Draw) -> np.ndarray:
    """Tokens as of [`_vocabulary_words`], twice as many as are wanted: others join when they are read again."""
    return np.array(_vocabulary_words(draw, 2 * draw.num_tokens + 256), dtype=object)


def _strewn(rng: np.random.Generator, words: np.ndarray, often: np.ndarray, share: float) -> str:
    """The words as a text, a share of them replaced by any of `often`."""
    return "".join(np.where(rng.random(len(words)) < share, rng.choice(often, len(words)), words))


def _name(rng: np.random.Generator, words: np.ndarray) -> str:
    parts = rng.choice(words, int(rng.integers(1, 4)))
    style = int(rng.integers(4))
    if style == 0:
        return "".join([parts[0], *(part.capitalize() for part in parts[1:])])
    name = "_".join(parts)
    return name.upper() if style == 1 else name


def _phrase(rng: np.random.Generator, words: np.ndarray) -> str:
    return " ".join(rng.choice(words, int(rng.integers(2, 9))))


def _record_form(rng: np.random.Generator, names: np.ndarray) -> list[str | None]:
    """What stays the same from record to record, and None where something else stands in each."""
    signs = list(string.punctuation + "    ")
    form: list[str | None] = []
    for _ in range(int(rng.integers(2, 8))):
        word = str(rng.choice(names)) if rng.random() < 0.5 else "".join(rng.choice(signs, int(rng.integers(1, 4))))
        form += [word, None]
    return form


def _record(form: Sequence[str | None], rng: np.random.Generator, names: np.ndarray, words: np.ndarray) -> str:
    def filling() -> str:
        kind = int(rng.integers(4))
        if kind == 0:
            return str(rng.choice(names))
        return _phrase(rng, words) if kind == 1 else _number(rng)

    return "".join(filling() if part is None else part for part in form)


def _number(rng: np.random.Generator) -> str:
    return str(int(rng.integers(10 ** int(rng.integers(1, 7)))))


def _statement(style: int, rng: np.random.Generator, names: np.ndarray, words: np.ndarray) -> str:
    first, second, third = (str(name) for name in rng.choice(names, 3))
    number, phrase, indent = _number(rng), _phrase(rng, words), "    " * int(rng.integers(4))
    forms = (
        (
            f"{first} = {second}.{third}({number})",
            f"if {first} < {number}:",
            f"for {first} in range({number}):",
            f"return {first}[{second}] + {number}",
            f"def {first}({second}, {third}={number}):",
            f"# {phrase}",
            "",
        ),
        (
            f"int {first} = {second}({third}, {number});",
            f"if ({first}->{second} != {number}) {{",
            "}",
            f"{first}[{number}] = {second} + {third};",
            f"/* {phrase} */",
            f"#define {first} {number}",
        ),
        (
            f'"{first}": {number},',
            f'"{first}": "{phrase}",',
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
        "few_tokens": few_tokens,
        "prompt_words": prompt_words,
        "digits": digits,
        "hexadecimal": hexadecimal,
        "base64": base64_text,
        "letters": letters,
        "punctuation": punctuation,
        "scripts": scripts,
        "code_like": code_like,
        "table_like": table_like,
    }
)
