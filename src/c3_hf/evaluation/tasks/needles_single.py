"""One sentence hidden at a depth of a long text, asked for."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import QuestionItem
from c3_hf.evaluation.needles import needle_item, read_needles
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[QuestionItem]:
    """One item for each needle of kind `single`."""
    haystacks, needles = read_needles(data_dir, "single")
    return [needle_item(needle, [needle], haystacks[needle["haystack"]]) for needle in needles]
