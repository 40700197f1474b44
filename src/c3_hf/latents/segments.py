"""Cut text of any length into segments, each short enough for one block of latents.

Every character of the source belongs to exactly one segment and the segments are in order, so joining them gives the
source back. A cut falls behind a paragraph, else behind a sentence, else in front of white space, else anywhere;
where it falls does not depend on the pieces in which the source came.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from transformers import PreTrainedTokenizerBase

from ..modeling.prompt_c3 import TokenReader, as_reader
from ..options import MIN_SEGMENT_LENGTH


_READ_SIZE = 1 << 16
# From coarse to fine. A cut by the first two falls at the end of the match, by the last at its start: a byte-level
# tokenizer joins a space to the word behind it, and so these cuts fall between tokens.
_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]»]*(?=\s)|[。！？；]+[”’」』）]*|\n")
_SPACE = re.compile(r"\s+")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Undecodable bytes 0x80..0xFF, as Python's "surrogateescape" error handler writes them.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")

Source = str | bytes | os.PathLike | IO | Iterable


@dataclass(frozen=True)
class Segment:
    """A span of text that becomes one block of latents.

    Attributes:
        text: The characters. A byte that is not UTF-8 is one lone surrogate, U+DC80 + (byte - 0x80).
        token_ids: Ids of `text` tokenised by itself, in the vocabulary that it is restored in; such a byte is read as
            U+FFFD.
        encoder_ids: The same in the vocabulary that the encoder reads and segments are measured in. Most models have
            one vocabulary for both.
    """

    text: str
    token_ids: tuple[int, ...]
    encoder_ids: tuple[int, ...] = ()

    @cached_property
    def data(self) -> bytes:
        """The bytes of the source that this segment stands for."""
        return self.text.encode("utf-8", "surrogateescape")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of `data`, 32 bytes."""
        return hashlib.sha256(self.data).digest()


def read_segment(reader: TokenReader, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and character offsets of a segment's text: a byte that is not UTF-8 is read as U+FFFD."""
    return reader.read_plain([_ESCAPED_BYTE.sub("\ufffd", text)])[0]


def iter_text(source: Source) -> Iterator[str]:
    """Yield the text of `source` in pieces.

    Args:
        source: The text itself (`str`, or `bytes` read as UTF-8), a `pathlib.Path`, an open file (text or binary) or
            an iterable of `str` or `bytes` pieces, which may break anywhere, inside a character too.

    Raises:
        TypeError: If a piece is neither `str` nor `bytes`, or `source` is a mapping or a set.
        ValueError: If a `str` has a lone surrogate and hence no UTF-8 form.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for piece in _pieces(source):
        if isinstance(piece, str):
            lone = _SURROGATE.search(piece)
            if lone is not None:
                raise ValueError(
                    f"`source` has the lone surrogate U+{ord(lone.group()):04X}, which is no character and has no "
                    "UTF-8 form; expected valid text. Give undecoded data as bytes."
                )
            # Bytes of a character that a str breaks off stay where they were.
            yield decoder.decode(b"", final=True)
            yield piece
        elif isinstance(piece, (bytes, bytearray, memoryview)):
            yield decoder.decode(bytes(piece))
        else:
            raise TypeError(f"`source` must give str or bytes, got a piece of type {type(piece).__name__}.")
    yield decoder.decode(b"", final=True)


def _pieces(source: Source) -> Iterator[object]:
    if isinstance(source, (str, bytes, bytearray, memoryview)):
        yield source
    elif isinstance(source, os.PathLike):
        with Path(source).open("rb") as file:
            yield from iter(lambda: file.read(_READ_SIZE), b"")
    elif isinstance(source, io.IOBase):
        while piece := source.read(_READ_SIZE):
            yield piece
    elif isinstance(source, Iterable) and not isinstance(source, (Mapping, Set)):
        yield from source
    else:
        raise TypeError(
            "`source` must be str, bytes, a pathlib.Path, an open file or an iterable of pieces in their order, got "
            f"{type(source).__name__}."
        )


def size_of(source: Source) -> int | None:
    """Bytes of the source, where they are known before it is read."""
    if isinstance(source, os.PathLike):
        return Path(source).stat().st_size
    if isinstance(source, str):
        return len(source.encode("utf-8", "surrogatepass"))
    return len(source) if isinstance(source, bytes) else None


def name_of(source: Source) -> str | None:
    """The source file's name for people: bytes of it that are not UTF-8 are U+FFFD."""
    return os.fsencode(Path(source).name).decode(errors="replace") if isinstance(source, os.PathLike) else None


def warn_of_file_name(source: Source) -> None:
    """Warn of a text that is the name of a file, or whose first piece is: its content may be meant."""
    if isinstance(source, (list, tuple)) and source:
        source = source[0]
    # Longer than any path, or no path at all: the question need not reach the file system.
    if not isinstance(source, str) or not 0 < len(source) < 1024 or "\n" in source or "\0" in source:
        return
    if os.path.isfile(source):
        warnings.warn(
            f"`source` {source!r} is compressed as the text it is, and a file of that name exists. To compress the "
            f"file's content write `Path({source!r})`.",
            stacklevel=5,
        )


def refuse_undecoded(segments: Sequence[Segment], position: int) -> None:
    """Raise ValueError if segments hold bytes that are not UTF-8; `position` is the first's byte in the source."""
    for segment in segments:
        try:
            segment.data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`source` is not UTF-8 at byte {position + error.start:,}. Convert it first, or use `exact=True`, "
                "which keeps any bytes."
            ) from error
        position += len(segment.data)


