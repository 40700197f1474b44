"""How much of a segment its latents bring back, read off one teacher-forced pass over the decoder.

The margin of a position is the logit of the right token less the largest other logit. Greedy decoding picks the right
token where it is positive. So the tokens of a segment whose margins are all positive come back, and those in front of
the first other one do in any case: up to there free running sees what the teacher-forced pass saw. After the first
error it may go on or lose its place; what then to expect is an estimate, [`expected_precision`]. The text comes back
with its tokens only if decoding them gives it: a tokenizer that normalises changes characters before any model runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


# A float16 margin of 0 is a tie or too close to call: it counts as wrong.
MARGIN_DTYPE = torch.float16


@dataclass(frozen=True)
class Calibration:
    """Two numbers that say how a model behaves after an error; fitted by `benchmarks/latents_fidelity.py`.

    Attributes:
        derail: Chance, 0 to 1, that decoding loses its place at a wrong token.
        floor: Share of the remaining text, 0 to 1, that still counts as right when it has.
    """

    derail: float
    floor: float


# Of c3-tiny, fitted on 180 segments of 160 to 768 tokens by benchmarks/latents_fidelity.py (docs/contexts.md shows the
# record). It copies by position, so an error hardly costs more than itself.
TINY_CALIBRATION = Calibration(derail=0.08, floor=0.0)


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
        calibration: How the model behaves after an error.
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
