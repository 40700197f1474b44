"""As many of the text's first tokens as C3 has latents: what the slots would hold without compression."""

from __future__ import annotations

from collections.abc import Sequence

from c3_hf.evaluation.system import SystemSettings
from c3_hf.evaluation.systems import full_text


class TruncationSystem:
    """Keeps `num_latents` tokens of each segment.

    Restoring gives those tokens back as they are: the ceiling of truncation, whatever the decoder's ability to copy.
    """

    def __init__(self, reader: full_text.FullTextSystem, settings: SystemSettings):
        self.reader, self.settings = reader, settings

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """The first `num_latents` tokens of each text."""
        return [self._kept(text) for text in texts]

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The decoder's answer from the first `num_latents` tokens of each segment of each context."""
        segments = (self.settings.meter.segments(context) for context in contexts)
        return self.reader.answer(["".join(map(self._kept, context)) for context in segments], question)

    def slots(self, text: str) -> int:
        """`num_latents`, however long the text."""
        return self.settings.meter.num_latents

    def _kept(self, text: str) -> str:
        return "".join(self.settings.meter.cut(text, self.settings.meter.num_latents)[:1])


def load(settings: SystemSettings) -> TruncationSystem:
    """The system on the decoder of `settings.model`."""
    return TruncationSystem(full_text.load(settings), settings)
