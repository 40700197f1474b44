"""Optical compression: the text drawn on a page and read by a DeepSeek-OCR-like checkpoint (arXiv 2510.18234)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from c3_hf.evaluation.metrics.words import has_unspaced_script
from c3_hf.evaluation.system import SystemSettings, SystemUnavailable


# The prompt of DeepSeek-OCR's README for plain text without layout.
PROMPT = "<image>\nFree OCR. "
# GOT-OCR2's processor writes its own prompt around the page.
_OWN_PROMPT = ("got_ocr2",)
MARGIN = 48


class PageSystem:
    """Every segment becomes one page; the model sees the page and a prompt."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: SystemSettings):
        self.model, self.processor, self.settings = model, processor, settings

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text as the model reads it from its page; `None` for one that does not fit a page."""
        return [self._read(text, PROMPT, self.settings.restore_limit(text)) for text in texts]

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The model's answer from one page with all contexts; `None` if they do not fit."""
        return self._read("\n\n".join(contexts), f"<image>\n{question}", self.settings.answer_tokens)

    def slots(self, text: str) -> int:
        """Placeholder tokens of a page in the model's prompt: all pages have one size, whatever is on them."""
        inputs = self._inputs("", PROMPT)
        return int((inputs["input_ids"] == self.processor.image_token_id).sum())

    def _inputs(self, text: str, prompt: str):
        page = draw_page(text, font=self.settings.font)
        written = {} if self.model.config.model_type in _OWN_PROMPT else {"text": prompt}
        return self.processor(images=page, return_tensors="pt", **written)

    @torch.no_grad()
    def _read(self, text: str, prompt: str, max_new_tokens: int) -> str | None:
        try:
            inputs = self._inputs(text, prompt).to(self.model.device, self.model.dtype)
        except PageTooSmall:
            return None
        sequences = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load(settings: SystemSettings) -> PageSystem:
    """The system with the weights `settings.system_model`.

    Raises:
        SystemUnavailable: If no `system_model` is given, or it cannot be reached.
    """
    if settings.system_model is None:
        raise SystemUnavailable("no OCR checkpoint is given; name one, such as deepseek-ai/DeepSeek-OCR-2")
    try:
        processor = AutoProcessor.from_pretrained(settings.system_model)
        model = AutoModelForImageTextToText.from_pretrained(
            settings.system_model, dtype=getattr(torch, settings.dtype)
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SystemUnavailable(f"the weights {settings.system_model!r} cannot be reached: {reason}") from error
    return PageSystem(model.to(settings.device).eval(), processor, settings)


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
    if len(lines) > capacity:
        return None
    page = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * height), line, fill="black", font=face)
    return page


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
    high = 1
    while start + high < len(line) and measure(line[start : start + high]) <= width:
        high *= 2
    sizes = range(1, min(high, len(line) - start) + 1)
    return max(1, bisect_right(sizes, width, key=lambda size: measure(line[start : start + size])))


@lru_cache(maxsize=1)
def _dejavu() -> str:
    from matplotlib import font_manager

    return font_manager.findfont("DejaVu Sans")
