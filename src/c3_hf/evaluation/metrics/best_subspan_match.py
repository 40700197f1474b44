"""Whether an answer occurs in the output after SQuAD normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from c3_hf.evaluation.metric_info import MetricInfo
from c3_hf.evaluation.metrics.answer_f1 import normalise_answer


INFO = MetricInfo(
    inputs="answer",
    low=0.0,
    high=1.0,
    best=1.0,
    source="best_subspan_em of Liu et al. 2023, Lost in the Middle (arXiv 2307.03172)",
)


def best_subspan_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if an accepted answer is a substring of the prediction once both are normalised, else 0.0."""
    normalised = normalise_answer(prediction)
    return float(any((normalise_answer(answer) or answer) in normalised for answer in answers))
