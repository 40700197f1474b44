"""The same decoder reading the whole text: what it can do when nothing is compressed."""

from __future__ import annotations

from collections.abc import Sequence

from c3_hf.evaluation.system import DecoderSystem
from c3_hf.modeling.prompt_c3 import RESTORE_PROMPT


class FullTextSystem(DecoderSystem):
    """The text stands in the prompt where C3 puts latents; the wording is the same. The encoder is not used."""

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text as the decoder repeats it."""
        return self.restored(texts, lambda text: [{"role": "user", "content": f"{text}\n{RESTORE_PROMPT}"}])

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer from the whole contexts, one after the other."""
        return self.answered("\n\n".join([*contexts, question]))

    def slots(self, text: str) -> int:
        """The text's tokens."""
        return self.settings.meter.count(text)


load = FullTextSystem
