"""Finds metrics, tasks and systems by their files: a new one is a new file, with no list to edit."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def names(package: str) -> list[str]:
    """Names of the modules of `c3_hf.evaluation.<package>`, sorted.

    Args:
        package: `"metrics"`, `"tasks"` or `"systems"`.
    """
    parent = import_module(f"c3_hf.evaluation.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(parent.__path__))


def find(package: str, name: str) -> ModuleType:
    """The module `c3_hf.evaluation.<package>.<name>`.

    Raises:
        ValueError: If there is no such module; the message lists those that there are.
    """
    known = names(package)
    if name not in known:
        raise ValueError(f"`{package}` has no {name!r}, expected one of: {', '.join(known)}.")
    return import_module(f"c3_hf.evaluation.{package}.{name}")
