"""Texts and questions of one's own: a JSON Lines file, see docs/evaluation.md for its fields."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import DataLine, QuestionItem, RestoreItem, TokenMeter, lines_of, question_of


def load_texts(data: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Texts to restore: the lines without a `question`."""
    lines = [line for line in _lines(data) if "question" not in line.fields]
    return [RestoreItem(**line.labels(), segments=(line.text("text"),)) for line in lines]


def load_questions(data: Path, meter: TokenMeter) -> list[QuestionItem]:
    """Questions: the lines with a `question`, over the line's `contexts` or its one `text`."""
    return [
        question_of(line, line.texts("contexts") if "contexts" in line.fields else (line.text("text"),))
        for line in _lines(data)
        if "question" in line.fields
    ]


def _lines(data: Path) -> list[DataLine]:
    if not data.is_file():
        raise FileNotFoundError(f"`data` {str(data)!r} is no file, expected a JSON Lines file of your own texts.")
    lines = lines_of(data)
    if not lines:
        raise ValueError(f'{data} has no line, expected one JSON object a line, such as {{"text": "…"}}.')
    return lines


TASKS = {"own_texts": load_texts, "own_questions": load_questions}
