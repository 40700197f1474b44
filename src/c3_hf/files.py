"""Files and folders that are there whole or not at all, locks, sizes, digests, JSON Lines, headers of safetensors.

The standard library alone, so that a command can look at files before it loads anything else.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any


logger = logging.getLogger(__name__)

# Behind the name of a file that is being made: what is finished of it, and the lock that holds it. Windows has no
# locks; there two runs into one file do not learn of each other.
JOURNAL_SUFFIX, LOCK_SUFFIX = ".journal", ".lock"
_HAS_LOCKS = find_spec("fcntl") is not None
# Bytes of a file name on the file systems in use.
LONGEST_NAME = 255
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def is_stream(path: str | os.PathLike) -> bool:
    """Whether `path` is a device, a pipe or an open file of this process: written through, never replaced."""
    if os.path.abspath(path).startswith(("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def place_of(path: str | os.PathLike) -> Path:
    """Where `path` leads, links followed.

    Raises:
        OSError: If it is a link that leads to itself.
    """
    place = Path(os.path.realpath(path))
    # False of a name that is too long.
    if os.path.islink(place):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return place


def check_name(path: str | os.PathLike, beside: str = "") -> None:
    """Raise ValueError if the name of `path`, with `beside` behind it, is longer than a file's name may be."""
    name = Path(path).name
    size = len(os.fsencode(name + beside))
    if size > LONGEST_NAME:
        raise ValueError(
            f"`output`: the name {name!r}{f' with {beside} behind it' if beside else ''} has {size} bytes, a file "
            f"name may have {LONGEST_NAME}. Give a shorter one."
        )


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path`, of this process, as long as names may be at most."""
    end = f".{os.getpid()}.tmp"
    name = os.fsencode(path.name)[: LONGEST_NAME - len(end) - 1]
    return path.with_name(f".{name.decode(errors='ignore')}{end}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` once it is written in full and on the disk.

    A link stays: the file it leads to is replaced, with the mode it had. A device or a pipe is written through.

    Raises:
        OSError: if it cannot be written; the error names `path`.
        ValueError: if its name is too long.
    """
    if is_stream(path):
        with open(path, "wb") as file:
            yield file
        return
    place = place_of(path)
    check_name(place)
    temporary = temporary_path(place)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            shutil.copymode(place, temporary)
        temporary.replace(place)
    except OSError as error:
        # The hidden name says nothing to whoever reads the message.
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_folder(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Raise ValueError unless `folder`, or the nearest above it that is there, takes files, such as `target`."""
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"`output`: {target} cannot be made, {folder} is no folder. Give another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`output`: {target} cannot be made, {folder} cannot be written to. Give another name.")


def check_new_folder(path: str | os.PathLike) -> Path:
    """Where a folder called `path` is to be made, links followed.

    Raises:
        ValueError: if the path is empty, something is there that is not an empty folder, its name is too long, or no
            folder can be made there.
        OSError: if it is a link that leads to itself.
    """
    if not str(path):
        raise ValueError("`output` is empty. Give the name of a folder to make.")
    place = place_of(path)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"`output` {path} exists and is not an empty folder. Remove it, or give another name.")
    check_name(place)
    check_folder(place.parent, path)
    return place


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written.

    Yields a temporary folder beside `path`. At the end of the block it is renamed to `path`; if the block fails it is
    removed. A process that is killed leaves only the temporary folder, whose name begins with a dot.

    Args:
        path: the folder to make, links followed; it must not exist, or be empty.

    Raises:
        ValueError: see [`check_new_folder`].
    """
    place = check_new_folder(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".", suffix=".tmp"))
    try:
        yield temporary
        _give_usual_modes(temporary)
        if place.exists():
            place.rmdir()
        temporary.replace(place)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _give_usual_modes(folder: Path) -> None:
    """Give a folder and its files the modes that new ones get; temporary folders begin as the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def claimed(path: str | os.PathLike, beside: str = "") -> Iterator[Path]:
    """`path`, links followed, held against other processes that want to write it; see [`check_name`] for `beside`.

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
    check_name(place, beside)
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


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON; the file appears whole or not at all, see [`atomic_file`]."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it is not JSON in UTF-8; the message names the file.
    """
    return _parse(Path(path).read_bytes(), f"`{path}`")


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: if the file is absent.
        ValueError: if it is not JSON in UTF-8, or no object; the message names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{path}` is absent. The folder is incomplete, or not in the layout expected here.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` holds a JSON {type(content).__name__}, expected an object.")
    return content


def read_jsonl(path: str | os.PathLike, skip_torn: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON Lines file, see [`numbered_jsonl`]."""
    return (record for _, record in numbered_jsonl(path, skip_torn))


def numbered_jsonl(path: str | os.PathLike, skip_torn: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number, from 1, and record of each line of a JSON Lines file, gzip-compressed if its name ends in `.gz`.

    Empty lines are passed over; they count.

    Args:
        path: the file.
        skip_torn: leave out a last line without a line break: a process was killed while it wrote it.

    Raises:
        ValueError: if a line is no JSON object in UTF-8, or the compressed file is damaged; the message names file and
            line.
    """
    number = 0
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip() or (skip_torn and not line.endswith(b"\n")):
                    continue
                record = _parse(line, f"`{path}`, line {number},")
                if not isinstance(record, dict):
                    raise ValueError(
                        f"`{path}`, line {number}, holds a {type(record).__name__}, expected an object like "
                        '{"text": "..."}.'
                    )
                yield number, record
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"`{path}` is damaged behind line {number} ({error}). Fetch it again.") from error


def append_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSON Lines file, one line each, on the disk when this returns.

    A last line that a killed process left without its end is dropped first, so that it spoils no other.
    """
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    with open(path, "ab+") as file:
        _drop_torn_line(file)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _drop_torn_line(file: IO[bytes]) -> None:
    kept, found = file.seek(0, os.SEEK_END), -1
    while kept > 0 and found < 0:
        start = max(0, kept - (1 << 16))
        file.seek(start)
        found = file.read(kept - start).rfind(b"\n")
        kept = start + found + 1
    file.truncate(kept)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits; read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_size(text: str) -> int:
    """Bytes, of words such as "5GB" (5 * 10**9), "1.5 MiB" (1.5 * 2**20) or "4096"; 0 where they say no size."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*((?:[KMGT]I?)?B)?\s*", text, flags=re.IGNORECASE)
    return int(float(match[1]) * _SIZE_UNITS[(match[2] or "").upper()]) if match else 0


def safetensors_header(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """What a safetensors file begins with: its tensors follow in this order, without gaps.

    Args:
        metadata: What the file says of itself.
        tensors: For each its dtype, as safetensors calls it ("BF16", "BOOL"), and its shape.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (kind, shape) in tensors.items():
        # The names end with the number of bits; a BOOL takes a byte.
        start, end = end, end + int(kind.lstrip("BFIOLU") or 8) // 8 * math.prod(shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    # A number of thousands of digits.
    except ValueError as error:
        raise ValueError(f"{where} is not JSON that can be read: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{where} is JSON nested too deep to be read.") from error
