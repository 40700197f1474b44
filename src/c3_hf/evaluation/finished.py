"""Finished runs as the report reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from c3_hf.evaluation.run_files import SUMMARY, read_config, read_records
from c3_hf.evaluation.summary import bootstrap_interval, grouped, mean


@dataclass(frozen=True)
class FinishedRun:
    """One run.

    Args:
        label: Name in tables and plots: the folder's.
        config: Its `config.json`.
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
            ValueError: If it is not finished.
        """
        config = read_config(folder)
        records = tuple(sorted(read_records(folder), key=itemgetter("task", "kind", "id")))
        summary = folder / SUMMARY
        if not summary.is_file():
            raise ValueError(
                f"`runs` has {folder.name!r} with {len(records)} items and no {SUMMARY}: it is not finished. "
                "Start the same command again to finish it."
            )
        return cls(folder.name, config, records, json.loads(summary.read_text(encoding="utf-8"))["skipped"])

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


def values(records: list[dict], metric: str) -> list[float]:
    """The metric's value in each record."""
    return [record["metrics"][metric] for record in records]


def ratio(records: list[dict]) -> float:
    """Tokens over slots, both summed over the records."""
    return sum(record["num_tokens"] for record in records) / max(sum(record["slots"] for record in records), 1)


def with_interval(records: list[dict], metric: str, digits: int = 3) -> str:
    """Mean and 95 % bootstrap interval over items as text, `0.981 [0.972, 0.989]`."""
    numbers = values(records, metric)
    low, high = bootstrap_interval(numbers)
    return f"{mean(numbers):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def count(records: list[dict]) -> str:
    """Number of records, and how many of them were too long for the system."""
    refused = sum(record["refused"] for record in records)
    return f"{len(records)}, {refused} too long" if refused else str(len(records))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def by(records: list[dict], key: Callable[[dict], object]) -> dict:
    """Records by key, keys sorted."""
    groups = grouped(records, key)
    return {name: groups[name] for name in sorted(groups, key=str)}
