"""Reads data files and turns their records into items."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from c3_hf.evaluation.items import RestoreItem


def find_file(data_dir: Path, name: str) -> Path:
    """The one file called `name` in `data_dir` or below.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    found = sorted(Path(data_dir).rglob(name))
    if not found:
        raise FileNotFoundError(f"`data_dir` {str(data_dir)!r} holds no file {name!r}, which this task reads.")
    if len(found) > 1:
        raise ValueError(
            f"`data_dir` {str(data_dir)!r} holds {len(found)} files {name!r}, expected one; name the folder of one."
        )
    return found[0]


def read_jsonl(path: Path) -> list[dict]:
    """Records of a JSON Lines file, gzip-compressed if its name ends in `.gz`.

    Raises:
        ValueError: If a line is not JSON; the message names file and line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [_parse(line, path, number) for number, line in enumerate(lines, 1)]


def _parse(line: str, path: Path, number: int) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path.name}` line {number} is not JSON ({error.msg}).") from error


def whole_text_items(data_dir: Path, *names: str) -> list[RestoreItem]:
    """One item for each record of the files `names`, the text in one segment.

    The kind is the record's; the bin is the record's `bin` (Qwen tokens), empty where it has none.
    """
    return [
        RestoreItem(
            id=record["id"],
            kind=record["kind"],
            lang=record["lang"],
            source=record["source"],
            bin=record.get("bin", ""),
            segments=(record["text"],),
        )
        for name in names
        for record in read_jsonl(find_file(data_dir, name))
    ]


def length_bin(num_tokens: int) -> str:
    """The 100-token bin of the paper's Fig. 1 that `num_tokens` falls into, such as `"600-700"`."""
    low = num_tokens // 100 * 100
    return f"{low}-{low + 100}"
