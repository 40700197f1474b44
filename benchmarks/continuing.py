"""What a context is worth to a model that continues it: the loss of the continuation with its own context and with
that of another text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from c3_hf.data.collator import C3DataCollator
from c3_hf.data.lengths import SampleKey
from c3_hf.data.mixture import Sample, cut_to_tokens
from c3_hf.data.tasks import continue_text
from c3_hf.training.held_out import inputs_and_labels


NUM_TOKENS = 160
BATCH_SIZE = 25


@torch.no_grad()
def measure_continuations(model: Any, processor: Any, texts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Mean loss of held-out continuations, in nats a token, and for how many texts the own context is the better one.

    Args:
        texts: of which the first `NUM_TOKENS` tokens count: context and continuation together.
    """
    rng, collator = np.random.default_rng(seed), C3DataCollator(processor)
    samples = [
        Sample(continue_text(rng, cut_to_tokens(processor.tokenizer, text, NUM_TOKENS)), SampleKey(0, 0))
        for text in texts
    ]
    own: list[float] = []
    other: list[float] = []
    for start in range(0, len(samples), BATCH_SIZE):
        inputs, labels = inputs_and_labels(collator(samples[start : start + BATCH_SIZE]), model.device)
        own += losses(model, inputs, labels)
        for name in ("context_input_ids", "context_attention_mask"):
            inputs[name] = inputs[name].roll(1, dims=0)
        other += losses(model, inputs, labels)
    return {
        "texts": len(texts),
        "loss": round(statistics.mean(own), 4),
        "loss_with_another_context": round(statistics.mean(other), 4),
        "own_context_better": sum(a < b for a, b in zip(own, other)),
    }


def losses(model: Any, inputs: dict[str, Any], labels: torch.LongTensor) -> list[float]:
    """Mean cross-entropy of each row's labels `(batch_size, num_labels)`."""
    logits = model(**inputs).logits[:, :-1].float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (each.sum(dim=1) / (labels != -100).sum(dim=1)).tolist()
