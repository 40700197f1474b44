"""What is measured while training: speed, accuracy by length, what the collator met, restoring of held-out text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from ..data.collator import OUTCOMES, C3DataCollator
from ..data.lengths import SampleKey
from ..data.samples import Sample, cut_to_tokens
from ..data.tasks import restore
from ..files import append_jsonl, read_jsonl
from ..pipeline import C3Pipeline
from .losses import count_right


# Contexts are sorted into bins by length in tokens: up to 8, 9 to 16, 17 to 32, ... and above the last.
LENGTH_BINS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class JsonlLog(TrainerCallback):
    """Appends every log entry to a JSONL file, with the step and the seconds since the start of the process."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write one line; called by the Trainer."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "seconds": round(time.monotonic() - self._start, 1), **logs}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self._path, [entry])


class TrainingMeter:
    """Counts tokens, right answers and outcomes between two log entries, over all processes."""

    def __init__(self) -> None:
        self._outcomes = torch.zeros(len(OUTCOMES), dtype=torch.long)
        self._right = torch.zeros(len(LENGTH_BINS) + 1, 2, dtype=torch.long)
        # Of the read-out, then of the look-up: right ones and all.
        self._extra = torch.zeros(4, dtype=torch.long)
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
        self._extra[:2] += counts.cpu()

    def add_looked(self, counts: torch.Tensor) -> None:
        """Take in how many heads of the look-up look at the right latent, and how many there are, likewise."""
        self._extra[2:] += counts.cpu()

    def restart_clock(self) -> None:
        """Leave the time since the last entry out of the speed, as after an evaluation."""
        self._clock = time.monotonic()

    def collect(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the entries since the last call and start anew.

        Args:
            total: sums a tensor over all processes.
        """
        now = time.monotonic()
        counts = torch.cat([torch.tensor([self._tokens]), self._extra, self._outcomes, self._right.flatten()])
        values = total(counts).tolist()
        entries: dict[str, float] = {"tokens_per_second": round(values[0] / max(now - self._clock, 1e-9), 1)}
        entries.update({f"outcome_{name}": count for name, count in zip(OUTCOMES, values[5:]) if count})
        for name, (right, asked) in zip(("readout", "lookup"), (values[1:3], values[3:5])):
            if asked:
                entries[f"{name}_accuracy"] = round(right / asked, 4)
        pairs = values[5 + len(OUTCOMES) :]
        names = [*(f"accuracy_to_{limit}" for limit in LENGTH_BINS), f"accuracy_over_{LENGTH_BINS[-1]}"]
        for name, right, labelled in zip(names, pairs[::2], pairs[1::2]):
            if labelled:
                entries[name] = round(right / labelled, 4)
        self._tokens, self._clock = 0, now
        self._extra.zero_()
        self._outcomes.zero_()
        self._right.zero_()
        return entries


@dataclass(frozen=True)
class HeldOutFile:
    """A JSONL file with `text`; with `kind`, only its records of that `kind` count."""

    path: Path
    kind: str | None

    @property
    def name(self) -> str:
        """How results name it: the kind, or the file without its suffixes."""
        return self.kind or self.path.name.partition(".")[0]


@dataclass(frozen=True)
class HeldOutText:
    """One text to restore: name of its source, compression ratio, and the text itself."""

    source: str
    ratio: float
    text: str


def read_held_out(
    files: Sequence[HeldOutFile], processor: Any, ratios: Sequence[float], num_items: int
) -> list[HeldOutText]:
    """Cut held-out texts to `ratio * num_latents` tokens.

    The first `num_items` texts of a file and ratio that are long enough are taken, so that runs compare.

    Raises:
        ValueError: if a file has no text long enough for a ratio.
    """
    cut = []
    for file in files:
        records = (record for record in read_jsonl(file.path) if file.kind in (None, record.get("kind")))
        texts = [record["text"] for record in records if "text" in record]
        for ratio in ratios:
            num_tokens = round(ratio * processor.num_latents)
            heads = (cut_to_tokens(processor.reader, text, num_tokens) for text in texts)
            long = [head for head, text in zip(heads, texts) if len(head) < len(text)][:num_items]
            if not long:
                raise ValueError(f"`eval_files`: {file.name!r} has no text of {num_tokens} tokens (ratio {ratio:g}).")
            cut += [HeldOutText(file.name, ratio, head) for head in long]
    return cut


@torch.no_grad()
def token_accuracy(model: nn.Module, collator: C3DataCollator, texts: Sequence[str], batch_size: int = 16) -> float:
    """Teacher-forced accuracy: share (0 to 1) of tokens, end of turn included, that are the likeliest given the true
    text before them."""
    counts = torch.zeros(2, dtype=torch.long)
    rng = np.random.default_rng()
    device = next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        examples = [restore(rng, text) for text in texts[start : start + batch_size]]
        batch = collator([Sample(example, SampleKey(0, 0)) for example in examples])
        labels = batch.pop("labels").to(device)
        del batch["outcome_counts"]
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        counts += count_right(model(**inputs).logits, labels).cpu()
    right, total = counts.tolist()
    return right / total


def free_running(model: nn.Module, processor: Any, texts: Sequence[str]) -> tuple[float, float]:
    """Mean character precision of greedy restoring, 1 - edit distance / length of the longer text, and the share of
    texts that come back whole; both 0 to 1."""
    from rapidfuzz.distance import Levenshtein

    longest = max(len(ids) for ids, _ in processor.reader.read_plain(list(texts)))
    restored = C3Pipeline(model, processor).round_trip(list(texts), max_new_tokens=longest + 16)
    precision = sum(map(Levenshtein.normalized_similarity, texts, restored)) / len(texts)
    return precision, sum(map(str.__eq__, texts, restored)) / len(texts)
