"""Choose segment lengths so that every segment reaches a target fidelity with as few latents as that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    @property
    def token_accuracy(self) -> float:
        """Share of right positions, 0 to 1; 1 where nothing was measured."""
        return 1.0 if self.margins is None else SegmentFidelity.from_margins(self.margins).token_accuracy

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
    2 + log(longest / shortest) / log(1 / 0.8), and each goes only over what still misses.

    Args:
        segments: Consecutive segments, as long as they may be.
        measure: Compresses segments and measures their fidelity.
        cut: Cuts a text into segments of at most so many encoder tokens.
        target: Token accuracy to reach, 0 to 1.
        shortest: Encoder tokens below which no segment is cut.

    Returns:
        Segments of the same text in order; none that misses the target has more than `shortest` tokens.
    """
    items: list[MeasuredSegment | Segment] = list(segments)
    while pending := [index for index, item in enumerate(items) if isinstance(item, Segment)]:
        missing = set()
        for index, measured in zip(pending, measure([item for item in items if isinstance(item, Segment)])):
            items[index] = measured
            if measured.token_accuracy < target and len(measured.segment.encoder_ids) > shortest:
                missing.add(index)
        items = list(_recut(items, missing, cut, target, shortest))
    return [item for item in items if isinstance(item, MeasuredSegment)]


def _recut(
    items: list, missing: set[int], cut: Cut, target: float, shortest: int
) -> Iterator[MeasuredSegment | Segment]:
    for is_missing, group in groupby(range(len(items)), key=missing.__contains__):
        run = [items[index] for index in group]
        if not is_missing:
            yield from run
            continue
        lengths = [len(item.segment.encoder_ids) for item in run]
        reach = min(item.reach(target) for item in run)
        limit = min(max(reach, int(max(lengths) * _LARGEST_STEP)), int(max(lengths) * _SMALLEST_STEP))
        limit = max(shortest, limit)
        text = "".join(item.segment.text for item in run)
        yield from cut([text.encode("utf-8", "surrogateescape")], limit)
