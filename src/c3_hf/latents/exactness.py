"""Byte-exact mode: corrections that are enough for the very bytes to come back, tried out before they are trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .residual import Residual, apply_edits, find_edits
from .restoring import Restorer, decode_tokens
from .segmentation import Segment


# Logit margins below which another batch size, device or kernel may decide otherwise; a wide berth is cheap.
# benchmarks/latents_exact.py measures how far margins move between batch sizes.
EXACT_MARGINS = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.1}


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
        restorer: The model and its restoring prompt.
        segment: The segment.
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
    restorer: Restorer, latents: torch.Tensor, residuals: Sequence[Residual], lengths: Sequence[int]
) -> list[bytes]:
    """Generate segments with their corrections forced, and edit the result.

    Args:
        restorer: The model and its restoring prompt.
        latents: `(batch_size, num_latents, text_hidden_size)`.
        residuals: One for each row, none of them stored.
        lengths: Tokens of each row.

    Returns:
        The bytes of each row, not yet compared with anything.
    """
    corrections = [residual.corrections for residual in residuals]
    sequences = restorer.generate(latents.unsqueeze(1), max(lengths) + 1, corrections, lengths)
    texts = [decode_tokens(restorer.processor, sequence).encode() for sequence in sequences]
    return [_edited(text, residual) for text, residual in zip(texts, residuals)]


def keep_what_restores(
    restorer: Restorer,
    latents: torch.Tensor,
    segments: Sequence[Segment],
    residuals: list[Residual],
    counts: ExactCounts,
) -> None:
    """Restore a batch of segments in earnest and replace each residual that fails by the stored bytes.

    Args:
        restorer: The model and its restoring prompt.
        latents: `(batch_size, num_latents, text_hidden_size)`.
        segments: The segments of the batch.
        residuals: Their residuals; changed in place.
        counts: Updated.
    """
    rows = [row for row, residual in enumerate(residuals) if residual.stored is None]
    if not rows:
        return
    lengths = [len(segments[row].token_ids) for row in rows]
    restored = restore_bytes(restorer, latents[rows], [residuals[row] for row in rows], lengths)
    for row, data in zip(rows, restored):
        if data != segments[row].data:
            counts.stored_failed += 1
            residuals[row] = Residual(stored=segments[row].data)


def matches(data: bytes, digest: torch.Tensor) -> bool:
    """Whether `data` has the SHA-256 `digest`, `(32,)` uint8."""
    return hashlib.sha256(data).digest() == bytes(digest.tolist())


def _edited(text: bytes, residual: Residual) -> bytes:
    try:
        return apply_edits(text, residual.edits)
    except ValueError:
        # The edits reach behind a text that came out too short; the digest tells the caller that it is wrong.
        return text
