"""Metrics of an answer against the accepted ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from c3_hf.evaluation.metrics import Metric
from c3_hf.evaluation.metrics.words import words


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if one of the accepted answers is a substring of the prediction, else 0.0.

    Nothing is normalised: `776,214` does not contain `776214`. A short answer is also found inside a longer number
    or word, and a long output finds more by chance; compare `answer_f1`, which punishes length.
    """
    return float(any(answer in prediction for answer in answers))


def best_subspan_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if an accepted answer is a substring of the prediction once both are normalised, else 0.0."""
    normalised = normalise_answer(prediction)
    return float(any((normalise_answer(answer) or answer) in normalised for answer in answers))


_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over the accepted answers between bags of normalised words.

    Returns:
        A value in [0, 1]; 1 for equal word counts, 0 without a common word.
    """
    return max(_f1(words(normalise_answer(prediction)), words(normalise_answer(answer))) for answer in answers)


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted and not expected:
        return 1.0
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2.0 * common / (len(predicted) + len(expected))


METRICS = {
    "contains_answer": Metric(
        contains_answer, inputs="answer", source="exact substring, as needle and key-value tests score"
    ),
    "best_subspan_match": Metric(
        best_subspan_match,
        inputs="answer",
        source="best_subspan_em of Liu et al. 2023, Lost in the Middle (arXiv 2307.03172)",
    ),
    "answer_f1": Metric(
        answer_f1, inputs="answer", source="SQuAD F1 (Rajpurkar et al. 2016), Han characters as words"
    ),
}
