"""Metrics over tokens: position by position, and by place in the text, the forgetting curve."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from rapidfuzz.distance import Hamming, Levenshtein

from c3_hf.evaluation.metrics import Metric


def token_accuracy(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Share of positions at which both sequences hold the same token, over the longer length.

    The strictest of the graded metrics: one inserted or lost token makes everything after it wrong.
    `accuracy_by_position` aligns instead.

    Args:
        prediction: Token ids of the restored text, any length.
        reference: Token ids of the original text, from the same tokenizer.

    Returns:
        A value in [0, 1]; 1 for two empty sequences.
    """
    return Hamming.normalized_similarity(prediction, reference)


def accuracy_by_position(
    prediction: Sequence[Hashable], reference: Sequence[Hashable], num_bins: int = 10
) -> list[float | None]:
    """Share of the reference's tokens that come back, for equal slices from the beginning to the end of the text.

    Prediction and reference are aligned by a minimal Levenshtein edit script; a reference token is right if the
    script keeps it. An insertion early in the text therefore does not spoil the slices after it. Insertions belong
    to no reference token and do not show here (they do in `length_ratio` and `character_error_rate`). Among edit
    scripts of equal length the choice is rapidfuzz's; unrelated texts keep some tokens by chance, so the floor is
    above 0.

    Args:
        prediction: Token ids of the restored text.
        reference: Token ids of the original text, from the same tokenizer.
        num_bins: Number of slices, at least 1. Token `i` of `n` lies in slice `i * num_bins // n`.

    Returns:
        `num_bins` values in [0, 1]; `None` for a slice without tokens (texts shorter than `num_bins`).

    Raises:
        ValueError: If `num_bins` is smaller than 1.
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` is {num_bins}, expected at least 1; 10 gives deciles of the text.")
    kept = np.zeros(len(reference))
    for block in Levenshtein.opcodes(reference, prediction):
        if block.tag == "equal":
            kept[block.src_start : block.src_end] = 1.0
    slices: np.ndarray = np.arange(len(reference)) * num_bins // max(len(reference), 1)
    totals = np.bincount(slices, minlength=num_bins)
    sums = np.bincount(slices, weights=kept, minlength=num_bins)
    return [float(right / total) if total else None for right, total in zip(sums, totals)]


METRICS = {
    "token_accuracy": Metric(
        token_accuracy,
        inputs="tokens",
        source="1 - normalised Hamming distance; the free-running counterpart of teacher-forced accuracy",
    ),
    "accuracy_by_position": Metric(
        accuracy_by_position,
        inputs="tokens",
        source="reference tokens kept by a minimal edit alignment; the curve of C3 paper section 4, made exact",
    ),
}
