"""Choose segment lengths so that every segment reaches a target fidelity with as few latents as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from .fidelity import SegmentFidelity
from .segmentation import Segment, iter_segments


# From one length to try to the next: where the fidelity is near the target, and where it is far from it.
_NEAR_STEP, _FAR_STEP = 0.7, 0.5
_FAR_ACCURACY = 0.9


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


Measure = Callable[[Sequence[Segment]], list[MeasuredSegment]]


def fit_segments(
    segments: Sequence[Segment],
    measure: Measure,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: float,
    shortest: int,
) -> list[MeasuredSegment]:
    """Measure segments; cut those that miss the target anew, shorter, until they reach it or are as short as may be.

    Neighbours that miss it are joined and cut together into even parts. The longest of them shrinks by a factor of 0.7
    or 0.5 each time, so the number of passes is at most 2 + log(longest / shortest) / log(1 / 0.7), and each goes only
    over what still misses.

    Args:
        segments: Consecutive segments, as long as they may be.
        measure: Compresses segments and measures their fidelity.
        tokenizer: To cut with.
        target: Token accuracy to reach, 0 to 1.
        shortest: Tokens below which no segment is cut.

    Returns:
        Segments of the same text in order; none that misses the target has more than `shortest` tokens.
    """
    items: list[MeasuredSegment | Segment] = list(segments)
    while pending := [index for index, item in enumerate(items) if isinstance(item, Segment)]:
        missing = set()
        for index, measured in zip(pending, measure([item for item in items if isinstance(item, Segment)])):
            items[index] = measured
            if measured.token_accuracy < target and len(measured.segment.token_ids) > shortest:
                missing.add(index)
        items = list(_recut(items, missing, tokenizer, shortest))
    return [item for item in items if isinstance(item, MeasuredSegment)]


def _recut(
    items: list, missing: set[int], tokenizer: PreTrainedTokenizerBase, shortest: int
) -> Iterator[MeasuredSegment | Segment]:
    for is_missing, group in groupby(range(len(items)), key=missing.__contains__):
        run = [items[index] for index in group]
        if not is_missing:
            yield from run
            continue
        lengths = [len(item.segment.token_ids) for item in run]
        is_near = min(item.token_accuracy for item in run) >= _FAR_ACCURACY
        limit = max(shortest, int(max(lengths) * (_NEAR_STEP if is_near else _FAR_STEP)))
        # Even parts instead of full ones and a small rest; an eighth of room for natural boundaries.
        even = math.ceil(sum(lengths) / math.ceil(sum(lengths) / limit))
        text = "".join(item.segment.text for item in run)
        length = max(shortest, min(limit, even + even // 8))
        yield from iter_segments([text.encode("utf-8", "surrogateescape")], tokenizer, length)
