"""Contexts of the server: compressed into the store, described, restored, and made ready for a prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from transformers.utils import logging

from ..files import JOURNAL_SUFFIX
from ..latents import CompressedContext
from ..latents.decoding import decoder_positions, skipped_positions
from ..pipeline import C3Pipeline
from .engine import ModelThread, describe_error
from .protocol import ApiError, CompressionForm, ContextPart, Limits
from .replies import Places
from .store import ContextStore, context_id_of


logger = logging.get_logger(__name__)

# Bytes of a text between two looks at what else there is to do.
_PIECE = 1 << 12
# Segments compressed, or restored, in one batch. Small, because others wait for its end.
_BATCH = 4
_MOST_KEPT = 64


@dataclass
class _Job:
    """A text that is being compressed."""

    size: int
    deadline: float
    # Whoever starts it waits for it.
    waiting: int = 1
    keep: bool = False
    read: int = 0
    future: Future = field(default_factory=Future)

    @property
    def is_wanted(self) -> bool:
        return self.keep or self.waiting > 0


@dataclass(frozen=True)
class Latents:
    """A context as a prompt takes it.

    Attributes:
        blocks: `(num_blocks, num_latents, text_hidden_size)`, projected, in the model's dtype and on its device.
        strides: Tokens that each latent of each block stands for; empty for a model whose latents have no stride.
        tokens: Tokens of its text.
    """

    blocks: torch.Tensor
    strides: list[int]
    tokens: int


class Contexts:
    """What clients do with contexts. Every call is made on the event loop; the model's thread computes.

    Args:
        pipe: The model.
        thread: Where it computes.
        store: Where contexts are kept.
        limits: What a client may ask for.
    """

    def __init__(self, pipe: C3Pipeline, thread: ModelThread, store: ContextStore, limits: Limits):
        self._pipe, self._thread, self.store, self._limits = pipe, thread, store, limits
        self.places = Places(limits.max_jobs, "places for compressing and restoring")
        self._jobs: dict[str, _Job] = {}
        # Why compressions in the background failed, and what options mean: the last few of each.
        self._failures: dict[str, ApiError] = {}
        self._empties: dict[tuple[Any, ...], CompressedContext] = {}

    async def compress(
        self, data: bytes, form: CompressionForm, background: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Compress a text into the store, unless it is there.

        Args:
            data: UTF-8, or any bytes for a byte-exact context.
            form: The options.
            background: Answer at once; else when it is done. A caller that is cancelled gives it up, if nobody else
                waits; the same call goes on where it was.

        Returns:
            HTTP status, 200 for what was there, 201 for what is new, 202 for what is going on; and the description.

        Raises:
            ApiError: 400, 413, 429 or 503.
        """
        if len(data) > self._limits.max_text:
            raise _too_long(self._limits)
        # A form may hold more than options, such as the text.
        options = form.model_dump(include=set(CompressionForm.model_fields))
        empty = await self._empty(options)
        context_id = await asyncio.to_thread(context_id_of, data, empty, form.verify)
        job = self._jobs.get(context_id)
        if job is None and context_id in self.store:
            return 200, await self.describe(context_id)
        if job is None:
            job = self._start(context_id, data, options)
        else:
            job.waiting += 1
        try:
            if background:
                job.keep = True
                return 202, self._describe_job(context_id, job)
            done = asyncio.wrap_future(job.future)
            # Asked for its error here, because whoever is cancelled below asks no more.
            done.add_done_callback(lambda future: future.cancelled() or future.exception())
            # Waited for, not awaited: to be cancelled is not to cancel what others may wait for.
            await asyncio.wait({done})
            job.future.result()
        finally:
            job.waiting -= 1
        return 201, _description(context_id, await asyncio.to_thread(self.store.open, context_id))

    async def add(self, file: BinaryIO) -> dict[str, Any]:
        """Take in a `.c3` file, see [`ContextStore.add`]."""
        return await self.describe(await asyncio.to_thread(self.store.add, file))

    async def describe(self, context_id: str) -> dict[str, Any]:
        """What is known about a context, or how far its compression is.

        Raises:
            ApiError: See [`ContextStore.open`]; or why its compression in the background failed.
        """
        job = self._jobs.get(context_id)
        if job is not None:
            return self._describe_job(context_id, job)
        return _description(context_id, await self.open(context_id))

    async def open(self, context_id: str) -> CompressedContext:
        """A context that is ready.

        Raises:
            ApiError: See [`ContextStore.open`]; 409 while it is compressed, or why that failed in the background.
        """
        if context_id not in self.store:
            if context_id in self._jobs:
                message = "this context is still being compressed; ask it when its `status` is ready."
                raise ApiError(409, message, "context_not_ready", "id", retry=True)
            if context_id in self._failures:
                raise self._failures[context_id]
        return await asyncio.to_thread(self.store.open, context_id)

    async def restored(
        self, context_id: str, context: CompressedContext
    ) -> AsyncGenerator[list[tuple[bytes, bool]], None]:
        """The segments of a context, a few at a time: the next are restored when these have been read.

        Yields:
            As [`iter_restored`]: the bytes of each segment, and whether they are the source's.

        Raises:
            ApiError: 429, or 500 if the file is damaged or does not come out right here.
        """
        # Only the beginning takes a place: one that is read slowly shall not hold it.
        with self.places.taken():
            first = await self._restore(context_id, context[:_BATCH])
        yield first
        for start in range(_BATCH, len(context), _BATCH):
            yield await self._restore(context_id, context[start : start + _BATCH])

    async def _restore(self, context_id: str, some: CompressedContext) -> list[tuple[bytes, bool]]:
        try:
            return await self._thread.run(lambda: list(self._pipe.iter_restored(some, batch_size=_BATCH)))
        except ValueError as error:
            message = str(error).replace(str(self.store.path(context_id)), context_id)
            raise ApiError(500, message, "context_damaged") from error

    async def latents_of(self, part: ContextPart) -> Latents:
        """A context of a request, ready for the prompt.

        Raises:
            ApiError: If it is not there, or the decoder has no positions for so much of it.
        """
        if part.text is not None:
            context = await self._compressed(part.text)
        else:
            context = await self.open(str(part.id))
        chosen = list(range(len(context))) if part.segments is None else part.segments
        if any(not 0 <= index < len(context) for index in chosen):
            raise ApiError(
                400, f"`segments` of this context are 0 to {len(context) - 1}, got {chosen}.", "no_segment", "segments"
            )
        self._check_room(len(chosen))
        model = self._pipe.model
        if not chosen:
            config = model.config
            return Latents(torch.zeros(0, config.num_latents, config.text_config.hidden_size), [], 0)
        some = context if part.segments is None else CompressedContext.concatenate([context[i] for i in chosen])
        try:
            strides = some.context_strides(model)
            blocks = await self._thread.run(lambda: some.project(model))
            return Latents(blocks, [] if strides is None else strides[0].tolist(), some.num_tokens)
        except ValueError as error:
            raise ApiError(500, f"this context is damaged: {part.id or 'text'}.", "context_damaged") from error

    async def _empty(self, options: dict[str, Any]) -> CompressedContext:
        """The context of no text with these options, which are checked and resolved in it."""
        key = tuple(options.values())
        empty = self._empties.get(key)
        if empty is None:
            try:
                empty = await self._thread.run(lambda: self._pipe.compress(b"", **options))
            except ValueError as error:
                raise ApiError(400, str(error), "invalid_option") from error
            self._empties[key] = empty
            while len(self._empties) > _MOST_KEPT:
                del self._empties[next(iter(self._empties))]
        return empty

    async def _compressed(self, text: str) -> CompressedContext:
        pipe = self._pipe
        ids = await asyncio.to_thread(pipe.processor.tokenize_context, text)
        self._check_room(len(ids) // self.store.header.segment_length)
        return await self._thread.run(lambda: pipe.compress([text], latent_dtype=torch.float32, batch_size=_BATCH))

    def _check_room(self, num_blocks: int) -> None:
        model = self._pipe.model
        positions, per_block = decoder_positions(model), model.config.num_latents + 2 + skipped_positions(model)
        if num_blocks * per_block >= positions:
            raise ApiError(
                400,
                f"a context of {num_blocks} segments takes {num_blocks * per_block:,} positions, the model has "
                f"{positions:,}. Choose some of them: `segments`.",
                "context_length_exceeded",
                "segments",
            )

    def close(self) -> None:
        """Give up what is being compressed; posted again, it goes on where it was."""
        for job in self._jobs.values():
            job.keep, job.waiting = False, 0

    def _start(self, context_id: str, data: bytes, options: dict[str, Any]) -> _Job:
        place = ExitStack()
        place.enter_context(self.places.taken())
        job = self._jobs[context_id] = _Job(len(data), time.monotonic() + self._limits.seconds)
        self._failures.pop(context_id, None)
        job.future = self._thread.submit_long(lambda: self._compress(context_id, job, data, options))
        loop = asyncio.get_running_loop()

        def end() -> None:
            place.close()
            del self._jobs[context_id]
            error = None if job.future.cancelled() else job.future.exception()
            if error is None:
                return
            if not isinstance(error, ApiError):
                logger.error(f"compressing {context_id} failed: {describe_error(error)}")
                error = ApiError(500, "compressing this text failed.", "server_error")
            self._failures[context_id] = error
            while len(self._failures) > _MOST_KEPT:
                del self._failures[next(iter(self._failures))]

        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(end))
        return job

    def _compress(self, context_id: str, job: _Job, data: bytes, options: dict[str, Any]) -> None:
        """In the model's thread."""
        with self.store.writing(context_id) as path:
            try:
                self._pipe.compress(self._pieces(job, data), output=path, batch_size=_BATCH, **options)
            except ValueError as error:
                # What was begun is of no use: the same text would fail again.
                path.with_name(path.name + JOURNAL_SUFFIX).unlink(missing_ok=True)
                raise ApiError(400, str(error).replace(str(path), context_id), "cannot_compress") from error

    def _pieces(self, job: _Job, data: bytes) -> Iterator[bytes]:
        """The text, with everything short done in between."""
        for start in range(0, len(data), _PIECE):
            self._thread.let_short_work_pass()
            job.read = start
            if not job.is_wanted:
                raise ApiError(503, "nobody waits for this context any more.", "cancelled", retry=True)
            if time.monotonic() > job.deadline and not job.keep:
                raise ApiError(
                    503,
                    "the time for one request is over. What is finished is kept: post the same text again, or with "
                    "`background`.",
                    "timeout",
                )
            yield data[start : start + _PIECE]

    def _describe_job(self, context_id: str, job: _Job) -> dict[str, Any]:
        progress = round(job.read / max(1, job.size), 4)
        return {"id": context_id, "object": "context", "status": "compressing", "progress": progress}


def _description(context_id: str, context: CompressedContext) -> dict[str, Any]:
    fidelity, segments, accuracy = None, context.fidelity, context.token_accuracy
    if segments is not None and accuracy is not None:
        exact = sum(segment.is_exact for segment in segments)
        fidelity = {"token_accuracy": round(accuracy, 6), "exact_segments": exact}
    return {
        "id": context_id,
        "object": "context",
        "status": "ready",
        "characters": context.num_characters,
        "tokens": context.num_tokens,
        "segments": len(context),
        "latents": context.total_latents,
        "compression_ratio": round(context.compression_ratio, 2),
        "bytes": context.nbytes,
        "exact": context.is_exact,
        "fidelity": fidelity,
    }


def _too_long(limits: Limits) -> ApiError:
    return ApiError(
        413, f"the text has more than {limits.max_text:,} bytes, the most for one request.", "text_too_long"
    )


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raise ApiError 413 if texts of one request are longer than it may be, 400 if one is not valid Unicode."""
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise ApiError(400, "a text holds a lone surrogate, which is no character.", "invalid_text") from error
    if size > limits.max_text:
        raise _too_long(limits)
