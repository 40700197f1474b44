"""Byte-exact mode: what a segment's latents do not bring back, in a few bytes that are tried before they are trusted.

Forced tokens and byte edits, or the bytes themselves. The record of one segment is empty where nothing is missing.
Else it starts with a byte for its kind; all numbers are unsigned LEB128 varints:

    0  corrections   count, then per correction: positions skipped since the last one, token id;
                     count, then per edit: bytes copied since the last edit, bytes dropped, bytes inserted, those bytes
    1  stored        the bytes
    2  deflated      the bytes as a zlib stream

Edits turn the UTF-8 bytes of the decoded tokens into the bytes of the source. They are needed where tokenising does
not keep the text: Unicode normalisation, bytes that are not UTF-8.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decoding import Restorer, decode_tokens
from .segments import Segment


# Logit margins below which another batch size, device or kernel may decide otherwise; a wide berth is cheap.
# benchmarks/latents_exact.py measures how far margins move between batch sizes.
EXACT_MARGINS = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.1}

CORRECTIONS, STORED, DEFLATED = 0, 1, 2

# Bytes that must agree for two texts to count as being in step again, and how far apart that may happen.
_RESYNC_LENGTH = 6
_RESYNC_REACH = 48
# How far apart characters of two texts may be to count as the same.
_CHARACTER_REACH = 16


@dataclass(frozen=True)
class Edit:
    """Copy `skip` bytes, drop the next `drop`, put `insert` there."""

    skip: int
    drop: int
    insert: bytes


@dataclass(frozen=True)
class Residual:
    """What restoring one segment needs beside its latents.

    Attributes:
        corrections: Token ids to force while generating, by position (0 is the first generated token).
        edits: Changes from the decoded tokens' bytes to the source's bytes.
        stored: The source's bytes; where given, latents and the rest are not needed.
    """

    corrections: tuple[tuple[int, int], ...] = ()
    edits: tuple[Edit, ...] = ()
    stored: bytes | None = None

    def encode(self) -> bytes:
        """The record described at the top of this module."""
        if self.stored is not None:
            deflated = zlib.compress(self.stored, 9)
            if len(deflated) < len(self.stored):
                return bytes([DEFLATED]) + deflated
            return bytes([STORED]) + self.stored
        if not self.corrections and not self.edits:
            return b""
        out = bytearray([CORRECTIONS])
        _write_varint(out, len(self.corrections))
        expected = 0
        for position, token_id in self.corrections:
            _write_varint(out, position - expected)
            _write_varint(out, token_id)
            expected = position + 1
        _write_varint(out, len(self.edits))
        for edit in self.edits:
            _write_varint(out, edit.skip)
            _write_varint(out, edit.drop)
            _write_varint(out, len(edit.insert))
            out += edit.insert
        return bytes(out)

    @classmethod
    def decode(cls, record: bytes, num_tokens: int, num_bytes: int) -> Residual:
        """Read a record back.

        Args:
            record: What [`encode`] gave.
            num_tokens: Tokens of the segment; corrections lie within.
            num_bytes: Bytes of the segment; stored ones are as many.

        Raises:
            ValueError: If `record` is not one of such a segment, whole and with nothing behind it.
        """
        if not record:
            return cls()
        kind = record[0]
        if kind in (STORED, DEFLATED):
            stored = record[1:] if kind == STORED else _inflate(record[1:], num_bytes)
            if len(stored) != num_bytes:
                raise ValueError(f"`record` stores other than the {num_bytes} bytes of its segment.")
            return cls(stored=stored)
        if kind != CORRECTIONS:
            raise ValueError(f"`record` must start with a kind byte 0, 1 or 2, got {kind}.")
        stream = io.BytesIO(record)
        stream.seek(1)
        corrections, expected = [], 0
        for _ in range(_read_varint(stream)):
            position = expected + _read_varint(stream)
            if position >= num_tokens:
                raise ValueError(f"`record` corrects token {position} of a segment of {num_tokens}.")
            corrections.append((position, _read_varint(stream)))
            expected = position + 1
        edits = []
        for _ in range(_read_varint(stream)):
            skip, drop, size = (_read_varint(stream) for _ in range(3))
            edits.append(Edit(skip, drop, _take(stream, size)))
        if rest := stream.read():
            raise ValueError(f"`record` has {len(rest)} bytes behind its end.")
        return cls(tuple(corrections), tuple(edits))


def find_edits(decoded: bytes, wanted: bytes) -> tuple[Edit, ...] | None:
    """Local edits that turn `decoded` into `wanted`; `None` where the two lose step for more than 48 bytes."""
    edits: list[Edit] = []
    i = j = copied = 0
    while True:
        same = _common_prefix(decoded, wanted, i, j)
        i, j, copied = i + same, j + same, copied + same
        if i == len(decoded) and j == len(wanted):
            return tuple(edits)
        step = _resync(decoded, wanted, i, j, _RESYNC_LENGTH, _RESYNC_REACH)
        if step is None:
            return None
        drop, size = step
        edits.append(Edit(copied, drop, wanted[j : j + size]))
        i, j, copied = i + drop, j + size, 0


def apply_edits(decoded: bytes, edits: Sequence[Edit]) -> bytes:
    """The inverse of [`find_edits`].

    Raises:
        ValueError: If an edit lies behind the end of `decoded`.
    """
    out, position = bytearray(), 0
    for edit in edits:
        end = position + edit.skip
        if end + edit.drop > len(decoded):
            raise ValueError(
                f"`edits` reach byte {end + edit.drop} of a text of {len(decoded)} bytes; they belong to another text."
            )
        out += decoded[position:end] + edit.insert
        position = end + edit.drop
    return bytes(out + decoded[position:])


def lost_characters(decoded: str, wanted: str) -> list[int]:
    """Positions of `wanted` that `decoded` does not give, at each difference by the nearest way to go on.

    These are the characters that are not there, and where `decoded` has one too many the one behind it, or at the end
    the last: both texts are the same if and only if nothing is lost.
    """
    lost: set[int] = set()
    i = j = 0
    while True:
        same = _common_prefix(decoded, wanted, i, j)
        i, j = i + same, j + same
        if i == len(decoded) and j == len(wanted):
            return sorted(lost)
        drop, size = _resync(decoded, wanted, i, j, 1, _CHARACTER_REACH) or (1, 1)
        lost |= {*range(j, min(j + size, len(wanted)))} or {min(j, len(wanted) - 1)}
        i, j = min(i + drop, len(decoded)), min(j + size, len(wanted))


@dataclass
class ExactCounts:
    """How often each part of the promise was needed, in segments unless it says tokens.

    Attributes:
        segments: All of them.
        wrong_tokens: Tokens whose greedy choice is wrong.
        near_tokens: Tokens corrected although right, because their margin is small.
        edited: Segments whose tokens do not keep the text, so that bytes are edited.
        stored_unreadable: Stored as bytes because edits could not express the difference.
        stored_smaller: Stored as bytes because that takes fewer of them than the corrections.
        stored_failed: Stored as bytes because the actual restore went wrong.
        residual_bytes: Size of all records.
    """

    segments: int = 0
    wrong_tokens: int = 0
    near_tokens: int = 0
    edited: int = 0
    stored_unreadable: int = 0
    stored_smaller: int = 0
    stored_failed: int = 0
    residual_bytes: int = 0


def build_residual(
    restorer: Restorer, segment: Segment, margins: torch.Tensor, threshold: float, counts: ExactCounts
) -> Residual:
    """What the latents of `segment` do not bring back, in the fewest bytes known.

    Args:
        margins: `(num_tokens + 1,)` float32, see [`measure_margins`].
        threshold: A token with a smaller margin is corrected, right or wrong.
        counts: Updated.
    """
    stored = Residual(stored=segment.data)
    edits = find_edits(decode_tokens(restorer.processor, segment.token_ids).encode(), segment.data)
    if edits is None:
        counts.stored_unreadable += 1
        return stored
    # Not "< threshold": a NaN margin must be corrected too.
    positions = (~(margins[:-1] >= threshold)).nonzero().flatten().tolist()
    residual = Residual(tuple((position, segment.token_ids[position]) for position in positions), edits)
    if len(residual.encode()) >= len(stored.encode()):
        counts.stored_smaller += 1
        return stored
    wrong = int((~(margins[:-1] > 0)).sum())
    counts.wrong_tokens += wrong
    counts.near_tokens += len(positions) - wrong
    counts.edited += bool(edits)
    return residual


def restore_bytes(
    restorer: Restorer,
    latents: torch.Tensor,
    strides: torch.LongTensor | None,
    residuals: Sequence[Residual],
    lengths: Sequence[int],
) -> list[bytes]:
    """Generate segments with their corrections forced, and edit the result.

    Args:
        latents, strides: What [`Restorer.generate`] takes.
        residuals: One for each row, none of them stored.
        lengths: Tokens of each row.

    Returns:
        The bytes of each row, not yet compared with anything.
    """
    corrections = [residual.corrections for residual in residuals]
    sequences = restorer.generate(latents, max(lengths) + 1, strides, corrections, lengths)
    texts = [decode_tokens(restorer.processor, sequence).encode() for sequence in sequences]
    return [_edited(text, residual) for text, residual in zip(texts, residuals)]


def keep_what_restores(
    restorer: Restorer,
    latents: torch.Tensor,
    strides: torch.LongTensor | None,
    segments: Sequence[Segment],
    residuals: list[Residual],
    counts: ExactCounts,
) -> None:
    """Restore a batch of segments in earnest and replace each residual that fails by the stored bytes.

    Args:
        latents, strides: What [`Restorer.generate`] takes.
        residuals: Their residuals; changed in place.
        counts: Updated.
    """
    rows = [row for row, residual in enumerate(residuals) if residual.stored is None]
    if not rows:
        return
    lengths = [len(segments[row].token_ids) for row in rows]
    restored = restore_bytes(
        restorer, latents[rows], None if strides is None else strides[rows], [residuals[row] for row in rows], lengths
    )
    for row, data in zip(rows, restored):
        if data != segments[row].data:
            counts.stored_failed += 1
            residuals[row] = Residual(stored=segments[row].data)


def _edited(text: bytes, residual: Residual) -> bytes:
    try:
        return apply_edits(text, residual.edits)
    except ValueError:
        # The edits reach behind a text that came out too short; the digest tells the caller that it is wrong.
        return text


def _common_prefix(a: bytes | str, b: bytes | str, i: int, j: int) -> int:
    length, size = 0, 4096
    while size:
        while a[i + length : i + length + size] == b[j + length : j + length + size]:
            step = min(size, len(a) - i - length, len(b) - j - length)
            if step <= 0:
                return length
            length += step
        size //= 2
    return length


def _resync(a: bytes | str, b: bytes | str, i: int, j: int, length: int, reach: int) -> tuple[int, int] | None:
    """Least (to drop from `a`, to insert from `b`) after which both agree for `length` or end together."""
    for total in range(1, 2 * reach + 1):
        for drop in range(max(0, total - reach), min(total, reach) + 1):
            x, y = i + drop, j + total - drop
            if x > len(a) or y > len(b):
                continue
            left, right = a[x : x + length], b[y : y + length]
            at_end = x + len(left) == len(a) and y + len(right) == len(b)
            if left == right and (len(left) == length or at_end):
                return drop, total - drop
    return None


def _inflate(stream: bytes, size: int) -> bytes:
    """What a zlib stream holds, a byte more than `size` at most: one of a megabyte can claim a gigabyte."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(stream, size + 1)
    except (zlib.error, OverflowError) as error:
        raise ValueError(f"`record` holds a broken zlib stream: {error}.") from error
    if len(data) <= size and not (inflater.eof and not inflater.unused_data):
        raise ValueError("`record` holds a broken zlib stream: it is cut short or goes on behind its end.")
    return data


def _write_varint(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _take(stream: io.BytesIO, size: int) -> bytes:
    # A number of 64 bits can be more than a stream takes.
    piece = stream.read(min(size, stream.getbuffer().nbytes))
    if len(piece) < size:
        raise ValueError(f"`record` ends at byte {stream.tell()}, in the middle of a field.")
    return piece


def _read_varint(stream: io.BytesIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = _take(stream, 1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("`record` has a number of more than 64 bits.")
