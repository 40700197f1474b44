"""Finds metrics, tasks and systems by their files: a new one is a new file, with no list to edit elsewhere."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from c3_hf.evaluation.metrics import Metric


# What a file of each package holds: a table of its own name, or, where each file is one thing, the function `load`.
_TABLES = {"metrics": "METRICS", "tasks": "TASKS", "systems": None}


def names(package: str) -> list[str]:
    """Names of all metrics, tasks or systems, sorted.

    Args:
        package: `"metrics"`, `"tasks"` or `"systems"`.
    """
    files = _files(package)
    if _TABLES[package] is None:
        return files
    return sorted(name for file in files for name in _table(package, file))


def find(package: str, name: str) -> Any:
    """The [`Metric`] of that name, a task's `load(data_dir, meter)`, or a system's `load(settings)`.

    Raises:
        ValueError: If there is none; the message lists those that there are.
    """
    known = names(package)
    if name not in known:
        raise ValueError(f"`{package}` has no {name!r}, expected one of: {', '.join(known)}.")
    if _TABLES[package] is None:
        return import_module(f"c3_hf.evaluation.{package}.{name}").load
    return next(table[name] for file in _files(package) if name in (table := _table(package, file)))


def score(
    inputs: str,
    prediction: object,
    expected: object,
    options: dict[str, dict] | None = None,
) -> dict[str, float | list]:
    """Results of every metric whose `inputs` are these.

    Args:
        inputs: `"text"`, `"tokens"` or `"answer"`.
        prediction: Text, or token ids for `"tokens"`.
        expected: Reference text, its token ids, or the accepted answers.
        options: Keyword arguments by metric name, such as `{"fox": {"meteor": True}}`.

    Returns:
        Values by metric name; a metric that returns a dictionary contributes its keys.
    """
    results: dict[str, float | list] = {}
    for name in names("metrics"):
        metric: Metric = find("metrics", name)
        if metric.inputs == inputs:
            value = metric.function(prediction, expected, **(options or {}).get(name, {}))
            results.update(value if isinstance(value, dict) else {name: value})
    return results


def score_restoration(
    prediction: str, reference: str, encode: Callable[[str], list[int]], meteor: bool = False
) -> dict[str, float | list]:
    """Every metric of a restored text; `encode` turns text into the token ids that the token metrics compare."""
    return {
        **score("text", prediction, reference, {"fox": {"meteor": meteor}}),
        **score("tokens", encode(prediction), encode(reference)),
    }


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float | list]:
    """Every metric of an answer to a question with the accepted `answers`."""
    return score("answer", prediction, answers)


def _files(package: str) -> list[str]:
    parent = import_module(f"c3_hf.evaluation.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(parent.__path__))


def _table(package: str, file: str) -> dict[str, Any]:
    return getattr(import_module(f"c3_hf.evaluation.{package}.{file}"), str(_TABLES[package]))
