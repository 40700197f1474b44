"""C3 itself: the text in latents, any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from c3_hf.evaluation.system import DecoderSystem, SystemSettings, load_checkpoint
from c3_hf.latents.restoring import context_room, restore_texts


class C3System(DecoderSystem):
    """Every text is compressed to `num_latents` latents; the decoder sees nothing else of it."""

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text from its latents, by the checkpoint's "Repeat the text: " prompt."""
        taken = [place for place, text in enumerate(texts) if self._fits(text)]
        restored = restore_texts(
            self.model,
            self.processor,
            [texts[place] for place in taken],
            batch_size=self.settings.batch_size,
            max_new_tokens=self.settings.max_new_tokens,
        )
        found = dict(zip(taken, restored))
        return [found.get(place) for place in range(len(texts))]

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer from the contexts' latents; a context longer than a segment becomes several blocks."""
        segments = [segment for context in contexts for segment in self.settings.meter.segments(context)]
        if not all(map(self._fits, segments)):
            return None
        content = [{"type": "context", "text": segment} for segment in segments]
        return self.answered([*content, {"type": "text", "text": question}])

    def slots(self, text: str) -> int:
        """`num_latents`, however long the text."""
        return self.settings.meter.num_latents

    def _fits(self, text: str) -> bool:
        return len(self.processor.tokenize_context(text)) <= context_room(self.model)


def load(settings: SystemSettings) -> C3System:
    """The system of the checkpoint `settings.model`."""
    return C3System(*load_checkpoint(settings), settings)
