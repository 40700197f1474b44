"""Draws text on a page, as optical compression needs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from c3_hf.evaluation.text_units import has_unspaced_script


MARGIN = 48


def draw_page(text: str, side: int = 1024, font: str | None = None) -> Image.Image:
    """A square white page with `text` in black, in the largest size from 32 to 6 pixels at which all of it fits.

    Args:
        text: Any text. Line breaks are kept; long lines are wrapped at spaces, or anywhere where there are none.
        side: Width and height in pixels; 1,024 is DeepSeek-OCR's base mode.
        font: A TrueType file; DejaVu Sans, which comes with matplotlib, by default.

    Returns:
        An RGB image of `side` by `side` pixels.

    Raises:
        ValueError: If `text` has Han or kana and no `font` is given (DejaVu Sans has none), or does not fit at 6
            pixels.
    """
    if font is None and has_unspaced_script(text):
        raise ValueError("`font` is None, but the text has Han or kana; give a TrueType file that covers them.")
    path = font or _dejavu()
    width = side - 2 * MARGIN
    for size in range(32, 5, -1):
        face = ImageFont.truetype(path, size)
        lines = [part for line in text.expandtabs(4).splitlines() for part in wrap(line, width, face.getlength)]
        height = round(1.25 * size)
        if len(lines) * height <= width:
            return _drawn(lines, face, height, side)
    raise ValueError(
        f"`text` of {len(text)} characters does not fit a page of {side} pixels; cut it or enlarge `side`."
    )


def wrap(line: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """`line` in pieces that `measure` finds no wider than `width`, broken behind the last space where there is one.

    Returns:
        At least one piece; their concatenation is `line`.
    """
    pieces = []
    while measure(line) > width and len(line) > 1:
        low, high = 1, len(line)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if measure(line[:middle]) <= width else (low, middle - 1)
        space = line.rfind(" ", 0, low)
        end = space + 1 if space > 0 else low
        pieces.append(line[:end])
        line = line[end:]
    return [*pieces, line]


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
