"""The two tasks of Lost in the Middle (arXiv 2307.03172)."""

from __future__ import annotations

import re
from pathlib import Path

from c3_hf.evaluation.items import QuestionItem, TokenMeter, question_of, read_lines


_BETWEEN_DOCUMENTS = re.compile(r"\n\n(?=Document \[\d+\]\()")


def load_multidoc_qa(data: Path, meter: TokenMeter) -> list[QuestionItem]:
    """Questions over ten or so documents, each a context, of which one holds the answer; bin = its place."""
    return [
        question_of(
            line,
            tuple(_BETWEEN_DOCUMENTS.split(line.text("text"))),
            kind=f"{line.get('n_docs', int)} documents",
            bin=f"gold at {line.get('gold_position', int)}",
        )
        for line in read_lines(data, "multidoc_qa.jsonl.gz")
    ]


def load_kv_retrieval(data: Path, meter: TokenMeter) -> list[QuestionItem]:
    """The value of one key of a JSON object of 75 random UUID pairs; the object is one context."""
    return [question_of(line, (line.text("text"),), bin="") for line in read_lines(data, "kv_retrieval.jsonl.gz")]


TASKS = {"multidoc_qa": load_multidoc_qa, "kv_retrieval": load_kv_retrieval}
