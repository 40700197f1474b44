"""Questions over ten or so documents of which one holds the answer (Lost in the Middle)."""

from __future__ import annotations

import re
from pathlib import Path

from c3_hf.evaluation.items import QuestionItem
from c3_hf.evaluation.reading import find_file, read_jsonl
from c3_hf.evaluation.tokens import TokenMeter


_BETWEEN_DOCUMENTS = re.compile(r"\n\n(?=Document \[\d+\]\()")


def load(data_dir: Path, meter: TokenMeter) -> list[QuestionItem]:
    """One item for each record of `multidoc_qa`; every document is a context; bin = place of the gold document."""
    return [
        QuestionItem(
            id=record["id"],
            kind=f"{record['n_docs']} documents",
            lang=record["lang"],
            source=record["source"],
            bin=f"gold at {record['gold_position']}",
            contexts=tuple(_BETWEEN_DOCUMENTS.split(record["text"])),
            question=record["question"],
            answers=tuple(record["answers"]),
        )
        for record in read_jsonl(find_file(data_dir, "multidoc_qa.jsonl.gz"))
    ]
