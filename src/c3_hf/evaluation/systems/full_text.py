"""The same decoder reading the whole text: what it can do when nothing is compressed."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, ProcessorMixin

from c3_hf.evaluation.checkpoint import batches, load_checkpoint, replies
from c3_hf.evaluation.interface import SystemSettings
from c3_hf.modeling.prompt_c3 import RESTORE_PROMPT


class FullTextSystem:
    """The text stands in the prompt where C3 puts latents; the wording is the same.

    Args:
        model: A C3 model; its encoder is not used.
        processor: Its processor.
        settings: Sizes and limits.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: SystemSettings):
        self.model, self.processor, self.settings = model, processor, settings

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text as the decoder repeats it."""
        outputs: list[str | None] = []
        for batch in batches(texts, self.settings.batch_size):
            chats = [[{"role": "user", "content": f"{text}\n{RESTORE_PROMPT}"}] for text in batch]
            outputs += replies(
                self.model, self.processor, chats, [self.settings.restore_limit(text) for text in batch]
            )
        return outputs

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer from the whole contexts, one after the other."""
        chat = [{"role": "user", "content": "\n\n".join([*contexts, question])}]
        return replies(self.model, self.processor, [chat], [self.settings.answer_tokens])[0]

    def slots(self, text: str) -> int:
        """The text's tokens."""
        return self.settings.meter.count(text)


def load(settings: SystemSettings) -> FullTextSystem:
    """The system on the decoder of `settings.model`."""
    return FullTextSystem(*load_checkpoint(settings), settings)
