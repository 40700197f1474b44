"""Excerpts of books and code of about sixteen segments, restored segment by segment."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.excerpts import excerpts
from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import find_file, read_jsonl
from c3_hf.evaluation.tokens import TokenMeter


SEGMENTS = 16
EXCERPTS_PER_BOOK = 2


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Two excerpts of each record of `books_and_code`, sixteen times `segment_tokens` tokens long."""
    items = []
    for book in read_jsonl(find_file(data_dir, "books_and_code.jsonl.gz")):
        for number, text in enumerate(
            excerpts(book["text"], SEGMENTS * meter.segment_tokens, EXCERPTS_PER_BOOK, meter)
        ):
            items.append(
                RestoreItem(
                    id=f"{book['id']}/{number}",
                    kind=book["kind"],
                    lang=book["lang"],
                    source=book["source"],
                    bin="",
                    segments=tuple(meter.segments(text)),
                )
            )
    return items
