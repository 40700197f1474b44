"""Writing a file that is there whole or not at all, by one process at a time, through links and into devices."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from transformers.utils import logging


logger = logging.get_logger(__name__)

# Windows has none; there two runs into one file do not learn of each other.
_HAS_LOCKS = find_spec("fcntl") is not None
# What lies beside FILE while it is being made.
JOURNAL_SUFFIX = ".journal"
LOCK_SUFFIX = ".lock"
# Bytes of a file name on the file systems in use.
LONGEST_NAME = 255


def is_stream(path: str | os.PathLike) -> bool:
    """Whether `path` is a device, a pipe or an open file of this process: written through, never replaced."""
    if os.path.abspath(path).startswith(("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


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
    """A hidden name beside `path`, as long as names may be at most; `is_leftover` knows it."""
    end = f".{os.getpid()}.tmp"
    name = os.fsencode(path.name)[: LONGEST_NAME - len(end) - 1]
    return path.with_name(f".{name.decode(errors='ignore')}{end}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` once it is written in full and on the disk.

    A link stays: the file it leads to is replaced, with the mode it had. A device or a pipe is written through.

    Raises:
        OSError: If it cannot be written; the error names `path`.
        ValueError: If its name is too long.
    """
    if is_stream(path):
        with open(path, "wb") as file:
            yield file
        return
    place = Path(os.path.realpath(path))
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
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: str | os.PathLike) -> Iterator[Path]:
    """`path`, links followed, held against other processes that want to compress into it.

    The lock is the operating system's on FILE.lock beside it, so that it ends with the process, however that ends.

    Raises:
        ValueError: If `path` cannot become a file, or is being written by another run.
        OSError: If the folder cannot be written to.
    """
    place = Path(os.path.realpath(path))
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
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except FileNotFoundError:
            logger.debug(f"{path}: the run that held it has just ended.")
        os.close(descriptor)
