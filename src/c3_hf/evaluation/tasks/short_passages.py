"""The passages' documents at 32 to 512 Qwen tokens, in bins that double."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import whole_text_items
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Items of `passages_short_en` and `passages_short_zh`."""
    return whole_text_items(data_dir, "passages_short_en.jsonl.gz", "passages_short_zh.jsonl.gz")
