"""What a system is to the harness, and what one is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from c3_hf.evaluation.tokens import TokenMeter
from c3_hf.latents.decoding import generation_budget


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


@dataclass(frozen=True)
class SystemSettings:
    """What every system is built from.

    Args:
        model: Folder or Hub id of a C3 checkpoint; gives decoder, tokenizer and number of latents.
        meter: Its tokenizer and the sizes texts are cut by.
        batch_size: Texts computed at once; the results do not depend on it in float32.
        max_new_tokens: Limit of a restored segment; `None` allows an eighth more than the segment has, and 16.
        answer_tokens: Limit of an answer.
        dtype: Name of the torch dtype weights are loaded in.
        device: Torch device name.
        system_model: Folder or Hub id of further weights, for systems that bring their own.
        font: A TrueType file for systems that draw the text; needed for scripts that DejaVu Sans does not cover.
    """

    model: str
    meter: TokenMeter
    batch_size: int = 16
    max_new_tokens: int | None = None
    answer_tokens: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    system_model: str | None = None
    font: str | None = None

    def restore_limit(self, text: str) -> int:
        """Most tokens a system may generate to restore `text`."""
        return self.max_new_tokens or generation_budget(self.meter.count(text))
