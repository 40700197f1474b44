"""The engine `transformers`: one thread computes, and replies that wait are made together in one `generate()`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from ..latents.decoding import decoder_positions
from ..modeling.positions_c3 import pad_rows
from ..modeling.prompt_c3 import STOP_TOKEN
from ..pipeline import C3Pipeline
from .protocol import ApiError, Limits
from .replies import Piece, Places, Prompt, Settings, TextStream, positions_taken


logger = logging.get_logger(__name__)

T = TypeVar("T")


class ModelThread:
    """The one thread in which a model computes. Short work goes in between the pieces of long work."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="c3-model")
        self._short: deque[tuple[Future, Callable[[], Any]]] = deque()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Compute something short, in turn."""
        future: Future[T] = Future()
        self._short.append((future, work))
        self._executor.submit(self.let_short_work_pass)
        return future

    def submit_long(self, work: Callable[[], T]) -> Future[T]:
        """Compute something long, which calls `let_short_work_pass` every now and then."""
        return self._executor.submit(work)

    async def run(self, work: Callable[[], T]) -> T:
        """As `submit`, for a coroutine; one that is cancelled does not wait, and what has not begun never begins."""
        return await asyncio.wrap_future(self.submit(work))

    def let_short_work_pass(self) -> None:
        """Do all short work that waits; only in the thread itself."""
        while self._short:
            future, work = self._short.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Row:
    """One reply: a row of a batch. Its fields are set by the thread that computes, but for `left`."""

    def __init__(
        self, prompt: Prompt, settings: Settings, index: int, pipe: C3Pipeline, give: Callable[[Piece | ApiError], Any]
    ):
        self.prompt, self.settings, self.index, self._give = prompt, settings, index, give
        self.left = self.done = False
        self.deadline = float("inf")
        self.count = 0
        self._text = TextStream(pipe.processor, settings.stop)
        self._random: torch.Generator | None = None
        if settings.temperature > 0:
            self._random = torch.Generator()
            if settings.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed((settings.seed + index) % (1 << 63))

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for it; one that is late is told so."""
        if not self.done and not self.left and time.monotonic() > self.deadline:
            self.fail(ApiError(503, "the time for one request is over.", "timeout"))
        return not self.done and not self.left

    def take(self, token: int, stops: set[int]) -> bool:
        """One more token; whether the row is finished."""
        if not self.is_wanted:
            self.done = True
        elif token in stops:
            self._finish(self._text.rest(), "stop")
        else:
            self.count += 1
            last = self.count == self.settings.max_tokens
            text = self._text.push(token, last)
            if self._text.stopped or last:
                self._finish(text, "stop" if self._text.stopped else "length")
            elif text:
                self._give(Piece(self.index, text))
        return self.done

    def fail(self, error: ApiError) -> None:
        """Tell who waits that nothing more comes."""
        if not self.done:
            self.done = True
            self._give(error)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(vocab_size,)` whose largest is the token drawn from these; by the row's own random numbers, so that
        a seed gives the same reply beside any others."""
        if self._random is None:
            return logits
        scores = (logits.float() / self.settings.temperature).log_softmax(-1)
        if self.settings.top_p < 1:
            ordered, order = scores.sort(descending=True)
            # A token stays if those before it have less than top_p together; the first always does.
            beyond = ordered.exp().cumsum(-1) - ordered.exp() >= self.settings.top_p
            scores = scores.scatter(0, order[beyond], float("-inf"))
        # Gumbel's way to draw: the largest of log p - log(-log u), u uniform in (0, 1).
        uniform = torch.rand(len(scores), generator=self._random).clamp_min(1e-20).to(scores.device)
        return scores - (-uniform.log()).clamp_min(1e-20).log()

    def _finish(self, text: str, reason: str) -> None:
        self.done = True
        self._give(Piece(self.index, text, reason, self.count))


class _Taps(StoppingCriteria):
    """Gives each row its token as soon as it is there, and stops those that need no more."""

    def __init__(self, rows: list[_Row], stops: set[int]):
        self._rows, self._stops = rows, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tokens = input_ids[:, -1].tolist()
        done = [row.take(token, self._stops) for row, token in zip(self._rows, tokens)]
        return torch.tensor(done, device=input_ids.device)


class _Draws(LogitsProcessor):
    """Lets each row draw by its own settings."""

    def __init__(self, rows: list[_Row]):
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.draw(logits).to(scores.dtype) for row, logits in zip(self._rows, scores)])


class TransformersEngine:
    """Replies by the pipeline's own model.

    Requests wait in one line. The first of it, and all behind it that fit beside it, become one batch; each row of it
    has settings and an end of its own, so that a short reply is given while longer ones go on. What comes meanwhile
    waits for the batch's end.

    Args:
        pipe: The model; nothing else computes with it.
        thread: Where it computes.
        limits: How many wait, how many are made together, and for how long.
        on_batch: Is told the number of rows of each batch.
    """

    name = "transformers"

    def __init__(
        self, pipe: C3Pipeline, thread: ModelThread, limits: Limits, on_batch: Callable[[int], Any] | None = None
    ):
        self._pipe, self._thread, self._limits, self._on_batch = pipe, thread, limits, on_batch
        self.places = Places(limits.max_waiting, "places for replies")
        self._waiting: deque[_Row] = deque()
        self._lock = threading.Lock()
        own = pipe.model.generation_config.eos_token_id
        self._stops = {pipe.processor.tokenizer.convert_tokens_to_ids(STOP_TOKEN)}
        self._stops |= {own} if isinstance(own, int) else set(own or ())

    async def start(self) -> None:
        """Nothing to do: the model is in memory."""

    async def close(self) -> None:
        """Tell all that wait that the server ends."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for row in waiting:
            row.fail(ApiError(503, "the server is shutting down.", "shutting_down", retry=True))

    async def reply(self, prompt: Prompt, settings: Settings) -> AsyncGenerator[Piece, None]:
        """See [`Engine`].

        Raises:
            ApiError: 429 without a free place, 503 when time is over, 500 when the model fails.
        """
        loop = asyncio.get_running_loop()
        # As long as a reply at most, so that whoever reads slowly holds nobody up.
        pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()

        def give(piece: Piece | ApiError) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        with self.places.taken(settings.num_replies):
            rows = [_Row(prompt, settings, index, self._pipe, give) for index in range(settings.num_replies)]
            deadline = time.monotonic() + self._limits.seconds
            with self._lock:
                for row in rows:
                    row.deadline = deadline
                    self._waiting.append(row)
            self._thread.submit(self._make_batch).add_done_callback(_log_failure)
            try:
                unfinished = len(rows)
                while unfinished:
                    piece = await _next_of(pieces, deadline)
                    if isinstance(piece, ApiError):
                        raise piece
                    yield piece
                    unfinished -= piece.finish is not None
            finally:
                for row in rows:
                    row.left = True

    def _take(self) -> list[_Row]:
        """The rows of the next batch: the first that waits, and those that fit beside it."""
        room = decoder_positions(self._pipe.model)
        rows: list[_Row] = []
        passed_over: deque[_Row] = deque()
        with self._lock:
            while self._waiting and len(rows) < self._limits.max_batch:
                row = self._waiting.popleft()
                if not row.is_wanted:
                    continue
                beside = [*rows, row]
                longest = max(positions_taken(other.prompt, self._pipe) for other in beside)
                if longest + max(other.settings.max_tokens for other in beside) <= room or not rows:
                    rows.append(row)
                else:
                    passed_over.append(row)
            self._waiting.extendleft(reversed(passed_over))
        return rows

    def _make_batch(self) -> None:
        rows = self._take()
        if not rows:
            return
        try:
            self._generate(rows)
        except Exception:
            for row in rows:
                row.fail(ApiError(500, "the model failed on this batch of requests.", "engine_error"))
            raise
        finally:
            if self._waiting:
                self._thread.submit(self._make_batch).add_done_callback(_log_failure)

    @torch.no_grad()
    def _generate(self, rows: list[_Row]) -> None:
        model = self._pipe.model
        if self._on_batch is not None:
            self._on_batch(len(rows))
        pad = model.generation_config.pad_token_id or 0
        ids, mask = pad_rows([torch.tensor(row.prompt.ids) for row in rows], left=True, value=pad)
        config = GenerationConfig(
            max_new_tokens=max(row.settings.max_tokens for row in rows),
            do_sample=False,
            eos_token_id=sorted(self._stops),
            pad_token_id=pad,
        )
        options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([_Taps(rows, self._stops)])}
        if any(row.settings.temperature > 0 for row in rows):
            options["logits_processor"] = LogitsProcessorList([_Draws(rows)])
        given = [row.prompt.latents for row in rows if row.prompt.latents is not None]
        if given:
            # Slots behind a row's own contexts are not used: latents of 0, with any stride.
            latents = [given[0][:0] if row.prompt.latents is None else row.prompt.latents for row in rows]
            options["context_latents"] = pad_sequence(latents, batch_first=True)
        if given and model.config.latent_stride is not None:
            strides = [torch.tensor(row.prompt.strides, dtype=torch.long) for row in rows]
            options["context_strides"] = pad_rows(strides, left=False, value=1)[0].to(self._pipe.device)
        model.generate(ids.to(self._pipe.device), config, attention_mask=mask.to(self._pipe.device), **options)


async def _next_of(pieces: asyncio.Queue[Piece | ApiError], deadline: float) -> Piece | ApiError:
    try:
        return await asyncio.wait_for(pieces.get(), max(0.01, deadline - time.monotonic()))
    except asyncio.TimeoutError as error:
        raise ApiError(503, "the time for one request is over.", "timeout") from error


def _log_failure(future: Future) -> None:
    """The kind of error and where it was raised, without its message, which may repeat what a user wrote."""
    error = None if future.cancelled() else future.exception()
    if error is not None:
        logger.error(f"the engine failed: {describe_error(error)}")


def describe_error(error: BaseException) -> str:
    """Kind and place of an error for the log, without its message, which may repeat what a user wrote."""
    place, trace = "", error.__traceback__
    while trace is not None:
        place, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    return f"{type(error).__name__} at {place}"
