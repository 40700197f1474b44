"""LLMLingua-2: the text with the least informative tokens dropped (arXiv 2403.12968)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from c3_hf.evaluation.system import SystemSettings, SystemUnavailable
from c3_hf.evaluation.systems import full_text


# The smaller of the two checkpoints the authors released.
DEFAULT_MODEL = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"


class LLMLingua2System:
    """Keeps about as many tokens of each segment as C3 has latents.

    Restoring gives the kept words back as they are: the method has no decoder for what it drops.

    Args:
        compressor: A `llmlingua.PromptCompressor` in LLMLingua-2 mode.
    """

    def __init__(self, compressor: Any, reader: full_text.FullTextSystem, settings: SystemSettings):
        self.compressor, self.reader, self.settings = compressor, reader, settings

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """The kept words of each text."""
        return [self._kept(text) for text in texts]

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The decoder's answer from the kept words of each segment of each context."""
        segments = (self.settings.meter.segments(context) for context in contexts)
        return self.reader.answer([" ".join(map(self._kept, context)) for context in segments], question)

    def slots(self, text: str) -> int:
        """Tokens of the kept words."""
        return self.settings.meter.count(self._kept(text))

    def _kept(self, text: str) -> str:
        rate = self.settings.meter.num_latents / max(1, self.settings.meter.count(text))
        if rate >= 1.0:
            return text
        return self.compressor.compress_prompt([text], rate=rate)["compressed_prompt"]


def load(settings: SystemSettings) -> LLMLingua2System:
    """The system with the weights `settings.system_model` (default `DEFAULT_MODEL`).

    Raises:
        SystemUnavailable: If the package `llmlingua` is not installed or its weights cannot be reached.
    """
    try:
        from llmlingua import PromptCompressor
    except ImportError as error:
        raise SystemUnavailable("the package `llmlingua` is not installed (pip install llmlingua)") from error
    name = settings.system_model or DEFAULT_MODEL
    try:
        compressor = PromptCompressor(model_name=name, use_llmlingua2=True, device_map=settings.device)
    except OSError as error:
        raise SystemUnavailable(f"the weights {name!r} cannot be reached: {str(error).splitlines()[0]}") from error
    return LLMLingua2System(compressor, full_text.load(settings), settings)
