"""The files of a run: config first, one line an item as it finishes, summary last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path


logger = logging.getLogger(__name__)

CONFIG, SUMMARY, ITEMS = "config.json", "summary.json", "items"


def write_json(path: Path, value: object) -> None:
    """Write `value` so that the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def open_run(output: Path, config: dict) -> None:
    """Create the folder with its config, or check that an existing one belongs to the same run.

    Raises:
        ValueError: If the folder holds a run with another config; the message names what differs.
    """
    path = output / CONFIG
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("commit") != config.get("commit"):
            logger.warning("going on with a run begun at commit %s", before.get("commit"))
        keys = (before.keys() | config.keys()) - {"commit"}
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
    """
    path = output / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{str(output)!r} holds no {CONFIG}, expected the output folder of a run.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_records(output: Path) -> list[dict]:
    """All item records of a run, whichever process wrote them; a line torn by a kill is left out."""
    lines = [
        line
        for path in sorted(output.glob(f"{ITEMS}*.jsonl"))
        # Not splitlines(), which also breaks at characters that JSON leaves as they are.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]
    return [json.loads(line) for line in lines]


class RecordWriter:
    """Appends records to the file of one process, each on disk before the next begins.

    Args:
        output: Folder of the run.
        rank: Number of the process; each has its own file.
    """

    def __init__(self, output: Path, rank: int = 0):
        self.path = output / (f"{ITEMS}.jsonl" if rank == 0 else f"{ITEMS}.rank{rank}.jsonl")
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, records: Iterable[dict]) -> None:
        """Append `records`, one line each."""
        for record in records:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
