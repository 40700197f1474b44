"""How far into the text the first error lies."""

from __future__ import annotations

from rapidfuzz.distance import Prefix

from c3_hf.evaluation.metric_info import MetricInfo


INFO = MetricInfo(
    inputs="text", low=0.0, high=1.0, best=1.0, source="length of the common prefix over the reference length"
)


def first_error_position(prediction: str, reference: str) -> float:
    """Share of the reference that comes back before the first wrong, missing or additional character.

    Args:
        prediction: Restored text.
        reference: Original text.

    Returns:
        A value in [0, 1]; 1 if the prediction begins with the whole reference (what follows it shows in
        `length_ratio`). For an empty reference 1 if the prediction is empty too, else 0.
    """
    if not reference:
        return float(not prediction)
    return Prefix.similarity(prediction, reference) / len(reference)
