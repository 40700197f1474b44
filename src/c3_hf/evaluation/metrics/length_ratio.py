"""Length of the restored text relative to the original."""

from __future__ import annotations

from c3_hf.evaluation.metric_info import MetricInfo


INFO = MetricInfo(inputs="text", low=0.0, high=None, best=1.0, source="code points of the raw strings")


def length_ratio(prediction: str, reference: str) -> float:
    """`len(prediction) / len(reference)`: below 1 the text broke off, above 1 it ran on or looped.

    Two empty strings have the ratio 1; an empty reference otherwise counts as one character.
    """
    if not prediction and not reference:
        return 1.0
    return len(prediction) / max(len(reference), 1)
