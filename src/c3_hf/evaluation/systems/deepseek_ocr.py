"""Optical compression: the text drawn on a page and read by a DeepSeek-OCR-like checkpoint (arXiv 2510.18234)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from c3_hf.evaluation.interface import SystemSettings, SystemUnavailable
from c3_hf.evaluation.pages import PageTooSmall, draw_page


# The prompt of DeepSeek-OCR's README for plain text without layout.
PROMPT = "<image>\nFree OCR. "
# GOT-OCR2's processor writes its own prompt around the page.
_OWN_PROMPT = ("got_ocr2",)


class PageSystem:
    """Every segment becomes one page; the model sees the page and a prompt.

    Args:
        model: An image-text-to-text model of transformers.
        processor: Its processor.
        settings: Sizes, limits and font.
    """

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
