"""Mean-pooled token embeddings as latents: C3 without an encoder, and without training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import adaptive_avg_pool1d
from transformers import PreTrainedModel, ProcessorMixin

from c3_hf.evaluation.checkpoint import batches, load_checkpoint, replies
from c3_hf.evaluation.interface import SystemSettings


class MeanPoolSystem:
    """Each segment's decoder embeddings, averaged over `num_latents` equal spans, stand where C3 puts its latents.

    The simplest compressor of the same size. Published comparisons train it (arXiv 2512.03643 finds it level with
    optical compression); this one is untrained, a floor.

    Args:
        model: A C3 model; its encoder is not used.
        processor: Its processor.
        settings: Sizes and limits.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: SystemSettings):
        self.model, self.processor, self.settings = model, processor, settings

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text from its pooled embeddings, by the checkpoint's "Repeat the text: " prompt."""
        outputs: list[str | None] = []
        for batch in batches(texts, self.settings.batch_size):
            chats = [self.processor.restore_messages(self.pooled([text])) for text in batch]
            outputs += replies(
                self.model, self.processor, chats, [self.settings.restore_limit(text) for text in batch]
            )
        return outputs

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer from the pooled embeddings of every segment of the contexts."""
        segments = [segment for context in contexts for segment in self.settings.meter.segments(context)]
        content = [{"type": "context", "latents": self.pooled(segments)}, {"type": "text", "text": question}]
        return replies(
            self.model, self.processor, [[{"role": "user", "content": content}]], [self.settings.answer_tokens]
        )[0]

    def slots(self, text: str) -> int:
        """`num_latents`, however long the text."""
        return self.settings.meter.num_latents

    @torch.no_grad()
    def pooled(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled embeddings `(len(texts), num_latents, text_hidden_size)`; an empty text has zeros."""
        embed = self.model.get_input_embeddings()
        blocks = []
        for text in texts:
            ids = torch.tensor(self.settings.meter.encode(text), dtype=torch.long, device=self.model.device)
            vectors = embed(ids).T if len(ids) else embed.weight.new_zeros((embed.weight.shape[1], 1))
            blocks.append(adaptive_avg_pool1d(vectors, self.settings.meter.num_latents).T)
        return torch.stack(blocks)


def load(settings: SystemSettings) -> MeanPoolSystem:
    """The system on the decoder of `settings.model`."""
    return MeanPoolSystem(*load_checkpoint(settings), settings)
