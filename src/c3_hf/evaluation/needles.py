"""Hides sentences in a long text and asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from c3_hf.evaluation.items import QuestionItem
from c3_hf.evaluation.reading import find_file, read_jsonl


# About 4,000 Qwen tokens of English; needles' depths are shares of this length.
HAYSTACK_CHARACTERS = 16_384
_SENTENCE_ENDS = (". ", "。", "\n")


def insert_needles(haystack: str, needles: Iterable[dict]) -> str:
    """`haystack` with each needle after the first sentence end at or behind its depth.

    Args:
        haystack: Any text.
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


def read_needles(data_dir: Path, kind: str) -> tuple[dict[str, str], list[dict]]:
    """Haystacks by id, cut to their first `HAYSTACK_CHARACTERS`, and the needle records of `kind`."""
    books = read_jsonl(find_file(data_dir, "books_and_code.jsonl.gz"))
    needles = read_jsonl(find_file(data_dir, "needles.jsonl.gz"))
    haystacks = {book["id"]: book["text"][:HAYSTACK_CHARACTERS] for book in books}
    return haystacks, [needle for needle in needles if needle["kind"] == kind]


def needle_item(asked: dict, inserted: Iterable[dict], haystack: str) -> QuestionItem:
    """The question of the record `asked`, over `haystack` with the `inserted` records in it."""
    return QuestionItem(
        id=asked["id"],
        kind=asked["kind"],
        lang=asked["lang"],
        source=asked["haystack"],
        bin=f"depth {asked['depth']:.1f}",
        contexts=(insert_needles(haystack, inserted),),
        question=asked["question"],
        answers=(asked["answer"],),
    )
