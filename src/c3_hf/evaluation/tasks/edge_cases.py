"""Texts that break things: special-token spellings, control characters, emoji, one character, repeats."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import whole_text_items
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Items of `edge`."""
    return whole_text_items(data_dir, "edge.jsonl.gz")
