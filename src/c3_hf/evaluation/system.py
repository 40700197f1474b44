"""What a system is to the harness, what one is built from, and what those share that ask a C3 checkpoint's decoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AutoProcessor

from c3_hf.evaluation.items import TokenMeter
from c3_hf.latents.decoding import GREEDY, decoder_positions, generation_budget
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.pipeline import C3Pipeline, check_checkpoint


class System(Protocol):
    """Something that keeps a text in a number of decoder slots and works from those alone."""

    def restore(self, texts: Sequence[str]) -> list[str | None]:
        """Each text as well as it can be given back, whichever texts come together; `None` for one too long."""

    def answer(self, contexts: Sequence[str], question: str) -> str | None:
        """The answer to `question` from `contexts`; `None` if they are too long."""

    def slots(self, text: str) -> int:
        """Positions of the decoder that `text`, one segment, takes."""


class SystemUnavailable(RuntimeError):
    """A system cannot run here; the message says why, and the run records it as skipped."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How a checkpoint, and what is compared with it, is loaded and computed.

    Args:
        model: Folder or Hub id of a C3 checkpoint; gives decoder, tokenizer and number of latents.
        batch_size: Texts computed at once; the results do not depend on it in float32.
        max_new_tokens: Limit of a restored segment; `None` allows an eighth more than the segment has, and 16.
        answer_tokens: Limit of an answer.
        dtype: Name of the torch dtype weights are loaded in.
        device: Torch device.
        system_model: Folder or Hub id of further weights, for systems that bring their own.
        font: A TrueType file for systems that draw the text; needed for scripts that DejaVu Sans does not cover.
    """

    model: str
    batch_size: int = 16
    max_new_tokens: int | None = None
    answer_tokens: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    system_model: str | None = None
    font: str | None = None


@dataclass(frozen=True, kw_only=True)
class SystemSettings(CheckpointSettings):
    """What every system is built from: the checkpoint's tokenizer with the sizes texts are cut by, and how to load."""

    meter: TokenMeter

    def restore_limit(self, text: str) -> int:
        """Most tokens a system may generate to restore `text`."""
        return self.max_new_tokens or generation_budget(self.meter.count(text))


class DecoderSystem:
    """What the systems that ask the decoder of the checkpoint `settings.model` share."""

    def __init__(self, settings: SystemSettings):
        self.settings = settings
        self.pipe = C3Pipeline.from_pretrained(settings.model, device=settings.device, dtype=settings.dtype)
        self.model, self.processor = self.pipe.model, self.pipe.processor

    def restored(self, texts: Sequence[str], chat: Callable[[str], list[dict]]) -> list[str | None]:
        """The reply to `chat(text)` for each of `texts`, computed in batches; `None` for one too long."""
        outputs: list[str | None] = []
        for start in range(0, len(texts), self.settings.batch_size):
            batch = texts[start : start + self.settings.batch_size]
            limits = [self.settings.restore_limit(text) for text in batch]
            outputs += self.replies([chat(text) for text in batch], limits)
        return outputs

    def answered(self, content: str | list[dict]) -> str | None:
        """The reply to one user message; `None` if it is too long."""
        return self.replies([[{"role": "user", "content": content}]], [self.settings.answer_tokens])[0]

    @torch.no_grad()
    def replies(self, conversations: Sequence[list[dict]], limits: Sequence[int]) -> list[str | None]:
        """Greedy replies of the decoder to chats, computed in one batch.

        Args:
            conversations: Chats as `apply_chat_template` takes them.
            limits: Most new tokens of each reply; a reply is cut at its own, so that it does not depend on the others.

        Returns:
            The replies, white space at both ends kept; `None` where prompt and limit exceed the decoder's positions.
        """
        room = decoder_positions(self.model)
        lengths = map(self.pipe.positions_taken, conversations)
        taken = [row for row, length in enumerate(lengths) if length + limits[row] <= room]
        if not taken:
            return [None] * len(conversations)
        inputs = self.processor.apply_chat_template([conversations[row] for row in taken]).to(self.model.device)
        sequences = self.model.generate(**inputs, max_new_tokens=max(limits[row] for row in taken), **GREEDY)
        new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.batch_decode([ids[: limits[row]] for row, ids in zip(taken, new_ids)])
        replied = dict(zip(taken, texts))
        return [replied.get(row) for row in range(len(conversations))]


def load_meter(model: str | os.PathLike, segment_tokens: int | None = None) -> TokenMeter:
    """Tokenizer and number of latents of the checkpoint `model`.

    Args:
        segment_tokens: Tokens of a segment of long text; by default as many as `compress` takes.

    Raises:
        ValueError: If there is none there, or it is not one of C3.
    """
    check_checkpoint(os.fspath(model))
    processor = AutoProcessor.from_pretrained(model)
    config = C3Config.from_pretrained(model)
    return TokenMeter(
        tokenizer=processor.tokenizer,
        num_latents=processor.num_latents,
        segment_tokens=segment_tokens or config.longest_segment,
    )
