"""What a run keeps: its config, one line an item as it finishes, its summary last; what a report reads, and means."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np

from c3_hf.evaluation.catalogue import score_answer, score_restoration
from c3_hf.evaluation.items import Item, RestoreItem, TokenMeter
from c3_hf.evaluation.system import System
from c3_hf.files import append_jsonl, numbered_jsonl, read_json_object, write_json


Row = TypeVar("Row")

CONFIG, SUMMARY, ITEMS = "config.json", "summary.json", "items"
# Means that an interval is read off; drawn with one seed, so that the same values give the same interval.
_RESAMPLES = 2000
# What a line of an item must have to be one.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "id": str,
    "kind": str,
    "lang": str,
    "bin": str,
    "source": str,
    "inputs_hash": str,
    "num_tokens": int,
    "num_characters": int,
    "slots": int,
    "refused": bool,
    "metrics": dict,
    "seconds": (int, float),
}


def make_record(
    task: str,
    item: Item,
    answer: str | None,
    system: System,
    meter: TokenMeter,
    meteor: bool,
    hash_only: re.Pattern | None,
    seconds: float,
) -> dict:
    """The JSON line of one finished item.

    Args:
        answer: What it gave back; `None`, an item it cannot take, is scored as an empty output.
        system: Tells the slots.
        meter: Counts tokens, and gives the token metrics their ids.
        meteor: Compute METEOR in the Fox block.
        hash_only: Items whose id or source it finds keep hashes in place of texts.
        seconds: Wall-clock time of the item's batch over the number of its items.

    Returns:
        A record with the item's labels, `inputs_hash`, `num_tokens`, `num_characters` and `slots` of the context,
        `reference` or `question` and `answers`, `refused` (too long for the system), `output` (null where it equals
        the reference, or is kept as a hash), `output_hash`, `metrics` and `seconds`.
    """
    output = answer or ""
    segments: Sequence[str]
    if isinstance(item, RestoreItem):
        segments, text = item.segments, item.text
    else:
        segments = [segment for context in item.contexts for segment in meter.segments(context)]
    sizes = {
        "num_tokens": sum(meter.count(segment) for segment in segments),
        "num_characters": sum(map(len, segments)),
        "slots": sum(system.slots(segment) for segment in segments),
    }
    texts: dict[str, object]
    if isinstance(item, RestoreItem):
        metrics = score_restoration(output, text, meter.encode, meteor)
        texts = {"reference": text}
    else:
        metrics = score_answer(output, item.answers)
        texts = {"question": item.question, "answers": list(item.answers)}
    # Of a text that came back whole one copy is enough.
    texts["output"] = None if output == texts.get("reference") else output
    if hash_only is not None and (hash_only.search(item.id) or hash_only.search(item.source)):
        texts = dict.fromkeys(texts)
    return {
        "task": task,
        **{name: getattr(item, name) for name in ("id", "kind", "lang", "bin", "source", "inputs_hash")},
        **sizes,
        "refused": answer is None,
        **texts,
        "output_hash": hashlib.sha256(output.encode("utf-8", "surrogatepass")).hexdigest(),
        "metrics": metrics,
        "seconds": round(seconds, 4),
    }


def items_hash(pairs: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over ids and input hashes, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted(f"{name} {digest}" for name, digest in pairs)).encode()).hexdigest()


def open_run(output: Path, config: dict, allow_changes: bool = False) -> None:
    """Create the folder with its config, or check that an existing one belongs to the same run.

    Args:
        config: Everything the numbers depend on.
        allow_changes: Go on with a run that another commit began.

    Raises:
        ValueError: If the folder holds a run with another config; the message names what differs.
    """
    path = output / CONFIG
    if path.exists():
        before = read_json_object(path)
        passed_over = {"commit"} if allow_changes else set()
        keys = (before.keys() | config.keys()) - passed_over
        differing = sorted(key for key in keys if before.get(key) != config.get(key))
        if differing:
            raise ValueError(
                f"`output` {output.name!r} holds a run with another config (differs in: {', '.join(differing)}); "
                "give a new folder, or the same settings to go on with that run."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def read_config(output: Path) -> dict:
    """The config of a run.

    Raises:
        FileNotFoundError: If `output` holds no run.
        ValueError: If it is damaged.
    """
    path = output / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{str(output)!r} holds no {CONFIG}, expected the output folder of a run.")
    return read_json_object(path)


def read_records(output: Path, expected: dict[str, dict]) -> list[dict]:
    """All item records of a run, whichever process wrote them; a line torn by a kill is left out.

    Args:
        expected: The tasks of its config, each with the `number` of its items.

    Raises:
        ValueError: If a line is no record, an item is there twice, or belongs to no task of the config, or a task has
            more items than its config says.
    """
    records: dict[tuple[str, str], dict] = {}
    places: dict[tuple[str, str], str] = {}
    for path in sorted(output.glob(f"{ITEMS}*.jsonl")):
        for number, record in numbered_jsonl(path, skip_torn=True):
            where = f"{path} line {number}"
            for name, kind in _FIELDS.items():
                if not isinstance(record.get(name), kind):
                    raise ValueError(f"{where} is no record of an item: `{name}` is {repr(record.get(name))[:60]}.")
            key = record["task"], record["id"]
            if key in places:
                raise ValueError(
                    f"{where} holds item {key[1]!r} of task {key[0]!r} again, which is in {places[key]} already: a "
                    "copy, or left over from another run. Remove the file that does not belong to this run."
                )
            if key[0] not in expected:
                raise ValueError(f"{where} holds an item of task {key[0]!r}, which the run's {CONFIG} does not have.")
            places[key], records[key] = where, record
    for task, number in Counter(task for task, _ in records).items():
        if number > expected[task]["number"]:
            raise ValueError(
                f"{output} holds {number} items of task {task!r}, its {CONFIG} says {expected[task]['number']}: some "
                "are left over from another run."
            )
    return list(records.values())


def append_records(output: Path, rank: int, records: Iterable[dict]) -> None:
    """Append records to the file of the process `rank`; they are on the disk when this returns."""
    append_jsonl(output / (f"{ITEMS}.jsonl" if rank == 0 else f"{ITEMS}.rank{rank}.jsonl"), records)


@dataclass(frozen=True)
class FinishedRun:
    """A run that is finished, and holds what its config says.

    Args:
        label: Name in tables and plots: the folder's.
        records: Its item records, in a fixed order.
        skipped: Why the system did not run, or `None`.
    """

    label: str
    config: dict
    records: tuple[dict, ...]
    skipped: str | None = None

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """The run in `folder`.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not finished, or its items are not those its config names, each once.
        """
        config = read_config(folder)
        expected = _expected_items(folder, config)
        records = tuple(sorted(read_records(folder, expected), key=itemgetter("task", "kind", "id")))
        summary = folder / SUMMARY
        if not summary.is_file():
            raise ValueError(
                f"`runs` has {folder.name!r} with {len(records)} items and no {SUMMARY}: it is not finished. "
                "Start the same command again to finish it."
            )
        skipped = read_json_object(summary).get("skipped")
        if skipped is None:
            _check_items(folder, records, expected)
        return cls(folder.name, config, records, skipped)

    def restored(self) -> list[dict]:
        """Records of texts that were restored."""
        return [record for record in self.records if "reference" in record]

    def answered(self) -> list[dict]:
        """Records of questions."""
        return [record for record in self.records if "question" in record]

    def of(self, task: str, **labels: str) -> list[dict]:
        """Records of `task` with the given `lang`, `kind` or `bin`."""
        return [
            record
            for record in self.records
            if record["task"] == task and all(record[key] == value for key, value in labels.items())
        ]


def _expected_items(folder: Path, config: dict) -> dict[str, dict]:
    items = config.get("items")
    rows = items.values() if isinstance(items, dict) else [None]
    for row in rows:
        if not (isinstance(row, dict) and type(row.get("number")) is int and isinstance(row.get("sha256"), str)):
            raise ValueError(f"{folder / CONFIG}: `items` does not give each task's number and hash of items.")
    return items or {}


def _check_items(folder: Path, records: Sequence[dict], expected: dict[str, dict]) -> None:
    for task, wanted in expected.items():
        own = [(record["id"], record["inputs_hash"]) for record in records if record["task"] == task]
        number = wanted["number"]
        if len(own) != number:
            raise ValueError(f"{folder} holds {len(own)} items of task {task!r}, its {CONFIG} says {number}.")
        if items_hash(own) != wanted["sha256"]:
            raise ValueError(
                f"{folder} holds other items of task {task!r} than its {CONFIG} names: ids or inputs differ. They are "
                "left over from another run; run it again into a new folder."
            )


def mean(values: Sequence[float]) -> float:
    """Exactly rounded mean, so that the order of the values does not show in the last digit."""
    return math.fsum(values) / len(values)


def mean_of(rows: Sequence[Mapping]) -> dict:
    """Unweighted mean of every key over the rows that have it.

    Args:
        rows: Metric dictionaries; a value is a number, or a list of numbers and `None` of one length, which is
            averaged place by place without the `None`.

    Returns:
        One value for each key, in order of first appearance; a place without any number is `None`.
    """
    result: dict[str, float | list[float | None]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        if isinstance(values[0], list):
            places = [[value for value in place if value is not None] for place in zip(*values)]
            result[key] = [mean(place) if place else None for place in places]
        else:
            result[key] = mean(values)
    return result


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over items.

    Args:
        values: One number an item; at least one.
        confidence: Coverage in (0, 1).

    Returns:
        Lower and upper end. One item gives an interval of width 0, which says nothing about other items.

    Raises:
        ValueError: If there are no values or `confidence` lies outside (0, 1).
    """
    if not len(values):
        raise ValueError("`values` is empty, expected at least one number to resample.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` is {confidence}, expected a share between 0 and 1 such as 0.95.")
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(sample), size=(_RESAMPLES, len(sample)))
    low, high = np.quantile(sample[picks].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """Rows by key, groups in order of first appearance."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def by(records: list[dict], key: Callable[[dict], object]) -> dict:
    """Records by key, keys sorted."""
    groups = grouped(records, key)
    return {name: groups[name] for name in sorted(groups, key=str)}


def values(records: list[dict], metric: str) -> list[float]:
    """The metric's value in each record."""
    return [record["metrics"][metric] for record in records]


def ratio(records: Sequence[dict], unit: str = "num_tokens") -> float:
    """Tokens (or another unit) over slots, both summed over the records.

    Tokens are those of the measured model's own vocabulary: a small one makes many of a text and so a large ratio.
    Between models with different vocabularies, `"num_characters"` compares.
    """
    return sum(record[unit] for record in records) / max(sum(record["slots"] for record in records), 1)


def with_interval(records: list[dict], metric: str, digits: int = 3) -> str:
    """Mean and 95 % bootstrap interval over items as text, `0.981 [0.972, 0.989]`."""
    numbers = values(records, metric)
    low, high = bootstrap_interval(numbers)
    return f"{mean(numbers):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def count(records: list[dict]) -> str:
    """Number of records, and how many of them were too long for the system."""
    refused = sum(record["refused"] for record in records)
    return f"{len(records)}, {refused} too long" if refused else str(len(records))


def summarise(records: Sequence[dict]) -> dict:
    """Means by task, and within a task by kind, language and bin.

    Args:
        records: Item records, in the order of the tasks' own items.

    Returns:
        `metrics`: what a repetition must give again, to the last digit; `seconds`: what it need not.
    """
    metrics, seconds = {}, {}
    for task, rows in grouped(records, itemgetter("task")).items():
        metrics[task] = {"all": _means(rows)}
        for key in ("kind", "lang", "bin"):
            groups = grouped(rows, itemgetter(key))
            metrics[task][f"by_{key}"] = {name: _means(group) for name, group in groups.items()}
        seconds[task] = round(sum(row["seconds"] for row in rows), 3)
    return {"metrics": metrics, "seconds": seconds}


def _means(rows: Sequence[dict]) -> dict:
    return {
        "items": len(rows),
        "refused": sum(row["refused"] for row in rows),
        "compression_ratio": ratio(rows),
        "characters_a_slot": ratio(rows, "num_characters"),
        **mean_of([row["metrics"] for row in rows]),
    }
