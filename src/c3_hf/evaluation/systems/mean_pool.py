"""Mean-pooled token embeddings as latents: C3 without an encoder, and without training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import adaptive_avg_pool1d

from c3_hf.evaluation.system import DecoderSystem


class MeanPoolSystem(DecoderSystem):
    """Each segment's decoder embeddings, averaged over `num_latents` equal spans, stand where C3 puts its latents.

    The simplest compressor of the same size. Published comparisons train it (arXiv 2512.03643 finds it level with
    optical compression); this one is untrained, a floor. The encoder is not used.
    """

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text from its pooled embeddings, by the checkpoint's "Repeat the text: " prompt."""
        return self.restored(texts, lambda text: self.processor.restore_messages(self.pooled([text])))

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer from the pooled embeddings of every segment of the contexts."""
        segments = [segment for context in contexts for segment in self.settings.meter.segments(context)]
        latents = self.pooled(segments)
        return self.answered([{"type": "context", "latents": latents}, {"type": "text", "text": question}])

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


load = MeanPoolSystem
