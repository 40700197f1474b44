"""What a training log says beside the loss: speed, accuracy by length, and what the collator met."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..data.collator import OUTCOMES


# Contexts are sorted into bins by length in tokens: up to 8, 9 to 16, 17 to 32, ... and above the last.
LENGTH_BINS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class TrainingMeter:
    """Counts tokens, right answers and outcomes between two log entries, over all processes."""

    def __init__(self) -> None:
        self._outcomes = torch.zeros(len(OUTCOMES), dtype=torch.long)
        self._right = torch.zeros(len(LENGTH_BINS) + 1, 2, dtype=torch.long)
        self._read = torch.zeros(2, dtype=torch.long)
        self._tokens = 0
        self._clock = time.monotonic()

    def add(self, num_tokens: int, context_length: int, right: torch.Tensor, outcomes: torch.Tensor) -> None:
        """Take in one micro-batch.

        Args:
            num_tokens: positions that went through the model, encoder and decoder together.
            context_length: padded length of its contexts, in tokens.
            right: right and all labelled tokens, int64 of shape `(2,)`.
            outcomes: counts of the collator, int64 of shape `(len(OUTCOMES),)`.
        """
        self._tokens += num_tokens
        self._outcomes += outcomes.cpu()
        number = sum(context_length > limit for limit in LENGTH_BINS)
        self._right[number] += right.cpu()

    def add_read(self, counts: torch.Tensor) -> None:
        """Take in the right and all tokens read out of the latents of a micro-batch: int64 of shape `(2,)`."""
        self._read += counts.cpu()

    def restart_clock(self) -> None:
        """Leave the time since the last entry out of the speed, as after an evaluation."""
        self._clock = time.monotonic()

    def collect(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the entries since the last call and start anew.

        Args:
            total: sums a tensor over all processes.
        """
        now = time.monotonic()
        counts = torch.cat([torch.tensor([self._tokens]), self._read, self._outcomes, self._right.flatten()])
        values = total(counts).tolist()
        entries: dict[str, float] = {"tokens_per_second": round(values[0] / max(now - self._clock, 1e-9), 1)}
        entries.update({f"outcome_{name}": count for name, count in zip(OUTCOMES, values[3:]) if count})
        if values[2]:
            entries["readout_accuracy"] = round(values[1] / values[2], 4)
        pairs = values[3 + len(OUTCOMES) :]
        names = [*(f"accuracy_to_{limit}" for limit in LENGTH_BINS), f"accuracy_over_{LENGTH_BINS[-1]}"]
        for name, right, labelled in zip(names, pairs[::2], pairs[1::2]):
            if labelled:
                entries[name] = round(right / labelled, 4)
        self._tokens, self._clock = 0, now
        self._read.zero_()
        self._outcomes.zero_()
        self._right.zero_()
        return entries
