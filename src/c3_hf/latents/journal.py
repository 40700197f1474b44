"""What `compress` has done so far, safe against being killed at any moment.

While a file FILE.c3 is being made, the finished segments are appended to FILE.c3.journal: a line that says what the
file is, then records of `<u32 length> <u32 CRC-32> <payload>`, little-endian. The first payload is the header as JSON,
each further one a group of segments as a small safetensors file of the same layout as the finished one. A record
counts once its checksum is right, and it is on the disk before the next group is begun. At the end the records are
copied into the finished file, which appears in one step, and the journal goes. A lock, FILE.c3.lock, keeps a second
process from writing the same file.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers.utils import logging

from ..files import check_name, is_stream, place_of
from .file import Tensors, check_declared, metadata_of, parse, read_header
from .segments import Segment, Source, TextReader


logger = logging.get_logger(__name__)

# What lies beside FILE while it is being made.
JOURNAL_SUFFIX = ".journal"
LOCK_SUFFIX = ".lock"
# Windows has none; there two runs into one file do not learn of each other.
_HAS_LOCKS = find_spec("fcntl") is not None
MAGIC = b"c3-context journal 1\n"
_RECORD = struct.Struct("<II")


class Journal:
    """An open journal.

    Args:
        path: The journal's own path.

    Attributes:
        header: What the file shall say of itself; `None` before [`go_on`] where there was no journal to go on with.
        num_records: Groups of segments that are safely written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.header: dict[str, Any] | None = None
        self.num_records = 0
        self._end = 0
        if self.path.exists():
            self._recover()

    def go_on(self, wanted: dict[str, Any]) -> None:
        """Begin a journal with this header, or make sure that the one that is there was begun by the same call.

        The file comes into being with the first segments.

        Raises:
            ValueError: If it was not.
        """
        if self.header is None:
            self.header, self.num_records, self._end = wanted, 0, 0
            return
        differing = sorted(key for key in wanted if wanted[key] != self.header.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"`output`: {self.path} holds an unfinished run with other settings ({key}: "
                f"{self.header.get(key)!r}, now {wanted[key]!r}). Repeat the call it was begun with, or delete it."
            )
        logger.info(f"{self.path}: going on behind {self.num_records} finished groups of segments.")

    def read_past(self, reader: TextReader) -> Iterator[bytes]:
        """Read past the text of the finished segments, making sure that it is the same text; the bytes of each.

        Raises:
            ValueError: If it is another text.
        """
        for piece in self.pieces():
            for index, length in enumerate(piece["char_offsets"].diff().tolist()):
                segment = Segment(reader.take(length), ())
                if segment.digest != bytes(piece["digests"][index].tolist()):
                    raise ValueError(
                        f"`source` differs from the text that {self.path} was begun with, before character "
                        f"{int(piece['char_offsets'][index + 1]):,}. Give the same text, or delete the journal."
                    )
                yield segment.data

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


def refuse_source_as_output(source: Source, output: str | os.PathLike) -> None:
    """Raise ValueError if the source is the output, or a file that lies beside it while it is made: its text would be
    lost."""
    file = source if isinstance(source, os.PathLike) else None
    if hasattr(source, "fileno"):
        # Of a file in memory there is no number.
        with contextlib.suppress(OSError):
            file = source.fileno()
    if file is None or not os.path.exists(file):
        return
    place = os.path.realpath(output)
    for name in (output, f"{place}{JOURNAL_SUFFIX}", f"{place}{LOCK_SUFFIX}"):
        if os.path.exists(name) and os.path.samefile(file, name):
            raise ValueError(
                f"`output`: {os.fspath(name)} and `source` are one file, whose text would be lost. Give another name."
            )


@contextlib.contextmanager
def claimed(path: str | os.PathLike) -> Iterator[Path]:
    """`path`, links followed, held against other processes that want to compress into it.

    The lock is the operating system's on FILE.lock beside it, so that it ends with the process, however that ends.

    Raises:
        ValueError: If `path` cannot become a file, is being written by another run, or somebody's own file has the
            name of the lock.
        OSError: If the folder cannot be written to.
    """
    if not os.fspath(path):
        raise ValueError("`output` is empty. Give the name of the file to write.")
    place = place_of(path)
    if is_stream(path):
        raise ValueError(f"`output`: {path} is a device or a pipe. Write a file, and copy that.")
    if place.is_dir():
        raise ValueError(f"`output`: {path} is a folder. Give the name of the file to write.")
    check_name(place, JOURNAL_SUFFIX)
    if not _HAS_LOCKS:
        yield place
        return
    lock = place.with_name(place.name + LOCK_SUFFIX)
    try:
        descriptor = _lock(lock)
    except BlockingIOError as error:
        raise ValueError(
            f"`output`: {path} is being written by another run at this moment. Let that finish, then call again."
        ) from error
    except OSError as error:
        if error.filename == str(lock):
            error.filename = str(path)
        raise
    try:
        yield place
    finally:
        # In this order: whoever gets hold of a file that has no name any more makes a new one.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            logger.warning(f"{path}: this file system knows no locks ({error}); do not write the file twice at once.")
            return descriptor
        try:
            held = os.fstat(descriptor)
            if held.st_size:
                # A lock is empty: this is a poetry.lock beside an output called poetry.
                os.close(descriptor)
                raise ValueError(
                    f"`output`: its lock would be {path}, and that is a file with something in it. Move it away, or "
                    "give another name."
                )
            if held.st_ino == os.stat(path).st_ino:
                return descriptor
        except FileNotFoundError:
            logger.debug(f"{path}: the run that held it has just ended.")
        os.close(descriptor)
