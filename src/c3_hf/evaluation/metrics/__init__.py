"""One family of metrics a file, each a function of two arguments; the table `METRICS` at its end says what each is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """Facts about one metric.

    Args:
        function: The formula: prediction and what is expected to a number, or to a dictionary of several.
        inputs: What it compares. `"text"`: two strings. `"tokens"`: two sequences of token ids (any sequences of
            hashable values work). `"answer"`: a generated answer and a sequence of accepted ones.
        source: Where the formula comes from.
        low: Smallest possible value.
        high: Largest possible value; `None` where there is none.
        best: The value of a perfect restoration.
    """

    function: Callable[..., Any]
    inputs: Literal["text", "tokens", "answer"]
    source: str
    low: float = 0.0
    high: float | None = 1.0
    best: float = 1.0
