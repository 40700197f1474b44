"""Excerpts of books and code, restored in segments: at every ratio, and at length."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import VARIANT, RestoreItem, TokenMeter, read_lines


BOOKS = "books_and_code.jsonl.gz"
# Divisors of the largest, so that at each ratio the text is a whole number of full segments.
RATIOS = (2, 4, 5, 8, 10, 20, 40)
SWEEP_EXCERPTS = 4
LONG_SEGMENTS = 16
LONG_EXCERPTS = 2
# No tokenizer of this family averages more characters a token on prose or code.
_CHARACTERS_PER_TOKEN = 8


def load_ratio_sweep(data: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Excerpts of `40 * num_latents` tokens, each at compression ratios of 2 to 40.

    At ratio r the excerpt is cut into segments of `r * num_latents` tokens, and every segment gets `num_latents`
    latents: the text stays the same, only the number of latents changes.
    """
    items = []
    for book in read_lines(data, BOOKS):
        labels = book.labels()
        for number, text in enumerate(
            excerpts(book.text("text"), RATIOS[-1] * meter.num_latents, SWEEP_EXCERPTS, meter)
        ):
            for ratio in RATIOS:
                own = {"id": f"{labels['id']}/{number}{VARIANT}{ratio}x", "bin": f"{ratio}x"}
                segments = tuple(meter.cut(text, ratio * meter.num_latents))
                items.append(RestoreItem(**{**labels, **own}, segments=segments))
    return items


def load_long_restoring(data: Path, meter: TokenMeter) -> list[RestoreItem]:
    """Excerpts of about sixteen segments, restored segment by segment."""
    items = []
    for book in read_lines(data, BOOKS):
        labels = book.labels(bin="")
        for number, text in enumerate(
            excerpts(book.text("text"), LONG_SEGMENTS * meter.segment_tokens, LONG_EXCERPTS, meter)
        ):
            own = {**labels, "id": f"{labels['id']}/{number}"}
            items.append(RestoreItem(**own, segments=tuple(meter.segments(text))))
    return items


def excerpts(text: str, num_tokens: int, count: int, meter: TokenMeter) -> list[str]:
    """`count` excerpts of `num_tokens` tokens, evenly spaced over `text`, each beginning at the start of a line.

    Args:
        num_tokens: Tokens of one excerpt; one that reaches the end of the text may be shorter.

    Returns:
        The excerpts in order of their place, none empty.
    """
    starts = (_line_start(text, len(text) * number // count) for number in range(count))
    pieces = (meter.cut(text[start : start + _CHARACTERS_PER_TOKEN * num_tokens], num_tokens) for start in starts)
    return [piece[0] for piece in pieces if piece]


def _line_start(text: str, position: int) -> int:
    if position == 0:
        return 0
    newline = text.find("\n", position)
    return position if newline < 0 else newline + 1


TASKS = {"ratio_sweep": load_ratio_sweep, "long_restoring": load_long_restoring}
