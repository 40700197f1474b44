"""Show a text with its fidelity: what comes back for certain, what was close, what is wrong. Terminal and HTML."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from transformers import ProcessorMixin

from .context import CompressedContext
from .decoding import decode_tokens
from .exact import lost_characters
from .measure import SegmentFidelity
from .restore import read_segments
from .segments import Source, read_segment


# A right token this close to the next choice (in logits) is shown as close: e^-2 is a seventh of its probability.
CLOSE_MARGIN = 2.0
CERTAIN, AFTER_ERROR, CLOSE, WRONG = "certain", "after", "close", "wrong"

_ANSI = {CERTAIN: "", AFTER_ERROR: "\x1b[2m", CLOSE: "\x1b[30;43m", WRONG: "\x1b[97;41m"}
_RESET = "\x1b[0m"
_STYLE = """\
body { font: 16px/1.6 Georgia, serif; max-width: 46em; margin: 2em auto; padding: 0 1em; color: #222; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.close { background: #ffe9a8; } .wrong { background: #f4a6a0; } .after { color: #8a8a8a; }
.mark { font: 11px/1 sans-serif; color: #fff; background: #6b7a8f; border-radius: 3px; padding: 1px 4px; }
.legend span { padding: 0 .4em; }"""


@dataclass(frozen=True)
class HeatPiece:
    """A stretch of text of one kind.

    Attributes:
        kind: `CERTAIN` comes back in free running too; `AFTER_ERROR` is right if all before it is, and something is
            not; `CLOSE` is right by less than `CLOSE_MARGIN`; `WRONG` is another token, or a character that
            the tokenizer does not keep.
    """

    text: str
    kind: str


def heat_segments(
    context: CompressedContext, source: Source, processor: ProcessorMixin
) -> Iterator[tuple[SegmentFidelity, list[HeatPiece]]]:
    """For each segment its fidelity and its text in pieces of one kind.

    Args:
        context: A whole compressed text with margins.
        source: The text it was made from.

    Raises:
        ValueError: If the context has no margins or the text is another one.
    """
    for index, segment in enumerate(read_segments(context, source, processor)):
        lost = lost_characters(decode_tokens(processor, segment.token_ids), segment.text)
        margins = context.segment_margins(index)
        fidelity = SegmentFidelity.from_margins(margins, len(lost))
        _, offsets = read_segment(processor.reader, segment.text)
        text = segment.text.encode("utf-8", "replace").decode()
        kinds = [CERTAIN] * len(text)
        for start, end, token, margin in character_spans(offsets, margins.tolist(), len(text)):
            kind = heat_kind(margin, fidelity.first_error is not None and token > fidelity.first_error)
            kinds[start:end] = [kind] * (end - start)
        for place in lost:
            kinds[place] = WRONG
        runs = groupby(zip(kinds, text), key=itemgetter(0))
        pieces = [HeatPiece("".join(char for _, char in run), kind) for kind, run in runs]
        yield fidelity, pieces


def render_terminal(context: CompressedContext, source: Source, processor: ProcessorMixin) -> Iterator[str]:
    """The text with ANSI colours, segment after segment; arguments as for [`heat_segments`]."""
    for _, pieces in heat_segments(context, source, processor):
        yield "".join(f"{_ANSI[piece.kind]}{piece.text}{_RESET if _ANSI[piece.kind] else ''}" for piece in pieces)


def render_html(context: CompressedContext, source: Source, processor: ProcessorMixin) -> Iterator[str]:
    """A page of its own, in parts; arguments as for [`heat_segments`]."""
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>What the latents keep</title>\n'
    yield f"<style>\n{_STYLE}\n</style></head><body>\n<h1>What the latents keep</h1>\n"
    yield f"<p>{html.escape(repr(context))}</p>\n"
    yield (
        '<p class="legend"><span>comes back</span><span class="close">comes back, but close</span>'
        '<span class="wrong">wrong</span><span class="after">right, if what is in front of it were</span></p>\n'
        '<div class="text">'
    )
    for index, (fidelity, pieces) in enumerate(heat_segments(context, source, processor)):
        title = f"{fidelity.num_tokens} tokens, {fidelity.num_errors} wrong, first {fidelity.exact_prefix} certain"
        yield f'<span class="mark" title="{title}">{index} · {100 * fidelity.token_accuracy:.1f} %</span> '
        for piece in pieces:
            text = html.escape(piece.text)
            yield text if piece.kind == CERTAIN else f'<span class="{piece.kind}">{text}</span>'
    yield "</div>\n</body></html>\n"


def character_spans(
    offsets: list[tuple[int, int]], margins: list[float], length: int
) -> Iterator[tuple[int, int, int, float]]:
    """Start, end, first token and smallest margin of stretches of characters, where tokens may share a character."""
    position, first, smallest = 0, 0, float("inf")
    for token, (_, end) in enumerate(offsets):
        smallest = min(smallest, margins[token])
        following = offsets[token + 1] if token + 1 < len(offsets) else None
        if following is None:
            yield position, length, first, smallest
        elif following[0] >= end > position:
            yield position, end, first, smallest
            position, first, smallest = end, token + 1, float("inf")


def heat_kind(margin: float, is_after_error: bool) -> str:
    """Which kind a token with this margin is, in front of or behind its segment's first error."""
    if not margin > 0:
        return WRONG
    if margin < CLOSE_MARGIN:
        return CLOSE
    return AFTER_ERROR if is_after_error else CERTAIN
