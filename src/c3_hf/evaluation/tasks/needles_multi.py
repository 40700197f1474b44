"""Eight sentences of one pattern hidden in a long text, each asked for: the others distract."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import QuestionItem
from c3_hf.evaluation.needles import needle_item, read_needles
from c3_hf.evaluation.summary import grouped
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[QuestionItem]:
    """One item for each needle of kind `multi`, with all needles of its group in the text."""
    haystacks, needles = read_needles(data_dir, "multi")
    groups = grouped(needles, lambda needle: needle["group"]).values()
    return [needle_item(needle, group, haystacks[needle["haystack"]]) for group in groups for needle in group]
