"""Random letters, digits, hexadecimal, base64, UUIDs and Han characters: the hardest text there is."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import whole_text_items
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Items of `random`."""
    return whole_text_items(data_dir, "random.jsonl.gz")
