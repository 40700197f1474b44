"""Means, ratios and bootstrap intervals over items."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TypeVar

import numpy as np


Row = TypeVar("Row")


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


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over items.

    Args:
        values: One number an item; at least one.
        confidence: Coverage in (0, 1).
        resamples: Number of resampled means.
        seed: Seed of the generator; the same values and seed give the same interval.

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
    picks = np.random.default_rng(seed).integers(0, len(sample), size=(resamples, len(sample)))
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
