"""Word overlap of an answer with the accepted ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from c3_hf.evaluation.metric_info import MetricInfo
from c3_hf.evaluation.text_units import words


INFO = MetricInfo(
    inputs="answer", low=0.0, high=1.0, best=1.0, source="SQuAD F1 (Rajpurkar et al. 2016), Han characters as words"
)

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
