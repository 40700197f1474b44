"""Restoring of held-out text during training: teacher-forced token accuracy and free-running character precision."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.collator import C3DataCollator
from ..data.lengths import SampleKey
from ..data.mixture import Sample, cut_to_tokens
from ..data.tasks import restore
from ..pipeline import restore_texts


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


def parse_held_out_files(entries: Sequence[Any], data_dir: str | None) -> list[HeldOutFile]:
    """Read the `eval_files` entry of a recipe: paths, or `{path, kind}` mappings, relative to `data_dir`.

    Raises:
        ValueError: if an entry has unknown fields or a file does not exist.
    """
    files = []
    for entry in entries:
        fields = {"path": entry} if isinstance(entry, str) else dict(entry)
        path = Path(data_dir or ".") / fields.get("path", "")
        if set(fields) - {"path", "kind"} or not path.is_file():
            raise ValueError(
                f"`eval_files` entries are existing files or {{path, kind}}, got {entry} ({str(path)!r})."
            )
        files.append(HeldOutFile(path, fields.get("kind")))
    return files


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
        opener = gzip.open if file.path.suffix == ".gz" else open
        with opener(file.path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        texts = [record["text"] for record in records if file.kind is None or record["kind"] == file.kind]
        for ratio in ratios:
            num_tokens = round(ratio * processor.num_latents)
            heads = (cut_to_tokens(processor.reader, text, num_tokens) for text in texts)
            long = [head for head, text in zip(heads, texts) if len(head) < len(text)][:num_items]
            if not long:
                raise ValueError(f"`eval_files`: {file.name!r} has no text of {num_tokens} tokens (ratio {ratio:g}).")
            cut += [HeldOutText(file.name, ratio, head) for head in long]
    return cut


def inputs_and_labels(batch: dict[str, Any], device: torch.device | str) -> tuple[dict[str, Any], torch.LongTensor]:
    """What of a collated batch goes into the model, and the labels `(batch_size, num_labels)` of all logits that it
    keeps but the last."""
    inputs = {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in batch.items()
        if name not in ("labels", "outcome_counts")
    }
    return inputs, batch["labels"][:, -batch["logits_to_keep"] + 1 :].to(device)


@torch.no_grad()
def token_accuracy(model: nn.Module, collator: C3DataCollator, texts: Sequence[str], batch_size: int = 16) -> float:
    """Teacher-forced accuracy: share (0 to 1) of tokens, end of turn included, that are the likeliest given the true
    text before them."""
    right = total = 0
    rng = np.random.default_rng()
    device = next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        examples = [restore(rng, text) for text in texts[start : start + batch_size]]
        batch = collator([Sample(example, SampleKey(0, 0)) for example in examples])
        inputs, labels = inputs_and_labels(batch, device)
        predicted = model(**inputs).logits[:, :-1].argmax(dim=-1)
        counted = labels != -100
        right += int(((predicted == labels) & counted).sum())
        total += int(counted.sum())
    return right / total


def free_running_precision(model: nn.Module, processor: Any, texts: Sequence[str]) -> float:
    """Mean character precision of greedy restoring: 1 - edit distance / length of the longer text, 0 to 1."""
    from rapidfuzz.distance import Levenshtein

    longest = max(len(ids) for ids, _ in processor.reader.read_plain(list(texts)))
    restored = restore_texts(model, processor, list(texts), max_new_tokens=longest + 16)
    return sum(map(Levenshtein.normalized_similarity, texts, restored)) / len(texts)
