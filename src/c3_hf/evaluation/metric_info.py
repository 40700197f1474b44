"""What a metric file says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """Facts about one metric, kept beside its formula as `INFO`.

    Args:
        inputs: What the function compares. `"text"`: two strings. `"tokens"`: two sequences of token ids (any
            sequences of hashable values work). `"answer"`: a generated answer and a sequence of accepted ones.
        low: Smallest possible value.
        high: Largest possible value; `None` where there is none.
        best: The value of a perfect restoration.
        source: Where the formula comes from.
    """

    inputs: Literal["text", "tokens", "answer"]
    low: float
    high: float | None
    best: float
    source: str
