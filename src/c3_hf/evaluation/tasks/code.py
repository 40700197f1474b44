"""Source code in Python, C and JavaScript."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import whole_text_items
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Items of `code`."""
    return whole_text_items(data_dir, "code.jsonl.gz")
