"""Choose segment lengths so that every segment reaches a target fidelity with as few latents as that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from .fidelity import SegmentFidelity
from .segmentation import Segment, Source


# By how much the next length to try is shorter, at least and at most.
_SMALLEST_STEP, _LARGEST_STEP = 0.8, 0.5


@dataclass(frozen=True)
class MeasuredSegment:
    """A segment with its latents as they are stored.

    Attributes:
        segment: The text.
        latents: `(num_latents, hidden_size)` in the stored dtype.
        scales: `(num_latents,)` float32 for int8 latents, else `None`.
        margins: `(num_tokens + 1,)` float32; `None` if no fidelity was asked for.
    """

    segment: Segment
    latents: torch.Tensor
    scales: torch.Tensor | None
    margins: torch.Tensor | None

    @cached_property
    def fidelity(self) -> SegmentFidelity | None:
        """What the margins say."""
        return None if self.margins is None else SegmentFidelity.from_margins(self.margins)

    @property
    def token_accuracy(self) -> float:
        """Share of right positions, 0 to 1; 1 where nothing was measured."""
        return 1.0 if self.fidelity is None else self.fidelity.token_accuracy

    @property
    def num_errors(self) -> int:
        """Number of wrong positions."""
        return 0 if self.fidelity is None else self.fidelity.num_errors

    def reach(self, target: float) -> int:
        """Encoder tokens at the start that reach the target when taken by themselves: errors gather at the end."""
        length = len(self.segment.encoder_ids)
        if self.margins is None:
            return length
        right = (self.margins[:-1] > 0).double().cumsum(0)
        good = (right >= target * torch.arange(1, len(right) + 1)).nonzero().flatten()
        return (int(good[-1]) + 1) * length // len(right) if len(good) else 0


Measure = Callable[[Sequence[Segment]], list[MeasuredSegment]]
Cut = Callable[[Source, int], Iterator[Segment]]


@dataclass(frozen=True)
class _Recut:
    """Neighbours that miss the target, and what their text was cut into instead."""

    before: list[MeasuredSegment]
    after: list


def fit_segments(
    segments: Sequence[Segment],
    measure: Measure,
    cut: Cut,
    *,
    target: float,
    shortest: int,
) -> list[MeasuredSegment]:
    """Measure segments; cut those that miss the target anew, shorter, until they reach it or are as short as may be.

    Neighbours that miss it are joined and cut together anew, as long as the start of each was good, but
    by a factor of 0.5 to 0.8 shorter than before. So the number of passes is at most
    2 + log(longest / shortest) / log(1 / 0.8), and each goes only over what still misses. Shorter segments that bring
    no more tokens back, as where a word is wrong at any length, are given up for the longer ones.

    Args:
        segments: Consecutive segments, as long as they may be.
        measure: Compresses segments and measures their fidelity.
        cut: Cuts a text into segments of at most so many encoder tokens.
        target: Token accuracy to reach, 0 to 1.
        shortest: Encoder tokens below which no segment is cut.

    Returns:
        Segments of the same text in order.
    """
    # Lists of segments that wait to be measured; each becomes a list of measured segments and recuts.
    whole: list = list(segments)
    waiting = [whole]
    while any(waiting):
        measured = iter(measure([segment for part in waiting for segment in part]))
        for part in waiting:
            part[:] = _recut([next(measured) for _ in part], cut, target, shortest)
        waiting = [item.after for part in waiting for item in part if isinstance(item, _Recut)]
    return list(_chosen(whole))


def _recut(items: list[MeasuredSegment], cut: Cut, target: float, shortest: int) -> Iterator[MeasuredSegment | _Recut]:
    def misses(item: MeasuredSegment) -> bool:
        return item.token_accuracy < target and len(item.segment.encoder_ids) > shortest

    for is_missing, group in groupby(items, key=misses):
        run = list(group)
        if not is_missing:
            yield from run
            continue
        longest = max(len(item.segment.encoder_ids) for item in run)
        reach = min(item.reach(target) for item in run)
        limit = max(shortest, min(max(reach, int(longest * _LARGEST_STEP)), int(longest * _SMALLEST_STEP)))
        text = "".join(item.segment.text for item in run)
        yield _Recut(run, list(cut([text.encode("utf-8", "surrogateescape")], limit)))


def _chosen(items: list) -> Iterator[MeasuredSegment]:
    for item in items:
        if isinstance(item, _Recut):
            after = list(_chosen(item.after))
            fewer_errors = sum(piece.num_errors for piece in after) < sum(piece.num_errors for piece in item.before)
            yield from after if fewer_errors else item.before
        else:
            yield item
