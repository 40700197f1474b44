"""Whether an answer occurs in the output, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence

from c3_hf.evaluation.metric_info import MetricInfo


INFO = MetricInfo(
    inputs="answer", low=0.0, high=1.0, best=1.0, source="exact substring, as needle and key-value tests score"
)


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if one of the accepted answers is a substring of the prediction, else 0.0.

    Nothing is normalised: `776,214` does not contain `776214`. A short answer is also found inside a longer number
    or word, and a long output finds more by chance; compare `answer_f1`, which punishes length.
    """
    return float(any(answer in prediction for answer in answers))
