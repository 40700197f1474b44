"""Finds metrics, tasks and systems by their files: a new one is a new file, with no list to edit elsewhere."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any


# What a file of each package holds: a table of its own name, or, where each file is one thing, the function `load`.
_TABLES = {"metrics": "METRICS", "tasks": "TASKS", "systems": None}


def names(package: str) -> list[str]:
    """Names of all metrics, tasks or systems, sorted.

    Args:
        package: `"metrics"`, `"tasks"` or `"systems"`.
    """
    return sorted(_homes(package))


def find(package: str, name: str) -> Any:
    """The [`Metric`] of that name, a task's `load(data_dir, meter)`, or a system's `load(settings)`.

    Raises:
        ValueError: If there is none; the message lists those that there are.
    """
    homes = _homes(package)
    if name not in homes:
        raise ValueError(f"`{package}` has no {name!r}, expected one of: {', '.join(names(package))}.")
    module, table = import_module(homes[name]), _TABLES[package]
    return module.load if table is None else getattr(module, table)[name]


@cache
def _homes(package: str) -> dict[str, str]:
    """The module of everything in a package, file after file; what systems import need not be installed."""
    parent, table = import_module(f"c3_hf.evaluation.{package}"), _TABLES[package]
    modules = {file.name: f"{parent.__name__}.{file.name}" for file in pkgutil.iter_modules(parent.__path__)}
    if table is None:
        return modules
    return {name: module for module in modules.values() for name in getattr(import_module(module), table)}


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
    for name in _homes("metrics"):
        metric = find("metrics", name)
        if metric.inputs == inputs:
            value = metric.function(prediction, expected, **(options or {}).get(name, {}))
            results.update(value if isinstance(value, dict) else {name: value})
    return results


def score_restoration(
    prediction: str, reference: str, encode: Callable[[str], list[int]], meteor: bool = False
) -> dict[str, float | list]:
    """Every metric of a restored text; `encode` turns text into the token ids that the token metrics compare."""
    tokens = encode(prediction), encode(reference)
    return {**score("text", prediction, reference, {"fox": {"meteor": meteor}}), **score("tokens", *tokens)}


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float | list]:
    """Every metric of an answer to a question with the accepted `answers`."""
    return score("answer", prediction, answers)
