"""Which segments of a text a question is about: a plain comparison of words, without a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise


# Scripts that are written without spaces count by the character: Han, kana, Hangul.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; a Chinese, Japanese or Korean character is one."""
    return [word.casefold() for word in _WORD.findall(text)]


def best_segments(question: str, texts: Sequence[str], most: int) -> list[int]:
    """The segments that share most with a question, in the order of the text.

    Each word of the question that a segment holds counts by its rarity, log(1 + S / s) for s of S segments that hold
    it, and likewise each pair of neighbouring words; among equals the earlier segment is taken.

    Args:
        question: What is asked.
        texts: The segments' texts.
        most: How many to choose, at least 1.

    Returns:
        At most `most` positions in `texts`, ascending; those that share nothing are left out, unless all do.
    """
    wanted = _terms(question)
    held = [wanted & _terms(text) for text in texts]
    holders = Counter(term for terms in held for term in terms)
    scores = [sum(math.log1p(len(texts) / holders[term]) for term in sorted(terms)) for terms in held]
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[:most]
    return sorted(index for index in order if scores[index] > 0) or sorted(order)


def _terms(text: str) -> set[str]:
    words = words_of(text)
    return {*words, *(f"{left} {right}" for left, right in pairwise(words))}
