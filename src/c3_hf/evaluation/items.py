"""What a task hands to a system: texts to restore, or questions to answer from contexts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


# In an id, between a text and the form in which this item has it; items of one text are kept or left out together.
VARIANT = "@"


@dataclass(frozen=True)
class RestoreItem:
    """A text to give back.

    Args:
        id: Unique within the task.
        kind: Kind of text, a row of the report's table.
        lang: Language code of the data, or another label where there is no language.
        source: Where the text comes from.
        bin: Label of the length bin or ratio the report groups by; empty where there is none.
        segments: The text in reading order; each segment is restored on its own and the results are concatenated.
    """

    id: str
    kind: str
    lang: str
    source: str
    bin: str
    segments: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole reference."""
        return "".join(self.segments)

    @property
    def inputs_hash(self) -> str:
        """SHA-256 of everything a system sees."""
        return _sha256(self.segments)


@dataclass(frozen=True)
class QuestionItem:
    """A question with contexts that hold the answer.

    Args:
        id: Unique within the task.
        kind: Kind of question, a row of the report's table.
        lang: Language code of the data.
        source: Where the contexts come from.
        bin: Label the report groups by, such as the depth of a needle; empty where there is none.
        contexts: Documents in order. A system cuts one that is longer than it can take at once.
        question: The question.
        answers: Accepted answers, at least one.
    """

    id: str
    kind: str
    lang: str
    source: str
    bin: str
    contexts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]

    @property
    def inputs_hash(self) -> str:
        """SHA-256 of everything a system sees."""
        return _sha256([self.contexts, self.question])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
