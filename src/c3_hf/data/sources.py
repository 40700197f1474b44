"""Training files through `datasets`: random access or streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .schema import TrainingExample, parse_record


@dataclass(frozen=True)
class TrainingFile:
    """One JSONL file (plain or gzip) of a mixture.

    Attributes:
        path: the file.
        weight: share of the samples it gets, relative to the other files; positive.
    """

    path: str
    weight: float = 1.0


def parse_training_files(files: Sequence[Any], data_dir: str | None) -> list[TrainingFile]:
    """Read the `train_files` entry of a recipe: paths, or `{path, weight}` mappings, relative to `data_dir`.

    Raises:
        ValueError: if there is none, an entry has unknown fields or no positive weight, or a file does not exist.
    """
    if not files:
        raise ValueError("`train_files` is empty. List at least one JSONL file, as a path or as {path, weight}.")
    parsed = []
    for entry in files:
        fields = {"path": entry} if isinstance(entry, str) else dict(entry)
        if "path" not in fields or set(fields) - {"path", "weight"} or float(fields.get("weight", 1)) <= 0:
            raise ValueError(
                f"`train_files` entries are paths or {{path, weight}} with a positive weight, got {entry}."
            )
        path = Path(data_dir or ".") / fields["path"]
        if not path.is_file():
            raise ValueError(f"`train_files` names {str(path)!r}, which is no file. Check it and `data_dir`.")
        parsed.append(TrainingFile(str(path), float(fields.get("weight", 1))))
    return parsed


class RecordSource:
    """Random access to the records of the files of a mixture.

    A file is drawn by its weight, then a record: texts by their length in characters, so that every passage of a file
    is equally likely, other records evenly.
    """

    def __init__(self, files: Sequence[TrainingFile]) -> None:
        from datasets import load_dataset

        self._datasets = [load_dataset("json", data_files=file.path, split="train") for file in files]
        weights = np.array([file.weight for file in files])
        self._file_ends = np.cumsum(weights / weights.sum())
        self._record_ends = [_record_ends(dataset) for dataset in self._datasets]

    @property
    def num_records(self) -> int:
        """Records of all files together."""
        return sum(map(len, self._datasets))

    def draw(self, rng: np.random.Generator) -> TrainingExample | str:
        """Draw one record and parse it, see `c3_hf.data.schema`."""
        number = min(int(np.searchsorted(self._file_ends, rng.random(), side="right")), len(self._datasets) - 1)
        ends = self._record_ends[number]
        record = int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))
        return parse_record(self._datasets[number][record])


class StreamingSource:
    """The same files read in order through a shuffle buffer and interleaved by weight, again and again.

    Args:
        files: the files and their weights.
        seed: of the shuffling and the interleaving.
        buffer_size: records the shuffle buffer holds.
    """

    def __init__(self, files: Sequence[TrainingFile], seed: int, buffer_size: int = 1000) -> None:
        from datasets import interleave_datasets, load_dataset

        streams = [load_dataset("json", data_files=file.path, split="train", streaming=True) for file in files]
        streams = [stream.shuffle(seed=seed, buffer_size=buffer_size) for stream in streams]
        weights = np.array([file.weight for file in files])
        self._stream = interleave_datasets(
            [stream.repeat(None) for stream in streams], probabilities=list(weights / weights.sum()), seed=seed
        )

    def __iter__(self) -> Iterator[TrainingExample | str]:
        return map(parse_record, self._stream)


def _record_ends(dataset: Any) -> np.ndarray:
    import pyarrow.compute as compute

    if "text" not in dataset.column_names or {"messages", "conversations"} & set(dataset.column_names):
        return np.arange(1, len(dataset) + 1)
    lengths = compute.utf8_length(dataset.data.column("text")).to_numpy()
    return np.cumsum(np.maximum(lengths, 1))
