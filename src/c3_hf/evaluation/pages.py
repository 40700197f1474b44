"""Draws text on a page, as optical compression needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

from PIL import Image, ImageDraw, ImageFont

from c3_hf.evaluation.text_units import has_unspaced_script


MARGIN = 48


class PageTooSmall(ValueError):
    """A text does not fit a page at the smallest size."""


def draw_page(text: str, side: int = 1024, font: str | None = None) -> Image.Image:
    """A square white page with `text` in black, in the largest size from 32 to 6 pixels at which all of it fits.

    Args:
        text: Any text. Line breaks are kept; long lines are wrapped at spaces, or anywhere where there are none.
        side: Width and height in pixels; 1,024 is DeepSeek-OCR's base mode.
        font: A TrueType file; DejaVu Sans, which comes with matplotlib, by default.

    Returns:
        An RGB image of `side` by `side` pixels.

    Raises:
        ValueError: If `text` has Han or kana and no `font` is given (DejaVu Sans has none).
        PageTooSmall: If `text` does not fit at 6 pixels.
    """
    if font is None and has_unspaced_script(text):
        raise ValueError("`font` is None, but the text has Han or kana; give a TrueType file that covers them.")
    path = font or _dejavu()
    # The smallest first: most of the time of a page that is too small would go into the larger sizes.
    if _set(text, path, 6, side) is None:
        raise PageTooSmall(
            f"`text` of {len(text)} characters does not fit a page of {side} pixels; cut it or enlarge `side`."
        )
    pages = (_set(text, path, size, side) for size in range(32, 5, -1))
    return next(page for page in pages if page is not None)


def _set(text: str, path: str, size: int, side: int) -> Image.Image | None:
    """The page in one size of the font, `None` if the text does not fit."""
    face = ImageFont.truetype(path, size)
    width, height = side - 2 * MARGIN, round(1.25 * size)
    capacity = width // height
    wrapped = (part for line in text.expandtabs(4).splitlines() for part in wrap(line, width, face.getlength))
    lines = list(islice(wrapped, capacity + 1))
    return _drawn(lines, face, height, side) if len(lines) <= capacity else None


def wrap(line: str, width: float, measure: Callable[[str], float]) -> Iterator[str]:
    """Cut `line` into pieces that `measure` finds no wider than `width`, behind the last space where there is one.

    Yields:
        At least one piece; their concatenation is `line`. A single character wider than `width` is a piece.
    """
    start = 0
    while True:
        fits = _fitting(line, start, width, measure)
        if start + fits >= len(line):
            yield line[start:]
            return
        space = line.rfind(" ", start + 1, start + fits)
        end = space + 1 if space > 0 else start + fits
        yield line[start:end]
        start = end


def _fitting(line: str, start: int, width: float, measure: Callable[[str], float]) -> int:
    """Largest number of characters from `start` that fit, at least 1; looks no further than twice as far."""
    rest = len(line) - start
    high = 1
    while high < rest and measure(line[start : start + high]) <= width:
        high *= 2
    low, high = 1, min(high, rest)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(line[start : start + middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _drawn(lines: list[str], face: ImageFont.FreeTypeFont, height: int, side: int) -> Image.Image:
    page = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * height), line, fill="black", font=face)
    return page


@lru_cache(maxsize=1)
def _dejavu() -> str:
    from matplotlib import font_manager

    return font_manager.findfont("DejaVu Sans")
