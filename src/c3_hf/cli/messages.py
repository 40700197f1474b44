"""What a command says when something goes wrong: one line on stderr and an exit status, and streams that hold out."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

from .parsing import as_typed


FAILED = 1
INTERRUPTED = 130

# What to do about the commonest errors of the operating system.
_ADVICE = {
    errno.ENOENT: "check the name",
    errno.EACCES: "give one that you may use, or change its permissions",
    errno.EPERM: "give one that you may use, or change its permissions",
    errno.EROFS: "give a place that can be written to",
    errno.ENOSPC: "make room, then call again",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "check the folders in the name",
    errno.EEXIST: "give another name",
    errno.ELOOP: "the link leads to itself",
    errno.ENAMETOOLONG: "give a shorter name",
}


def expected_errors() -> tuple[type[BaseException], ...]:
    """Kinds of error that are the user's to mend, so that one line says it; any other shows where the fault is.

    Those of other packages count once the package is loaded: this module loads none.
    """
    kinds: list[type[BaseException]] = [ValueError, TypeError, OSError, ImportError, MemoryError]
    for module, name in (
        ("safetensors", "SafetensorError"),
        ("torch", "OutOfMemoryError"),
        ("yaml", "YAMLError"),
        ("jinja2", "TemplateError"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None:
            kinds.append(kind)
    return tuple(kinds)


def one_line(error: BaseException) -> str:
    """The error in one line: what, where, what to do."""
    if isinstance(error, BrokenPipeError):
        return "the output was closed by the program that reads it, so not all of it was written"
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        advice = _ADVICE.get(error.errno)
        return f"{where}{error.strerror}" + (f"; {advice}" if advice else "")
    if isinstance(error, MemoryError):
        return "there is not enough memory; a smaller --batch-size needs less"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def say(args: argparse.Namespace | None, text: str) -> None:
    """One line on stderr, under the command's name and with its arguments as they are typed."""
    name, text = ("c3-hf", text) if args is None else (f"c3-hf {args.command}", as_typed(text, args.typed))
    print(f"{name}: {text}", file=sys.stderr)


class Failures:
    """What a command on several things could not do: a line each as it happens, and the status at the end."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.count = args, 0

    def add(self, where: str, error: BaseException | str) -> None:
        """Say that `where` failed."""
        self.count += 1
        text = error if isinstance(error, str) else one_line(error)
        say(self.args, text if text.startswith(f"{where}: ") else f"{where}: {text}")

    @contextlib.contextmanager
    def noted(self, where: str) -> Iterator[None]:
        """Go on behind the block where it fails; only a closed output ends the command."""
        try:
            yield
        except BrokenPipeError:
            raise
        except expected_errors() as error:
            self.add(where, error)

    def status(self, total: int) -> int:
        """The exit status, and what to say of it where there were `total` things to do."""
        if self.count and total > 1:
            say(self.args, f"{self.count} of {total} inputs failed")
        return FAILED if self.count else 0


class _ClosedStream(io.TextIOBase):
    """In the place of a standard stream that the caller has closed: an error at the first use instead of a crash."""

    def __init__(self, name: str):
        self._name = name

    @property
    def buffer(self) -> _ClosedStream:
        return self

    def write(self, text: object) -> int:
        raise OSError(f"{self._name} is closed; leave it open, or name a file where the command takes one")

    def read(self, size: int | None = -1) -> str:
        raise OSError(f"{self._name} is closed; leave it open, or give a file instead of -")


def prepare_streams() -> None:
    """Make the standard streams ready for any text and for being closed."""
    # A number that is free goes to the next file that is opened, and what a library prints would land in that.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = _ClosedStream("standard input")
    if sys.stdout is None:
        sys.stdout = _ClosedStream("standard output")
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8")
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def abandon_stdout() -> None:
    """Keep Python from writing what is left in stdout's buffer when it ends: that failed already."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def check_text(argument: str, text: str | None) -> None:
    """Raise ValueError if words of the command line are not text: bytes that are not UTF-8 are lone surrogates."""
    if text is None:
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{argument}` is not UTF-8 at character {error.start}: {text!a}. Type it on a terminal whose locale is "
            "UTF-8."
        ) from error
