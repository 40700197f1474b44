"""Character precision: one minus the normalised character edit distance."""

from __future__ import annotations

from c3_hf.evaluation.metric_info import MetricInfo
from c3_hf.evaluation.text_units import normalised_edit_distance


INFO = MetricInfo(
    inputs="text",
    low=0.0,
    high=1.0,
    best=1.0,
    source="1 - edit_dist of the Fox and GOT-OCR2.0 evaluation scripts, over code points of the raw strings",
)


def char_precision(prediction: str, reference: str) -> float:
    """`1 - levenshtein(prediction, reference) / max(len(prediction), len(reference))`.

    It is a similarity, not a precision in the sense of retrieval: order, case, spaces and line breaks count, and
    missing text costs as much as invented text. The name is the one by which measurements of C3 are quoted.

    Args:
        prediction: Restored text.
        reference: Original text. No normalisation is applied to either: NFC and NFD spellings differ.

    Returns:
        A value in [0, 1]; 1 for identical strings, also for two empty ones.
    """
    return 1.0 - normalised_edit_distance(prediction, reference)