def refuse_source_as_output(source: Source, output: str | os.PathLike, *beside: str) -> None:
    """Raise ValueError if the source is the output, or a file that lies beside it, with one of the suffixes `beside`,
    while it is made: its text would be lost."""
    file = source if isinstance(source, os.PathLike) else None
    if hasattr(source, "fileno"):
        # Of a file in memory there is no number.
        with contextlib.suppress(OSError):
            file = source.fileno()
    if file is None or not os.path.exists(file):
        return
    place = os.path.realpath(output)
    for name in (output, *(place + suffix for suffix in beside)):
        if os.path.exists(name) and os.path.samefile(file, name):
            raise ValueError(
                f"`output`: {os.fspath(name)} and `source` are one file, whose text would be lost. Give another name."
            )


class TextReader:
    """Look ahead in a stream of text pieces without holding more of it than is looked at."""

    def __init__(self, source: Source):
        self._pieces = iter_text(source)
        self._buffer = ""
        self._start = 0

    def peek(self, size: int) -> str:
        """The next `size` characters, fewer only at the end."""
        missing = size - (len(self._buffer) - self._start)
        if missing > 0:
            parts = [self._buffer[self._start :]]
            while missing > 0 and (piece := next(self._pieces, None)) is not None:
                parts.append(piece)
                missing -= len(piece)
            self._buffer, self._start = "".join(parts), 0
        return self._buffer[self._start : self._start + size]

    def take(self, size: int) -> str:
        """Like `peek`, and move on behind them."""
        text = self.peek(size)
        self._start += len(text)
        return text


def iter_segments(
    source: Source | TextReader, tokenizer: PreTrainedTokenizerBase | TokenReader, segment_length: int
) -> Iterator[Segment]:
    """Cut `source` into segments of at most `segment_length` tokens, filled at least to half where text follows.

    Args:
        source: See [`iter_text`], or a reader that is already under way.
        tokenizer: The encoder's, a fast one (its character offsets are needed), or its reader, which saves a copy of
            it. The ids are its ids.
        segment_length: Most tokens of a segment, at least 16.

    Raises:
        ValueError: If `segment_length` is too small or the tokenizer is not a fast one.
    """
    if segment_length < MIN_SEGMENT_LENGTH:
        raise ValueError(
            f"`segment_length` must be at least {MIN_SEGMENT_LENGTH} tokens (one character can take 12), "
            f"got {segment_length}."
        )
    if not isinstance(tokenizer, TokenReader) and not tokenizer.is_fast:
        raise ValueError(
            f"`tokenizer` must be a fast tokenizer, which knows character offsets, got {type(tokenizer).__name__}."
        )
    reader = source if isinstance(source, TextReader) else TextReader(source)
    tokens = as_reader(tokenizer)
    while window := _token_window(reader, tokens, segment_length):
        text, token_ids = _first_segment(*window, tokens, segment_length)
        yield Segment(reader.take(len(text)), tuple(token_ids), tuple(token_ids))


def _token_window(
    reader: TextReader, tokens: TokenReader, segment_length: int
) -> tuple[str, list[int], list[tuple[int, int]]] | None:
    """Text ahead with more than `segment_length` tokens, or all that is left, with its ids and offsets."""
    size = 3 * segment_length
    while True:
        text = reader.peek(size)
        if not text:
            return None
        token_ids, offsets = read_segment(tokens, text)
        if len(text) < size or len(token_ids) > segment_length + 8:
            return text, token_ids, offsets
        size *= 2


def _first_segment(
    text: str,
    token_ids: list[int],
    offsets: list[tuple[int, int]],
    tokens: TokenReader,
    segment_length: int,
) -> tuple[str, list[int]]:
    """The longest well-cut start of `text` that has at most `segment_length` tokens when tokenised by itself."""
    if len(token_ids) <= segment_length:
        return text, token_ids
    budget, limit = segment_length, len(text)
    while True:
        limit = max(1, min(offsets[budget][0], limit))
        cut = find_cut(text, limit)
        token_ids, _ = read_segment(tokens, text[:cut])
        excess = len(token_ids) - segment_length
        if excess <= 0:
            return text[:cut], token_ids
        budget, limit = max(0, budget - excess), cut - 1


def find_cut(text: str, limit: int) -> int:
    """Where to end a segment that starts at 0 and may have `limit` characters: a position in 1..`limit`.

    Natural boundaries count only in the second half, so that no segment wastes more than half of its latents.
    """
    half = limit // 2
    for pattern in (_PARAGRAPH, _SENTENCE):
        ends = [match.end() for match in pattern.finditer(text, half, limit)]
        if ends:
            return ends[-1]
    starts = [match.start() for match in _SPACE.finditer(text, half, limit + 1) if match.start() > 0]
    if starts and starts[-1] <= limit:
        return starts[-1]
    cut = limit
    # A combining mark stays with its base where that costs little: normalisation looks at both.
    while cut > max(half, 1) and cut < len(text) and unicodedata.combining(text[cut]):
        cut -= 1
    return cut
