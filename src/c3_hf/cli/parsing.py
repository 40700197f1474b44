"""The parser of one command, which knows how each argument is typed."""

from __future__ import annotations

import argparse
import re
from typing import Any


# Arguments of the library that a command takes under another name, wherever it takes them.
_TYPED = {"pretrained_model_name_or_path": "--model", "question": "QUESTION", "contexts": "FILE.c3"}


class CommandParser(argparse.ArgumentParser):
    """The parser of a command.

    Attributes:
        typed: How arguments are typed, by their names in Python; the parsed arguments have it too.
    """

    def __init__(self, **options: Any):
        self.typed = dict(_TYPED)
        super().__init__(**options)
        self.set_defaults(typed=self.typed)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's, and keep how it is typed."""
        action = super().add_argument(*names, **options)
        self._note(action)
        return action

    def parse_known_args(self, *words: Any) -> Any:  # type: ignore[override]
        """As argparse's, knowing also how the arguments of groups are typed, which do not pass `add_argument`."""
        for action in self._actions:
            self._note(action)
        return super().parse_known_args(*words)

    def _note(self, action: argparse.Action) -> None:
        long = [name for name in action.option_strings if name.startswith("--")]
        self.typed[action.dest] = long[0] if long else str(action.metavar or action.dest)


def as_typed(text: str, typed: dict[str, str]) -> str:
    """`text` with the arguments that it names in backticks named as they are typed on the command line."""
    return re.sub(r"`(\w+)(?:=True)?`", lambda found: f"`{typed.get(found[1], found[0][1:-1])}`", text)
