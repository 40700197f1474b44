"""The same text at compression ratios of 2 to 40, by cutting it into shorter or longer segments."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.excerpts import excerpts
from c3_hf.evaluation.items import VARIANT, RestoreItem
from c3_hf.evaluation.reading import find_file, read_jsonl
from c3_hf.evaluation.tokens import TokenMeter


# Divisors of the largest, so that at each ratio the text is a whole number of full segments.
RATIOS = (2, 4, 5, 8, 10, 20, 40)
EXCERPTS_PER_BOOK = 4


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Excerpts of `40 * num_latents` tokens, each at every ratio.

    At ratio r the excerpt is cut into segments of `r * num_latents` tokens, and every segment gets `num_latents`
    latents: the text stays the same, only the number of latents changes.
    """
    items = []
    for book in read_jsonl(find_file(data_dir, "books_and_code.jsonl.gz")):
        for number, text in enumerate(
            excerpts(book["text"], RATIOS[-1] * meter.num_latents, EXCERPTS_PER_BOOK, meter)
        ):
            items += [
                RestoreItem(
                    id=f"{book['id']}/{number}{VARIANT}{ratio}x",
                    kind=book["kind"],
                    lang=book["lang"],
                    source=book["source"],
                    bin=f"{ratio}x",
                    segments=tuple(meter.cut(text, ratio * meter.num_latents)),
                )
                for ratio in RATIOS
            ]
    return items
