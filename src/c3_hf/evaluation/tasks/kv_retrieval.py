"""The value of one key of a JSON object of 75 random UUID pairs (Lost in the Middle)."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import QuestionItem
from c3_hf.evaluation.reading import find_file, read_jsonl
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[QuestionItem]:
    """One item for each record of `kv_retrieval`; the object is one context."""
    return [
        QuestionItem(
            id=record["id"],
            kind=record["kind"],
            lang=record["lang"],
            source=record["source"],
            bin="",
            contexts=(record["text"],),
            question=record["question"],
            answers=tuple(record["answers"]),
        )
        for record in read_jsonl(find_file(data_dir, "kv_retrieval.jsonl.gz"))
    ]
