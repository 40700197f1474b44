"""The store: a folder of `.c3` files, whole or not there at any moment, the least recently used going first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..files import JOURNAL_SUFFIX, atomic_file
from ..latents import CompressedContext
from .protocol import ApiError


SUFFIX = ".c3"
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


class ContextStore:
    """Compressed contexts of one model, by id: the name of the file without `.c3`.

    A file's time of change is when the context was last used, so that the order outlives the process.

    Args:
        folder: Where the files are; made if it is absent.
        example: Any context of the model, such as that of an empty text: those of others are refused.
        max_bytes: Most bytes of all files together; None is no limit.

    Raises:
        ValueError: If `max_bytes` is not positive, or `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike, example: CompressedContext, max_bytes: int | None = None):
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"`max_bytes` must be above 0, got {max_bytes}.")
        self.folder, self.header, self.max_bytes = Path(folder), example.header, max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`folder` {self.folder} is a file; give a folder for the store.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._being_written: set[str] = set()

    def path(self, context_id: str) -> Path:
        """The file of a context.

        Raises:
            ApiError: 404, if no context can have this id.
        """
        if not _ID.fullmatch(context_id):
            raise _not_found()
        return self.folder / f"{context_id}{SUFFIX}"

    def __contains__(self, context_id: str) -> bool:
        return self.path(context_id).is_file()

    def ids(self) -> list[str]:
        """All contexts, the most recently used first."""
        found = [(changed, path.stem) for changed, _, path in self._files() if path.suffix == SUFFIX]
        return [name for _, name in sorted(found, reverse=True) if _ID.fullmatch(name)]

    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def open(self, context_id: str) -> CompressedContext:
        """A context, which counts as used now.

        Raises:
            ApiError: 404 if there is none, 409 if it is of another model, 500 if its file is damaged.
        """
        path = self.path(context_id)
        try:
            context = CompressedContext.load(path)
            os.utime(path)
        except FileNotFoundError as error:
            raise _not_found() from error
        except ValueError as error:
            message = str(error).replace(str(path), context_id)
            raise ApiError(500, f"the file of this context cannot be read: {message}", "context_damaged") from error
        self._check_model(context)
        return context

    def delete(self, context_id: str) -> None:
        """Remove a context.

        Raises:
            ApiError: 404 if there is none, 409 while it is being written.
        """
        path = self.path(context_id)
        if path.name in self._being_written:
            raise ApiError(409, "this context is being compressed at this moment.", "context_busy", "id", retry=True)
        try:
            path.unlink()
        except FileNotFoundError as error:
            raise _not_found() from error

    @contextmanager
    def writing(self, context_id: str) -> Iterator[Path]:
        """The file to write a context into, which nothing evicts meanwhile; makes room for it afterwards.

        Raises:
            ApiError: 413 if the context alone is larger than the store may be; it is removed.
        """
        path = self.path(context_id)
        with self._lock:
            self._being_written.add(path.name)
        try:
            yield path
            self._make_room(path)
        finally:
            with self._lock:
                self._being_written.discard(path.name)

    def add(self, file: BinaryIO) -> str:
        """Take in a `.c3` file that somebody else wrote. The same bytes twice are one context.

        Returns:
            Its id.

        Raises:
            ApiError: 400 if it is none or damaged, 409 if it is of another model, 413 if it is too large.
        """
        digest = hashlib.sha256()
        file.seek(0)
        while piece := file.read(1 << 20):
            digest.update(piece)
        context_id = f"c3-{digest.hexdigest()[:32]}"
        if context_id in self:
            self.open(context_id)
            return context_id
        with self.writing(context_id) as path, atomic_file(path) as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy)
            copy.flush()
            # Checked under the name it has until it is known to be good.
            try:
                context = CompressedContext.load(copy.name)
                context.check()
            except ValueError as error:
                message = str(error).replace(copy.name, "the file")
                raise ApiError(400, f"this is no compressed context: {message}", "no_context", "file") from error
            self._check_model(context)
        return context_id

    def _check_model(self, context: CompressedContext) -> None:
        for name in ("model", "tokenizer", "num_latents", "hidden_size"):
            theirs, ours = getattr(context.header, name), getattr(self.header, name)
            if theirs != ours:
                raise ApiError(
                    409,
                    f"this context was compressed by another model (`{name}` {theirs!s:.16} instead of "
                    f"{ours!s:.16}): its latents mean nothing to this one. Compress the text again.",
                    "other_model",
                )

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of whatever takes room: contexts, and what an interrupted run left."""
        found = []
        for entry in os.scandir(self.folder):
            if not entry.name.endswith((SUFFIX, JOURNAL_SUFFIX, ".tmp")):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                # Removed since the folder was listed.
                continue
            found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found

    def _make_room(self, newest: Path) -> None:
        if self.max_bytes is None:
            return
        with self._lock:
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= self.max_bytes:
                    return
                # Beside a file lie its journal and, hidden, what becomes it.
                if not path.name.lstrip(".").startswith(tuple(self._being_written)):
                    path.unlink(missing_ok=True)
                    total -= size
            if newest.is_file() and newest.stat().st_size > self.max_bytes:
                newest.unlink()
                raise ApiError(413, "this context is larger than the store may be.", "context_too_large")


def context_id_of(data: bytes, empty: CompressedContext, verify: bool) -> str:
    """The id of a text with the options it is compressed with: the same for both gives the same.

    Args:
        data: The text's bytes.
        empty: A context of no text with these options, in which they are resolved.
        verify: Whether they are measured.
    """
    passing = ("text_sha256", "source", "passes", "writer")
    said: dict[str, Any] = {name: value for name, value in vars(empty.header).items() if name not in passing}
    said |= {"text": hashlib.sha256(data).hexdigest(), "dtype": str(empty.latents.dtype), "verify": verify}
    return f"c3-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]}"


def _not_found() -> ApiError:
    return ApiError(
        404,
        "there is no context of this id; it may have been evicted. Post the text again; its id is the same.",
        "context_not_found",
        "id",
    )
