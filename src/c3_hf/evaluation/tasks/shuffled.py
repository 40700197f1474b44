"""Passages with their words or characters shuffled: what language modelling alone cannot guess."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import whole_text_items
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Items of `shuffled`."""
    return whole_text_items(data_dir, "shuffled.jsonl.gz")
