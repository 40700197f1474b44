"""Token accuracy, position by position."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Hamming

from c3_hf.evaluation.metric_info import MetricInfo


INFO = MetricInfo(
    inputs="tokens",
    low=0.0,
    high=1.0,
    best=1.0,
    source="1 - normalised Hamming distance; the free-running counterpart of teacher-forced accuracy",
)


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
