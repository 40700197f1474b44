"""Character error rate (CER)."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from c3_hf.evaluation.metric_info import MetricInfo


INFO = MetricInfo(
    inputs="text",
    low=0.0,
    high=None,
    best=0.0,
    source="speech and OCR convention: (substitutions + deletions + insertions) / reference characters",
)


def character_error_rate(prediction: str, reference: str) -> float:
    """Character edit distance over the length of the reference.

    Unlike `char_precision` it is not bounded: a prediction that runs on after the text can exceed 1.

    Args:
        prediction: Restored text.
        reference: Original text; an empty one counts as one character, so that the rate stays finite.

    Returns:
        A value >= 0; 0 for identical strings.
    """
    return Levenshtein.distance(prediction, reference) / max(len(reference), 1)
