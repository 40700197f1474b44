"""What `compress` has done so far, safe against being killed at any moment.

While a file FILE.c3 is being made, the finished segments are appended to FILE.c3.journal: a line that says what the
file is, then records of `<u32 length> <u32 CRC-32> <payload>`, little-endian. The first payload is the header as JSON,
each further one a group of segments as a small safetensors file of the same layout as the finished one. A record
counts once its checksum is right, and it is on the disk before the next group is begun. At the end the records are
copied into the finished file, which appears in one step, and the journal goes.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .storage import Tensors, check_declared, metadata_of, parse, read_header


MAGIC = b"c3-context journal 1\n"
_RECORD = struct.Struct("<II")


class Journal:
    """An open journal.

    Args:
        path: The journal's own path.

    Attributes:
        header: What the file shall say of itself; `None` before [`start`] where there was no journal to go on with.
        num_records: Groups of segments that are safely written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.header: dict[str, Any] | None = None
        self.num_records = 0
        self._end = 0
        if self.path.exists():
            self._recover()

    def start(self, header: dict[str, Any]) -> None:
        """Begin a new journal, in place of whatever is there. The file comes into being with the first segments."""
        self.header, self.num_records, self._end = header, 0, 0

    def append(self, tensors: Tensors) -> None:
        """Write a group of segments; when this returns, it is on the disk."""
        header = self.header or {}
        if not self.num_records:
            self._end = len(MAGIC)
            with self.path.open("wb") as file:
                file.write(MAGIC)
            self._append(json.dumps(header, sort_keys=True, ensure_ascii=False).encode())
        metadata = metadata_of(header, tensors)
        self._append(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
        self.num_records += 1

    def pieces(self) -> Iterator[dict[str, torch.Tensor]]:
        """The groups of segments in order, one in memory at a time.

        Raises:
            ValueError: If a group does not read back.
        """
        if not self.num_records:
            return
        with self.path.open("rb") as file:
            file.seek(len(MAGIC))
            _read_record(file)
            for _ in range(self.num_records):
                payload = _read_record(file)
                if payload is None:
                    raise ValueError(f"`path`: {self.path} changed while it was read.")
                yield _parse_piece(payload, str(self.path))

    def remove(self) -> None:
        """Delete the journal; its content is in the finished file."""
        self.path.unlink(missing_ok=True)

    def _append(self, payload: bytes) -> None:
        with self.path.open("r+b") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()

    def _recover(self) -> None:
        """Find the end of the last whole record; what lies behind it is overwritten by the next."""
        with self.path.open("rb") as file:
            start = file.read(len(MAGIC))
            # A crash can leave a file at its length before its content reached the disk: zeros.
            if not MAGIC.startswith(start.rstrip(b"\0")):
                raise ValueError(
                    f"`path`: {self.path} is no journal of `c3-hf compress`, it starts with {start!r}. Move it away."
                )
            header = _read_record(file) if start == MAGIC else None
            while header is not None and _read_record(file) is not None:
                self.header = read_header(header, str(self.path))
                self.num_records += 1
                self._end = file.tell()


def _read_record(file: IO[bytes]) -> bytes | None:
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        return None
    size, checksum = _RECORD.unpack(head)
    # No payload is empty, but eight zero bytes, as a crash leaves them, would read as such a record.
    if not 0 < size <= os.fstat(file.fileno()).st_size - file.tell():
        return None
    payload = file.read(size)
    return payload if zlib.crc32(payload) == checksum else None


def _parse_piece(payload: bytes, name: str) -> dict[str, torch.Tensor]:
    # safetensors gives tensors only: the metadata stands in the JSON header at the front.
    size = struct.unpack_from("<Q", payload.ljust(8, b"\0"))[0]
    header = read_header(payload[8 : 8 + size], name)
    try:
        metadata = header.pop("__metadata__")
        check_declared(metadata, {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}, name)
        tensors = load(payload)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"`path`: {name} holds a group of segments that cannot be read ({error}).") from error
    return parse(metadata, tensors, name)[1]
