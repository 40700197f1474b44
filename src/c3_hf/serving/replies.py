"""What an engine is asked for and what it gives: prompts, settings, pieces of replies, and text out of tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from transformers import ProcessorMixin

from ..latents.decoding import skipped_positions
from ..pipeline import C3Pipeline
from .protocol import ApiError


# A content run of a message: text of a user, or projected latents `(num_blocks, num_latents, text_hidden_size)`.
Run: TypeAlias = str | torch.Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt, read by this server's own processor.

    Attributes:
        ids: The decoder's tokens, placeholders included.
        latents: What stands in their places, `(num_blocks, num_latents, text_hidden_size)`; None without contexts.
        strides: Tokens that each latent of each block stands for; empty for a model whose latents have no stride.
        messages: Role and content of each message, for an engine that writes the turns itself; None outside a chat.
        begun: Whether the last message is a reply to go on with.
    """

    ids: Sequence[int]
    latents: torch.Tensor | None = None
    strides: Sequence[int] = ()
    messages: Sequence[tuple[str, Sequence[Run]]] | None = None
    begun: bool = False


@dataclass(frozen=True)
class Settings:
    """How to reply.

    Attributes:
        max_tokens: Most tokens of a reply, at least 1.
        temperature: What logits are divided by before drawing; 0 takes the largest.
        top_p: Draw from the likeliest tokens that together have this probability, above 0 up to 1.
        seed: The same seed draws the same reply; None draws another each time.
        stop: Strings that end a reply and are not part of it.
        num_replies: Replies to the prompt.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_replies: int = 1


@dataclass(frozen=True)
class Piece:
    """The next piece of a reply.

    Attributes:
        index: Which of the replies.
        text: May be empty.
        finish: "stop" or "length" with the last piece of a reply; else None.
        tokens: Tokens of the whole reply, with its last piece.
    """

    index: int
    text: str
    finish: str | None = None
    tokens: int = 0


class Places:
    """A bounded number of places that work takes while it waits and runs.

    Args:
        most: How many there are.
        what: What they are for, in the error.
    """

    def __init__(self, most: int, what: str):
        self.most, self.what, self.used = most, what, 0

    @contextmanager
    def taken(self, count: int = 1) -> Iterator[None]:
        """Hold places; all calls are on the event loop's thread.

        Raises:
            ApiError: 429 if there are not enough free ones; 400 if there never will be.
        """
        if count > self.most:
            raise ApiError(
                400, f"this request needs {count} {self.what} at once; the server has {self.most}.", "too_many"
            )
        if self.used + count > self.most:
            raise ApiError(
                429, f"all {self.most} {self.what} of the server are taken; try again in a while.", "busy", retry=True
            )
        self.used += count
        try:
            yield
        finally:
            self.used -= count


class Engine(Protocol):
    """What makes replies."""

    name: str
    places: Places

    async def start(self) -> None:
        """Make sure that it can serve; raise ValueError, saying what to do, if it cannot."""

    def reply(self, prompt: Prompt, settings: Settings) -> AsyncGenerator[Piece, None]:
        """Replies, piece by piece; closing the iterator gives their places back."""

    async def close(self) -> None:
        """Let go of what it holds."""


class TextStream:
    """Text of a reply out of its tokens, one by one: whole characters only, and nothing of a stop string.

    Args:
        processor: Decodes them.
        stop: Strings that end the reply.
    """

    def __init__(self, processor: ProcessorMixin, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = processor.tokenizer, stop
        self._ids: list[int] = []
        # Tokens from `_start` are decoded together; those before `_read` have been given out as text.
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int, last: bool = False) -> str:
        """The text that is certain with one more token; `stopped` says whether a stop string has come.

        Args:
            token: Its id.
            last: Whether no more will come, so that nothing is held back.
        """
        self._ids.append(token)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        # A character whose last bytes are still to come is decoded as U+FFFD.
        if now.endswith("\ufffd") and not last:
            return ""
        self._held += now[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What was held back, at the end of a reply."""
        text = self._held + self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._read)) :]
        self._held, self._read = "", len(self._ids)
        return text

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)


def positions_taken(prompt: Prompt, pipe: C3Pipeline) -> int:
    """Positions of the decoder that a prompt takes before its reply."""
    num_blocks = 0 if prompt.latents is None else len(prompt.latents)
    return len(prompt.ids) + num_blocks * skipped_positions(pipe.model)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
