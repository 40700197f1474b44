"""Two sentences hidden in a long text that must be joined to answer: the link in one, the answer in the other."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import QuestionItem
from c3_hf.evaluation.needles import needle_item, read_needles
from c3_hf.evaluation.summary import grouped
from c3_hf.evaluation.tokens import TokenMeter


def load(data_dir: Path, meter: TokenMeter) -> list[QuestionItem]:
    """One item for each group of kind `two_hop`; asked is the record whose sentence holds the answer."""
    haystacks, needles = read_needles(data_dir, "two_hop")
    groups = grouped(needles, lambda needle: needle["group"]).values()
    asked = ((next(needle for needle in group if needle["answer"] in needle["text"]), group) for group in groups)
    return [needle_item(needle, group, haystacks[needle["haystack"]]) for needle, group in asked]
