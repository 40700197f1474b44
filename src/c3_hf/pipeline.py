"""The object a user holds: a C3 model and its processor, and all that can be done with them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from . import tiny_model_path
from .latents import CompressedContext, RestoredText, compress, iter_restored, restore, verify
from .latents.asking import Answer, ask
from .latents.restoring import Restorer, context_room
from .latents.segmentation import Source


Conversation = Sequence[dict[str, Any]]


class C3Pipeline:
    """A C3 model with its processor: compress a text once, restore it, measure it, ask it many times.

    Args:
        model: A `C3ForConditionalGeneration`.
        processor: Its `C3Processor`.
        name: What people call it; by default where the model was loaded from.

    Example:

    ```python
    >>> from c3_hf import C3Pipeline

    >>> pipe = C3Pipeline.from_pretrained()
    >>> context = pipe.compress("The night train left the harbour a little after nine.")
    >>> print(pipe.restore(context))
    The night train left the harbour a little after nine.
    ```
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str | None = None):
        self.model, self.processor = model, processor
        self.name = name or Path(model.name_or_path).name or type(model).__name__

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> C3Pipeline:
        """Load a model and its processor.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id; None is the small model in the package.
            device: Where to compute; None is the CPU, unless `kwargs` hold a `device_map`.
            dtype: What to compute in, such as "bfloat16"; None is the dtype of the checkpoint.
            kwargs: What else `AutoModelForCausalLM.from_pretrained` takes.

        Raises:
            ValueError: If there is no C3 model that can be loaded, or torch cannot compute on `device` here; the
                weights are not read then.
        """
        path = os.fspath(pretrained_model_name_or_path or tiny_model_path())
        options = {"dtype": "auto" if dtype is None else dtype, **kwargs}
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
        if device is not None:
            check_device(device)
        check_checkpoint(path, **hub)
        model = _loaded(path, AutoModelForCausalLM, **options)
        processor = _loaded(path, AutoProcessor, **hub)
        return cls((model if device is None else model.to(device)).eval(), processor, name=Path(path).name)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.dtype

    @property
    def longest_segment(self) -> int:
        """Most tokens that a segment can have, by the positions of both halves; more than the model may be good at."""
        return min(context_room(self.model), Restorer(self.model, self.processor).room - 1)

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"C3Pipeline({self.name}: {config.num_latents} latents for up to {config.longest_segment} tokens, "
            f"{self.dtype}, {self.device})"
        )

    def compress(self, source: Source, **options: Any) -> CompressedContext:
        """Compress a text of any length, see [`compress`] for the options."""
        return compress(source, self.model, self.processor, **options)

    def restore(self, context: CompressedContext, **options: Any) -> RestoredText:
        """Generate the text of a compressed context back, see [`restore`]."""
        return restore(context, self.model, self.processor, **options)

    def iter_restored(self, context: CompressedContext, **options: Any) -> Iterator[tuple[bytes, bool]]:
        """As [`restore`], segment after segment, see [`iter_restored`]."""
        return iter_restored(context, self.model, self.processor, **options)

    def verify(self, context: CompressedContext, source: Source, **options: Any) -> CompressedContext:
        """Measure what a compressed context brings back of its text, see [`verify`]."""
        return verify(context, source, self.model, self.processor, **options)

    def ask(
        self, contexts: CompressedContext | Sequence[CompressedContext], question: str = "", **options: Any
    ) -> Answer:
        """Ask compressed contexts what the model was trained for, see [`ask`]."""
        several = [contexts] if isinstance(contexts, CompressedContext) else list(contexts)
        return ask(several, self.model, self.processor, question, **options)

    @torch.no_grad()
    def __call__(
        self,
        messages: str | Conversation | Sequence[Conversation],
        *,
        streamer: BaseStreamer | None = None,
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """Chat.

        Args:
            messages: A conversation, several of them, or the text of one user message. Contents may hold parts
                `{"type": "context", "text": str}` and `{"type": "context", "context": CompressedContext}`.
            streamer: Is given a single reply as it comes.
            generate_kwargs: What `generate` takes.

        Returns:
            The reply, or those of several conversations.

        Raises:
            ValueError: If a message cannot be rendered, see [`C3Processor.apply_chat_template`].
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        single = not messages or isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if single else list(messages)
        stored = any(
            isinstance(part, dict) and isinstance(part.get("context"), CompressedContext)
            for conversation in conversations
            for message in conversation
            if not isinstance(message.get("content"), str)
            for part in message.get("content") or []
        )
        # One batch takes its contexts as texts or as latents.
        rendered = [
            [self._with_latents(message) if stored else message for message in conversation]
            for conversation in conversations
        ]
        begun = [conversation[-1]["role"] == "assistant" for conversation in rendered if conversation]
        if any(begun) and not all(begun):
            raise ValueError("`messages`: either every conversation ends with a begun reply or none does.")
        options = {"add_generation_prompt": False, "continue_final_message": True} if any(begun) else {}
        inputs = self.processor.apply_chat_template(rendered, **options).to(self.device)
        output = self.model.generate(**inputs, streamer=streamer, **generate_kwargs)
        replies = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        return replies[0] if single and len(replies) == 1 else replies

    def _with_latents(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with latents in the place of its contexts."""
        if isinstance(message.get("content"), str):
            return message
        content: list[Any] = []
        for part in message.get("content") or []:
            context = part.get("context") if isinstance(part, dict) else None
            if context is None and isinstance(part, dict) and part.get("type") == "context" and "text" in part:
                context = self.compress(part["text"], dtype=torch.float32)
            content += [part] if context is None else context.content_parts(self.model)
        return {**message, "content": content}


def check_device(device: str | torch.device) -> None:
    """Raise ValueError if `device` is none, or one that this machine or this torch has not."""
    try:
        usable = torch.empty(1, device=device).device.type != "meta"
        reason = "it holds no values"
    except (RuntimeError, AssertionError) as error:
        usable, reason = False, re.split(r"[.;] ", " ".join(str(error).split()))[0]
    if not usable:
        raise ValueError(
            f"`device` {str(device)!r} cannot be used here ({reason}). Give cpu, or a device this machine has."
        )


def check_checkpoint(path: str, **hub: Any) -> None:
    """Raise ValueError if `path`, a folder or a Hub id, holds no C3 model; only its configuration is looked at."""
    # Code from the Hub is never run for this: C3's own is here.
    config = _loaded(path, AutoConfig, trust_remote_code=False, **hub)
    if config.model_type != "c3":
        raise ValueError(
            f"`pretrained_model_name_or_path` {path} is a model of type {config.model_type!r}, not a C3 model. Give "
            "one, or make one of two language models with `c3-hf new`."
        )


def _loaded(path: str, auto_class: Any, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` {path}: no C3 model can be loaded from there "
            f"({' '.join(str(error).split())[:300]}). Give the folder or the Hub id of one."
        ) from error
