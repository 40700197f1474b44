"""How much of a segment its latents bring back, read off one teacher-forced pass; and segments cut until it is enough.

The margin of a position is the logit of the right token less the largest other logit. Greedy decoding picks the right
token where it is positive. So the tokens of a segment whose margins are all positive come back, and those in front of
the first other one do in any case: up to there free running sees what the teacher-forced pass saw. After the first
error it may go on or lose its place; what then to expect is an estimate, [`expected_precision`]. The text comes back
with its tokens only if decoding them gives it: a tokenizer that normalises changes characters before any model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from transformers import ProcessorMixin

from ..modeling.positions_c3 import pad_rows
from .decoding import Restorer, context_arguments, decode_tokens
from .exact import lost_characters
from .segments import Segment, Source


# A float16 margin of 0 is a tie or too close to call: it counts as wrong.
MARGIN_DTYPE = torch.float16
# Rows of logits computed at a time: 256 of the released vocabulary are 155 MB in float32.
_LOGIT_ROWS = 256
# By how much the next length to try is shorter, at least and at most.
_SMALLEST_STEP, _LARGEST_STEP = 0.8, 0.5


@dataclass(frozen=True)
class Calibration:
    """Two numbers that say how a model behaves after an error; fitted by `benchmarks/latents_fidelity.py`.

    A checkpoint keeps its own in its processor (`calibration`). The default is for one that says nothing: nothing
    behind an error counts, so that what is expected is the least that can come back.

    Attributes:
        derail: Chance, 0 to 1, that decoding loses its place at a wrong token.
        floor: Share of the remaining text, 0 to 1, that still counts as right when it has.
    """

    derail: float = 1.0
    floor: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"`{name}` of a calibration must be a number from 0 to 1, got {value!r}.")

    @classmethod
    def of(cls, processor: ProcessorMixin) -> Calibration:
        """What a checkpoint says of itself, or the default.

        Raises:
            ValueError: If it says something else than two numbers.
        """
        said = processor.calibration or {}
        if not isinstance(said, dict) or not said.keys() <= {"derail", "floor"}:
            raise ValueError(f"`processor.calibration` must give `derail` and `floor`, or be None, got {said!r}.")
        return cls(**said)


@dataclass(frozen=True)
class SegmentFidelity:
    """What one segment's margins say.

    Attributes:
        num_tokens: Tokens of the segment, without the stop token behind them.
        num_errors: Positions, the stop token's included, where the greedy choice is wrong.
        first_error: The first of them, counted from 0; `None` if there is none.
        lost_characters: Characters of the segment that its own tokens do not give when decoded, such as what Unicode
            normalisation changes; `None` where nobody counted.
    """

    num_tokens: int
    num_errors: int
    first_error: int | None
    lost_characters: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether free-running greedy decoding certainly gives the segment back, character for character."""
        return self.num_errors == 0 and self.lost_characters == 0

    @property
    def token_accuracy(self) -> float:
        """Share of positions, the stop token's included, where the greedy choice is right; 0 to 1."""
        return 1.0 - self.num_errors / (self.num_tokens + 1)

    @property
    def exact_prefix(self) -> int:
        """Tokens at the start that free-running greedy decoding certainly gives back."""
        return self.num_tokens if self.first_error is None else min(self.first_error, self.num_tokens)

    @classmethod
    def from_margins(cls, margins: torch.Tensor, lost_characters: int | None = None) -> SegmentFidelity:
        """Read `margins`, `(num_tokens + 1,)`, the last being the stop token's."""
        wrong = (~(margins > 0)).nonzero().flatten()
        return cls(len(margins) - 1, len(wrong), int(wrong[0]) if len(wrong) else None, lost_characters)


def expected_precision(margins: torch.Tensor, calibration: Calibration) -> float:
    """Character precision to expect from free-running greedy decoding, 0 to 1.

    At each wrong token decoding keeps its place with chance `1 - derail`; a right token counts in full while the place
    is kept and `floor` of it afterwards, a wrong token counts nothing while it is kept.

    Args:
        margins: `(num_tokens + 1,)`, the last being the stop token's.
    """
    right = (margins[:-1] > 0).float()
    if not len(right):
        return 1.0
    errors_before = torch.cat([right.new_zeros(1), (1 - right).cumsum(0)[:-1]])
    in_place = (1 - calibration.derail) ** errors_before
    return float((in_place * right + (1 - in_place) * calibration.floor).mean())


def to_margin_dtype(margins: torch.Tensor) -> torch.Tensor:
    """Margins as they are stored: float16, with too large ones at its limit."""
    limit = torch.finfo(MARGIN_DTYPE).max
    return margins.clamp(-limit, limit).to(MARGIN_DTYPE)


@torch.no_grad()
def measure_margins(
    restorer: Restorer,
    latents: torch.Tensor,
    sequences: Sequence[Sequence[int]],
    strides: torch.LongTensor | None = None,
) -> list[torch.Tensor]:
    """Logit of the right token less the largest other logit, at every position, as if all before had been right.

    Args:
        latents: `(batch_size, num_latents, text_hidden_size)`.
        sequences: For each row the token ids that should come back.
        strides: `(batch_size,)` int64, tokens that each latent stands for; for a model with a stride.

    Returns:
        For each row a float32 tensor `(num_tokens + 1,)` on the CPU. The last is the stop token's: the best stop token
        against the best other one.
    """
    model, prompt = restorer.model, restorer.prompt_ids
    # Padding on the right is never seen by what is in front of it, so any id that is no placeholder will do.
    rows = [torch.cat([prompt, torch.tensor(sequence, dtype=torch.long)]) for sequence in sequences]
    input_ids, _ = pad_rows(rows, left=False, value=restorer.stop_ids[0])
    contexts = context_arguments(latents, strides)
    outputs = model.model(input_ids=input_ids.to(latents.device), use_cache=False, **contexts)
    hidden = outputs.last_hidden_state
    hidden = hidden[:, len(prompt) - 1 :]
    lengths = [len(sequence) + 1 for sequence in sequences]
    flat = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])
    targets = torch.cat([torch.tensor([*sequence, -1], dtype=torch.long) for sequence in sequences]).to(flat.device)
    margins = [
        _margins(model.lm_head(rows).float(), row_targets, restorer)
        for rows, row_targets in zip(flat.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS))
    ]
    return list(torch.cat(margins).cpu().split(lengths))


