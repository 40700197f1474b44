"""Files, written whole or not at all, and read with messages that name them."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Write `value` as indented JSON that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If the file is absent.
        ValueError: If it holds no JSON object, or is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent. The folder is incomplete, or not in the layout expected here.")
    return _object(path.read_bytes(), str(path))


def read_jsonl(path: str | Path, torn: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSON Lines, compressed if the name ends in `.gz`. Empty lines are passed over.

    Args:
        path: The file.
        torn: Leave out a last line without a line break, which a killed writer can leave.

    Yields:
        The number of each line, from 1, and its object.

    Raises:
        ValueError: If a line is no JSON object or not UTF-8, or the compression is damaged; file and line are named.
    """
    path = Path(path)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and not (torn and not line.endswith(b"\n")):
                    yield number, _object(line, f"{path} line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged behind line {number} ({error}). Copy or download it again.") from error


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    # A decoding error of JSON or of UTF-8 is a ValueError; very deep nesting ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON in UTF-8 ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a JSON {type(content).__name__}, expected an object.")
    return content
