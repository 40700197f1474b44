"""Which files a command reads and which it writes: decided and checked here, for every command, before any work."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..files import atomic_file, check_folder, check_name, is_stream, place_of
from .messages import Failures


STREAM = "-"
SUFFIX = ".c3"
# What a run leaves beside its output when it is killed, and what it holds there while it runs.
_LEFTOVER = re.compile(r"\..*\.\d+\.tmp|.*\.c3\.(journal|lock)", re.DOTALL)


def add_output_arguments(parser: argparse.ArgumentParser, output: str, force: str) -> None:
    """Add `-o/--output` and `--force`, with what the help says of them."""
    parser.add_argument("-o", "--output", help=output)
    parser.add_argument("--force", action="store_true", help=force)


@dataclass(frozen=True)
class Job:
    """One file that becomes another.

    Attributes:
        source: A path, or `STREAM` for standard input.
        target: A path, or `STREAM` for standard output.
    """

    source: str
    target: str


def read_inputs(
    names: Iterable[str], wanted: Callable[[str], bool], failures: Failures
) -> Iterator[tuple[str, Path, bool]]:
    """The files that `names` stand for, folders gone through to any depth.

    Args:
        names: Files, folders, or `STREAM`.
        wanted: Which of the files below a folder are meant, by their names.
        failures: Gets what cannot be read: missing files, unreadable folders, links that lead nowhere or to folders,
            devices and pipes below a folder.

    Raises:
        ValueError: If standard input is named more than once.

    Yields:
        The path, its place below the folder that was named (its own name where a file was), and whether it was found
        below a folder.
    """
    names = list(names)
    check_stdin(names)
    for name in names:
        if name == STREAM:
            yield name, Path("stdin"), False
        elif os.path.isdir(name):
            yield from ((path, Path(path).relative_to(name), True) for path in _walk(name, wanted, failures))
        else:
            try:
                os.stat(name)
            except OSError as error:
                failures.add(name, error)
                continue
            yield name, Path(Path(name).name), False


def check_stdin(names: list[str]) -> None:
    """Raise ValueError if standard input is named more than once: it can be read once."""
    if names.count(STREAM) > 1:
        raise ValueError(f"`FILE`: - is named {names.count(STREAM)} times, and standard input can be read once.")


def _walk(folder: str, wanted: Callable[[str], bool], failures: Failures) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        failures.add(os.fsdecode(error.filename), error)

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                failures.add(
                    os.path.join(place, name), "is a link to a folder and not followed; name the folder itself"
                )
        for name in sorted(files):
            path = os.path.join(place, name)
            if _LEFTOVER.fullmatch(name) or not wanted(name):
                continue
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                failures.add(path, f"is a link that leads nowhere ({error.strerror}); mend or remove it")
                continue
            if stat.S_ISREG(mode):
                yield path
            else:
                failures.add(path, "is a device or a pipe and not read below a folder; name it itself")


def is_folder_name(name: str) -> bool:
    """Whether an output of this name is a folder: one that is there, or a name with a slash at its end."""
    return name.endswith((os.sep, os.altsep or os.sep)) or os.path.isdir(name)


def check_jobs(
    jobs: list[Job],
    *,
    force: bool,
    replaceable: Callable[[str], bool] = lambda _: False,
    beside: str = "",
    reads: Iterable[str] = (),
) -> list[Job]:
    """The jobs without repetitions, after everything about their targets was looked at that can be known beforehand.

    Args:
        jobs: Sources and targets.
        force: Whether files that are there may be replaced.
        replaceable: Which may be without.
        beside: What will be put behind the targets' names for a file beside them.
        reads: Further files that are read.

    Raises:
        ValueError: If two sources have one target, a target is a source, is there already, has no name or one that is
            too long, or lies where no file can be made.
        OSError: If a target is a link that leads to itself.
    """
    named = [*reads, *(job.source for job in jobs)]
    sources = {identity: name for name in named if (identity := _identity(name)) is not None}
    checked: list[Job] = []
    taken: dict[str, str] = {}
    for job in jobs:
        if not job.target:
            raise ValueError("`--output` is empty. Give a name.")
        identity = _identity(job.target, standard_output=True)
        if identity is not None and identity in sources:
            shown = "standard output" if job.target == STREAM else job.target
            raise ValueError(
                f"`--output`: {shown} and the input {sources[identity]} are one file, which would be lost. Give "
                "another name."
            )
        if job.target == STREAM or is_stream(job.target):
            checked.append(job)
            continue
        place = str(place_of(job.target))
        if place in taken and os.path.realpath(taken[place]) == os.path.realpath(job.source):
            continue
        if place in taken:
            raise ValueError(
                f"`--output`: {taken[place]} and {job.source} would both become {job.target}. Give them one by one, "
                "or the folder they lie in."
            )
        taken[place] = job.source
        if os.path.isdir(place):
            raise ValueError(f"`--output`: {job.target} is a folder. Remove it, or give another name.")
        if os.path.exists(place) and not force and not replaceable(place):
            raise ValueError(f"`--output`: {job.target} exists. Give another name, or --force to replace it.")
        check_name(place, beside)
        check_folder(os.path.dirname(place), job.target)
        checked.append(job)
    return checked


def _identity(path: str, standard_output: bool = False) -> tuple[int, int] | None:
    """What tells a file from others, under whatever name; None where there is none yet, or it is no regular file."""
    try:
        # Standard streams may be files too, by `<` and `>>`; those of a test have no number.
        found = os.stat((sys.stdout if standard_output else sys.stdin).fileno() if path == STREAM else path)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def check_parent(target: str) -> None:
    """Raise ValueError if a single file is to be made in a folder that is not there: more likely a slip than meant."""
    parent = os.path.dirname(os.path.realpath(target))
    if target != STREAM and not os.path.isdir(parent):
        raise ValueError(f"`--output`: {target} cannot be made, there is no folder {parent}. Make it first.")


def check_run_folder(name: str) -> None:
    """Raise ValueError if `name` is no folder that files can be put into, and none can be made of that name."""
    place = os.path.realpath(name)
    if os.path.exists(place) and not os.path.isdir(place):
        raise ValueError(f"`--output`: {name} is no folder. Give a folder, or a new name.")
    check_folder(place, name)


def is_context(path: str) -> bool:
    """Whether a file is a compressed context, by its first bytes."""
    try:
        with open(path, "rb") as file:
            return b'"format":"c3-context"' in file.read(1 << 12)
    except OSError:
        return False


@contextlib.contextmanager
def opened_for_writing(target: str) -> Iterator[IO[bytes]]:
    """A binary file that becomes `target` once it is written in full; standard output for `STREAM`."""
    if target == STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    os.makedirs(os.path.dirname(os.path.realpath(target)), exist_ok=True)
    with atomic_file(target) as file:
        yield file


def check_context(path: str) -> None:
    """Raise ValueError if there is no file `path`, or it is a folder."""
    if os.path.isdir(path):
        raise ValueError(f"`FILE{SUFFIX}`: {path} is a folder. Give the compressed contexts in it.")
    if path != STREAM and not os.path.exists(path):
        raise ValueError(f"`FILE{SUFFIX}`: there is no file {path}. Check the name.")


@contextlib.contextmanager
def context_path(path: str) -> Iterator[Path]:
    """`path` itself, or a temporary copy of what standard input or a pipe gives: contexts are mapped, not streamed.

    Raises:
        ValueError: If it is a folder, or not there.
    """
    check_context(path)
    if path != STREAM and stat.S_ISREG(os.stat(path).st_mode):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"stdin{SUFFIX}"
        with copy.open("wb") as file, contextlib.ExitStack() as stack:
            source = sys.stdin.buffer if path == STREAM else stack.enter_context(open(path, "rb"))
            shutil.copyfileobj(source, file)
        try:
            yield copy
        except ValueError as error:
            # The copy's name says nothing to whoever reads the message.
            raise ValueError(str(error).replace(str(copy), "standard input" if path == STREAM else path)) from error
