"""Metrics over the characters of the raw strings: nothing is stripped or normalised."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein, Prefix

from c3_hf.evaluation.metrics import Metric


def char_precision(prediction: str, reference: str) -> float:
    """`1 - levenshtein(prediction, reference) / max(len(prediction), len(reference))`.

    Insertions, deletions and substitutions cost 1; lengths are code points of the raw strings. It is a similarity,
    not a precision in the sense of retrieval: order, case, spaces and line breaks count, and missing text costs as
    much as invented text. The name is the one by which measurements of C3 are quoted.

    Args:
        prediction: Restored text.
        reference: Original text. No normalisation is applied to either: NFC and NFD spellings differ.

    Returns:
        A value in [0, 1]; 1 for identical strings, also for two empty ones.
    """
    return 1.0 - Levenshtein.normalized_distance(prediction, reference)


def character_error_rate(prediction: str, reference: str) -> float:
    """Character edit distance over the length of the reference.

    Unlike `char_precision` it is not bounded: a prediction that runs on after the text can exceed 1.

    Args:
        reference: Original text; an empty one counts as one character, so that the rate stays finite.

    Returns:
        A value >= 0; 0 for identical strings.
    """
    return Levenshtein.distance(prediction, reference) / max(len(reference), 1)


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both strings have the same code points, else 0.0.

    Nothing is stripped or normalised. A tokenizer that normalises its input to NFC cannot give an NFD text back, so
    on such a text the best possible value is 0.
    """
    return float(prediction == reference)


def first_error_position(prediction: str, reference: str) -> float:
    """Share of the reference that comes back before the first wrong, missing or additional character.

    Returns:
        A value in [0, 1]; 1 if the prediction begins with the whole reference (what follows it shows in
        `length_ratio`). For an empty reference 1 if the prediction is empty too, else 0.
    """
    if not reference:
        return float(not prediction)
    return Prefix.similarity(prediction, reference) / len(reference)


def length_ratio(prediction: str, reference: str) -> float:
    """`len(prediction) / len(reference)`: below 1 the text broke off, above 1 it ran on or looped.

    Two empty strings have the ratio 1; an empty reference otherwise counts as one character.
    """
    if not prediction and not reference:
        return 1.0
    return len(prediction) / max(len(reference), 1)


METRICS = {
    "char_precision": Metric(
        char_precision,
        inputs="text",
        source="1 - edit_dist of the Fox and GOT-OCR2.0 evaluation scripts, over code points of the raw strings",
    ),
    "character_error_rate": Metric(
        character_error_rate,
        inputs="text",
        high=None,
        best=0.0,
        source="speech and OCR convention: (substitutions + deletions + insertions) / reference characters",
    ),
    "exact_match": Metric(exact_match, inputs="text", source="equality of the raw strings"),
    "first_error_position": Metric(
        first_error_position, inputs="text", source="length of the common prefix over the reference length"
    ),
    "length_ratio": Metric(length_ratio, inputs="text", high=None, source="code points of the raw strings"),
}
