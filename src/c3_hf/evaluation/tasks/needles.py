"""Sentences hidden in a long text, and asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from c3_hf.evaluation.items import DataLine, QuestionItem, TokenMeter, read_lines


# About 4,000 Qwen tokens of English; needles' depths are shares of this length.
HAYSTACK_CHARACTERS = 16_384
_SENTENCE_ENDS = (". ", "。", "\n")


def insert_needles(haystack: str, needles: Iterable[dict]) -> str:
    """`haystack` with each needle after the first sentence end at or behind its depth.

    Args:
        needles: Records with `text`, `depth` (share of the haystack's length, in [0, 1]) and `lang`. Chinese needles
            are inserted as they are, others between two spaces.

    Returns:
        The longer text. Depths refer to the text without needles.
    """
    result = haystack
    for needle in sorted(needles, key=lambda needle: needle["depth"], reverse=True):
        start = round(needle["depth"] * len(haystack))
        ends = [found + len(end) for end in _SENTENCE_ENDS if (found := haystack.find(end, start)) >= 0]
        place = min(ends, default=len(haystack))
        sentence = needle["text"] if needle["lang"] == "zh" else f" {needle['text']} "
        result = result[:place] + sentence + result[place:]
    return result


def load_single(data: Path, meter: TokenMeter) -> list[QuestionItem]:
    """One sentence hidden at a depth of a long text."""
    return [_item(needle, [needle], haystacks) for haystacks, needle in _read(data, "single")]


def load_multi(data: Path, meter: TokenMeter) -> list[QuestionItem]:
    """Eight sentences of one pattern in a text, each asked for: the others distract."""
    return [_item(needle, group, haystacks) for haystacks, group in _groups(data, "multi") for needle in group]


def load_two_hop(data: Path, meter: TokenMeter) -> list[QuestionItem]:
    """Two sentences that must be joined to answer: the link in one, the answer, which is asked for, in the other."""
    asked = []
    for haystacks, group in _groups(data, "two_hop"):
        holding = [needle for needle in group if needle.text("answer") in needle.text("text")]
        if not holding:
            raise ValueError(f"{group[0].where}: no sentence of its group holds the `answer`.")
        asked.append(_item(holding[0], group, haystacks))
    return asked


def _read(data: Path, kind: str) -> list[tuple[dict[str, str], DataLine]]:
    """The records of `kind`, each with the haystacks by id, cut to their first `HAYSTACK_CHARACTERS`."""
    books = read_lines(data, "books_and_code.jsonl.gz")
    haystacks = {book.labels()["id"]: book.text("text")[:HAYSTACK_CHARACTERS] for book in books}
    needles = read_lines(data, "needles.jsonl.gz")
    return [(haystacks, needle) for needle in needles if needle.text("kind") == kind]


def _groups(data: Path, kind: str) -> list[tuple[dict[str, str], list[DataLine]]]:
    groups: dict[str, tuple[dict[str, str], list[DataLine]]] = {}
    for haystacks, needle in _read(data, kind):
        groups.setdefault(needle.text("group"), (haystacks, []))[1].append(needle)
    return list(groups.values())


def _item(asked: DataLine, inserted: Iterable[DataLine], haystacks: dict[str, str]) -> QuestionItem:
    """The question of the record `asked`, over its haystack with the `inserted` records in it."""
    name, depth = asked.text("haystack"), asked.get("depth", (int, float))
    if name not in haystacks:
        raise ValueError(f"{asked.where}: `haystack` is {name!r}, which is no id of books_and_code.")
    needles = [{key: needle.get(key, kinds) for key, kinds in _NEEDLE.items()} for needle in inserted]
    return QuestionItem(
        **{**asked.labels(bin=f"depth {depth:.1f}"), "source": name},
        contexts=(insert_needles(haystacks[name], needles),),
        question=asked.text("question"),
        answers=(asked.text("answer"),),
    )


_NEEDLE: dict[str, type | tuple[type, ...]] = {"text": str, "depth": (int, float), "lang": str}
TASKS = {"needles_single": load_single, "needles_multi": load_multi, "needles_two_hop": load_two_hop}
