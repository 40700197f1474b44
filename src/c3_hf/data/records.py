"""What one line of a training file may hold, the example it becomes, and the reading of files through `datasets`.

Three kinds of records are read:

- plain text, `{"text": "..."}`: tasks are made from it on the fly (`c3_hf.data.tasks`);
- messages, `{"messages": [...], "contexts": [...]}`: chat messages as the processor takes them. Every assistant
  message carries loss unless it has `"loss": false`. `contexts` is optional: each text fills one
  `{"type": "context"}` part that has no text of its own, in order; without such parts they all go in front of the
  first user message;
- conversations, `{"conversations": [{"from": "context" | "human" | "gpt", "value": "..."}]}`: the format of the
  original's training script, where `<image>` in a human turn stands for the contexts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


# The original's stand-in for the context in human turns; in other turns it is ordinary text.
CONVERSATION_CONTEXT_MARK = "<image>"
_CONVERSATION_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# Records that streams are shuffled among.
_SHUFFLE_BUFFER = 1000
_MESSAGE_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TrainingExample:
    """One conversation to train on.

    Attributes:
        messages: chat messages; content is a list of `{"type": "context" | "text", "text": str}` parts.
        loss: for every message, whether its text (and the end-of-turn token after it) carries loss.
        is_open: whether the last message is not at its end, so that no end-of-turn token stands behind it.
    """

    messages: tuple[dict[str, Any], ...]
    loss: tuple[bool, ...]
    is_open: bool = False


def parse_record(record: Mapping[str, Any]) -> TrainingExample | str:
    """Turn a record into a `TrainingExample`, or into its text if it is plain text.

    Fields with the value None count as absent, since `datasets` fills missing columns with None.

    Raises:
        ValueError: if the record has none of the known fields or if a field breaks the schema; the message names it.
    """
    if record.get("messages") is not None:
        return _from_messages(record["messages"], record.get("contexts"))
    if record.get("conversations") is not None:
        return _from_conversations(record["conversations"])
    if isinstance(record.get("text"), str):
        return record["text"]
    raise ValueError(
        f"A training record needs `text`, `messages` or `conversations`, got the fields {sorted(record)}. "
        "See docs/training.md for the schema."
    )


def _from_messages(messages: Sequence[Mapping[str, Any]], contexts: str | Sequence[str] | None) -> TrainingExample:
    given = [contexts] if isinstance(contexts, str) else list(contexts or [])
    waiting = list(given)
    parsed, loss = [], []
    for message in messages:
        role = message.get("role")
        if role not in _MESSAGE_ROLES:
            raise ValueError(f"`messages` roles must be one of {list(_MESSAGE_ROLES)}, got {role!r}.")
        parsed.append({"role": role, "content": _parse_parts(message.get("content"), waiting)})
        flag = message.get("loss")
        loss.append(role == "assistant" and flag is not False)
        if flag and role != "assistant":
            raise ValueError(f"`loss` can be true for assistant messages only, got it on a {role!r} message.")
    if waiting and len(waiting) == len(given):
        first_user = next((message for message in parsed if message["role"] == "user"), None)
        if first_user is None:
            raise ValueError("`contexts` needs a user message in `messages` to go in front of, got none.")
        first_user["content"] = [*_context_parts(waiting), *first_user["content"]]
    elif waiting:
        raise ValueError(
            f"`contexts` has {len(given)} texts, but `messages` takes only {len(given) - len(waiting)} of them in "
            '`{"type": "context"}` parts without a text. Give as many parts as contexts, or no parts at all.'
        )
    _check_loss(loss, "messages")
    return TrainingExample(tuple(parsed), tuple(loss))


def _parse_parts(content: str | Sequence[Mapping[str, Any]] | None, waiting: list[str]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None:
        raise ValueError("Every one of `messages` needs `content`, got none.")
    parts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind == "context" and text is None:
            if not waiting:
                raise ValueError('`messages` has more `{"type": "context"}` parts without a text than `contexts`.')
            text = waiting.pop(0)
        if kind not in ("context", "text") or not isinstance(text, str):
            raise ValueError(f'A content part must be {{"type": "context" or "text", "text": str}}, got {dict(part)}.')
        parts.append({"type": kind, "text": text})
    return parts


def _from_conversations(turns: Sequence[Mapping[str, str]]) -> TrainingExample:
    for turn in turns:
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"Every turn of `conversations` needs a string `value`, got {dict(turn)}.")
    contexts = [turn["value"] for turn in turns if turn.get("from") == "context"]
    messages, loss, placed = [], [], False
    for turn in turns:
        source, value = turn.get("from"), turn["value"]
        if source == "context":
            continue
        if source not in _CONVERSATION_ROLES:
            expected = ["context", *_CONVERSATION_ROLES]
            raise ValueError(f"`conversations` turns must come from one of {expected}, got {source!r}.")
        role = _CONVERSATION_ROLES[source]
        parts = [{"type": "text", "text": value}]
        if role == "user" and CONVERSATION_CONTEXT_MARK in value and contexts and not placed:
            # The template writes the line break between the block and the text itself.
            before, after = value.split(CONVERSATION_CONTEXT_MARK, 1)
            after = after[1:] if after.startswith("\n") else after
            texts = [{"type": "text", "text": before}] if before else []
            parts = [*texts, *_context_parts(contexts), {"type": "text", "text": after}]
            placed = True
        messages.append({"role": role, "content": parts})
        loss.append(role == "assistant")
    if contexts and not placed:
        raise ValueError(
            "`conversations` has a context, but no human turn holds "
            f"{CONVERSATION_CONTEXT_MARK!r} to say where it goes."
        )
    _check_loss(loss, "conversations")
    return TrainingExample(tuple(messages), tuple(loss))


def _context_parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "context", "text": text} for text in texts]


def _check_loss(loss: Sequence[bool], field: str) -> None:
    if not any(loss):
        raise ValueError(
            f"`{field}` holds no assistant message that carries loss, so there is nothing to learn from it."
        )


@dataclass(frozen=True)
class TrainingFile:
    """One JSONL file (plain or gzip) of a mixture.

    Attributes:
        path: the file.
        weight: share of the samples it gets, relative to the other files; positive.
    """

    path: str
    weight: float = 1.0


def parse_files(name: str, entries: Sequence[Any], data_dir: str | None, field: str) -> Iterator[tuple[Path, Any]]:
    """Read a list of files in a recipe: paths, or mappings of `path` and one more field, relative to `data_dir`.

    Yields:
        The path of each, and the field; `None` where an entry does not have it.

    Raises:
        ValueError: if an entry has unknown fields, or a file does not exist; the message names the list, `name`.
    """
    for entry in entries:
        fields = {"path": entry} if isinstance(entry, str) else dict(entry)
        path = Path(data_dir or ".") / str(fields.get("path", ""))
        expected = f"`{name}` entries are existing files or {{path, {field}}}, got {entry}"
        if set(fields) - {"path", field}:
            raise ValueError(f"{expected}.")
        if not path.is_file():
            raise ValueError(f"{expected}: {str(path)!r}, which is no file. Check it and the folder.")
        yield path, fields.get(field)


def parse_training_files(files: Sequence[Any], data_dir: str | None) -> list[TrainingFile]:
    """The `train_files` entry of a recipe: paths, or `{path, weight}` mappings, see [`parse_files`].

    Raises:
        ValueError: if there is none, or a weight is not positive.
    """
    if not files:
        raise ValueError("`train_files` is empty. List at least one JSONL file, as a path or as {path, weight}.")
    parsed = []
    for path, weight in parse_files("train_files", files, data_dir, "weight"):
        parsed.append(TrainingFile(str(path), 1.0 if weight is None else float(weight)))
        if parsed[-1].weight <= 0:
            raise ValueError(f"`train_files` needs a positive weight for {str(path)!r}, got {weight}.")
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
        """Draw one record and parse it, see [`parse_record`]."""
        number = min(int(np.searchsorted(self._file_ends, rng.random(), side="right")), len(self._datasets) - 1)
        ends = self._record_ends[number]
        record = int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))
        return parse_record(self._datasets[number][record])


class StreamingSource:
    """The same files read in order through a shuffle buffer and interleaved by weight, again and again.

    Args:
        files: the files and their weights.
        seed: of the shuffling and the interleaving.
    """

    def __init__(self, files: Sequence[TrainingFile], seed: int) -> None:
        from datasets import interleave_datasets, load_dataset

        streams = [load_dataset("json", data_files=file.path, split="train", streaming=True) for file in files]
        streams = [stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) for stream in streams]
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
