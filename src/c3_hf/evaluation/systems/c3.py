"""C3 itself: the text in latents, any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from c3_hf.evaluation.system import DecoderSystem, SystemSettings
from c3_hf.latents.decoding import GREEDY, decoder_positions


class C3System(DecoderSystem):
    """Every text is compressed to `num_latents` latents, as `compress` stores them; the decoder sees nothing else."""

    def __init__(self, settings: SystemSettings):
        super().__init__(settings)
        self.room = self.pipe.segment_room

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text from its latents, by the checkpoint's "Repeat the text: " prompt."""
        taken = [place for place, text in enumerate(texts) if self._fits(text)]
        options = {"batch_size": self.settings.batch_size, "max_new_tokens": self.settings.max_new_tokens}
        restored = self.pipe.round_trip([texts[place] for place in taken], **options)
        found = dict(zip(taken, restored))
        return [found.get(place) for place in range(len(texts))]

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer from the contexts' latents; a context longer than a segment becomes several blocks."""
        segments = [segment for context in contexts for segment in self.settings.meter.segments(context)]
        if not all(map(self._fits, segments)):
            return None
        compressed = [self.pipe.compress(segment, segment_length=self.room) for segment in segments]
        content = [{"type": "context", "context": context} for context in compressed]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        limit = self.settings.answer_tokens
        if self.pipe.positions_taken(messages) + limit > decoder_positions(self.model):
            return None
        return self.pipe(messages, max_new_tokens=limit, **GREEDY)

    def slots(self, text: str) -> int:
        """`num_latents`, however long the text."""
        return self.settings.meter.num_latents

    def _fits(self, text: str) -> bool:
        return len(self.processor.tokenize_context(text)) <= self.room


load = C3System
