"""Plain passages of 600 to 1,300 Qwen tokens, English and Chinese, in the paper's 100-token bins."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import whole_text_items
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Items of `passages_en` and `passages_zh`."""
    return whole_text_items(data_dir, "passages_en.jsonl.gz", "passages_zh.jsonl.gz")