def _margins(logits: torch.Tensor, targets: torch.Tensor, restorer: Restorer) -> torch.Tensor:
    """Margins of logits `(num_rows, vocab_size)`; a target of -1 stands for any stop token."""
    stops = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    stops[restorer.stop_ids] = True
    right = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, targets.clamp(min=0).unsqueeze(1), True)
    right = torch.where((targets < 0).unsqueeze(1), stops, right)
    return logits.masked_fill(~right, -torch.inf).amax(1) - logits.masked_fill(right, -torch.inf).amax(1)


def count_lost(processor: ProcessorMixin, segments: Sequence[Segment]) -> torch.Tensor:
    """Characters of each segment that decoding its own tokens does not give, `(num_segments,)` int64; 0 only where it
    gives the segment's text."""
    decoded = [decode_tokens(processor, segment.token_ids) for segment in segments]
    counts = [len(lost_characters(text, segment.text)) for text, segment in zip(decoded, segments)]
    return torch.tensor(counts, dtype=torch.int64)


@dataclass(frozen=True)
class MeasuredSegment:
    """A segment with its latents as they are stored.

    Attributes:
        latents: `(num_latents, hidden_size)` in the stored dtype.
        scales: `(num_latents,)` float32 for int8 latents, else `None`.
        stride: Tokens that each latent stands for; `None` for a model without a stride.
        margins: `(num_tokens + 1,)` float32; `None` if no fidelity was asked for.
    """

    segment: Segment
    latents: torch.Tensor
    scales: torch.Tensor | None
    stride: int | None
    margins: torch.Tensor | None

    @cached_property
    def fidelity(self) -> SegmentFidelity:
        """What the margins say; everything is right where nothing was measured."""
        if self.margins is None:
            return SegmentFidelity(len(self.segment.token_ids), 0, None)
        return SegmentFidelity.from_margins(self.margins)

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
    num_latents: int | None = None,
) -> list[MeasuredSegment]:
    """Measure segments; cut those that miss the target anew, shorter, until they reach it or are as short as may be.

    Neighbours that miss it are joined and cut together anew, as long as the start of each was good, but
    by a factor of 0.5 to 0.8 shorter than before. So the number of passes is at most
    2 + log(longest / shortest) / log(1 / 0.8), and each goes only over what still misses. Shorter segments that bring
    no more tokens back, as where a word is wrong at any length, are given up for the longer ones.

    Where latents have a stride, the strides are tried first, from the highest down, neighbours that miss the target
    sharing their text evenly: the highest that holds is taken, and only at a stride of 1 segments are cut shorter. The
    passes are then at most as many more as there are strides.

    Args:
        segments: Consecutive segments, as long as they may be.
        measure: Compresses segments and measures their fidelity.
        cut: Cuts a text into segments of at most so many encoder tokens.
        target: Token accuracy to reach, 0 to 1.
        shortest: Encoder tokens below which no segment is cut.
        num_latents: Latents of a segment, of a model whose latents have a stride.

    Returns:
        Segments of the same text in order.
    """
    # Lists of segments that wait to be measured; each becomes a list of measured segments and recuts.
    whole: list = list(segments)
    waiting = [whole]
    while any(waiting):
        measured = iter(measure([segment for part in waiting for segment in part]))
        for part in waiting:
            part[:] = _recut([next(measured) for _ in part], cut, target, shortest, num_latents)
        waiting = [item.after for part in waiting for item in part if isinstance(item, _Recut)]
    return list(_chosen(whole))


def _recut(
    items: list[MeasuredSegment], cut: Cut, target: float, shortest: int, num_latents: int | None
) -> Iterator[MeasuredSegment | _Recut]:
    def misses(item: MeasuredSegment) -> bool:
        return item.fidelity.token_accuracy < target and len(item.segment.encoder_ids) > shortest

    for is_missing, group in groupby(items, key=misses):
        run = list(group)
        if not is_missing:
            yield from run
            continue
        longest = max(len(item.segment.encoder_ids) for item in run)
        if num_latents is not None and longest > num_latents:
            limit = (longest - 1) // num_latents * num_latents
            # As many segments as this takes, of one length: a short rest would cost as many latents as the others.
            total = sum(len(item.segment.encoder_ids) for item in run)
            limit = max(shortest, -(-total // -(-total // limit)))
        else:
            reach = min(item.reach(target) for item in run)
            limit = max(shortest, min(max(reach, int(longest * _LARGEST_STEP)), int(longest * _SMALLEST_STEP)))
        text = "".join(item.segment.text for item in run)
        yield _Recut(run, list(cut([text.encode("utf-8", "surrogateescape")], limit)))


def _chosen(items: list) -> Iterator[MeasuredSegment]:
    for item in items:
        if isinstance(item, _Recut):
            after = list(_chosen(item.after))
            errors, before = (sum(piece.fidelity.num_errors for piece in part) for part in (after, item.before))
            yield from after if errors < before else item.before
        else:
            yield item
