"""The object a user holds: a C3 model and its processor, and all that can be done with them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from . import tiny_model_path
from .latents import CompressedContext, CompressionOptions, RestoredText
from .latents.ask import Answer, ask
from .latents.compress import Compressor, compress_text
from .latents.decoding import Restorer, skipped_positions
from .latents.measure import Calibration
from .latents.restore import iter_restored, restore_all, verify_context
from .latents.segments import Source
from .modeling.chats_c3 import as_chats
from .modeling.positions_c3 import pad_rows


Conversation = Sequence[dict[str, Any]]


class C3Pipeline:
    """A C3 model with its processor: compress a text once, restore it, measure it, ask it many times.

    What it finds out of the two it keeps, such as their fingerprints: a model whose weights change, or that moves to
    another device, wants a new one.

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
        if not isinstance(model, torch.nn.Module) or model.config.model_type != "c3":
            raise TypeError(
                f"`model` must be a C3ForConditionalGeneration, got {type(model).__name__}. Load it, or both at once "
                "by C3Pipeline.from_pretrained."
            )
        if not isinstance(processor, ProcessorMixin):
            raise TypeError(f"`processor` must be a C3Processor, got {type(processor).__name__}.")
        if processor.num_latents != model.config.num_latents:
            raise ValueError(
                f"`processor` writes {processor.num_latents} placeholders for a context, `model` has "
                f"{model.config.num_latents} latents. Load the processor that belongs to the model."
            )
        self.model, self.processor = model, processor
        self.restorer = Restorer(model, processor)
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
        path = tiny_model_path() if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        path = os.fspath(path)
        if not path:
            raise ValueError("`pretrained_model_name_or_path` is empty. Give the folder or the Hub id of a C3 model.")
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be the name of a torch dtype, such as bfloat16, or auto, got {dtype!r}.")
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

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"C3Pipeline({self.name}: {config.num_latents} latents for up to {config.longest_segment} tokens, "
            f"{self.dtype}, {self.device})"
        )

    def describe(self) -> str:
        """What kind of model it is, in one line."""
        config, size = self.model.config, sum(weights.numel() for weights in self.model.parameters())
        return (
            f"{self.name}: {size:,} parameters, {config.num_latents} latents for up to {config.longest_segment} "
            f"tokens, prompts {', '.join(self.processor.prompts)}"
        )

    @property
    def segment_room(self) -> int:
        """Most tokens of a segment, `segment_length`, that the model has positions for."""
        return self.restorer.segment_room

    @property
    def calibration(self) -> Calibration:
        """How the model behaves after an error, as its checkpoint says; if it does not, nothing counts behind one."""
        return Calibration.of(self.processor)

    def compress(
        self,
        source: Source,
        options: CompressionOptions | None = None,
        *,
        output: str | os.PathLike | None = None,
        append: bool = False,
        progress: bool = False,
        **changes: Any,
    ) -> CompressedContext:
        """Compress a text of any length into latents, segment by segment.

        With `output`, finished segments are on the disk at once: after a crash the same call goes on where it was, and
        memory does not grow with the text. Without, the result is in memory only.

        Args:
            source: The text (`str`, or UTF-8 `bytes`), a `pathlib.Path` to it, an open file, or an iterable of pieces.
            options: How; by default as [`CompressionOptions`] says.
            output: File to write, by custom `*.c3`. An existing one is replaced when the new one is complete. One run
                at a time writes a file; a second one is an error.
            append: Put the segments behind those of the existing `output`.
            progress: Whether to show a progress bar on a terminal.
            changes: Fields of [`CompressionOptions`], instead of those of `options`.

        Returns:
            The compressed context; with `output`, opened from that file.

        Raises:
            ValueError: If the text is not UTF-8 and `exact` is off, an option is out of range, the model gives latents
                that are not finite, `output` cannot become a file or is being written by another run, or the journal
                or file there does not belong to this call.
            TypeError: If `source` is of another type, or there is no such option.

        Warns:
            UserWarning: If `source` is a `str` that names an existing file.
        """
        chosen = dataclasses.replace(options or CompressionOptions(), **changes)
        return compress_text(source, self.restorer, chosen, output=output, append=append, progress=progress)

    def would_make(
        self,
        context: CompressedContext,
        text_sha256: str,
        options: CompressionOptions | None = None,
        **changes: Any,
    ) -> bool:
        """Whether `compress` would make `context` of a text with this SHA-256 (hexadecimal): it is up to date."""
        chosen = dataclasses.replace(options or CompressionOptions(), **changes)
        return Compressor(self.restorer, chosen).would_make(context, text_sha256)

    def positions_taken(self, messages: Conversation) -> int:
        """Positions of the decoder that a conversation takes before its reply."""
        found: list[CompressedContext] = []
        rendered = [self._with_latents(message, found) for message in messages]
        length = self.processor.apply_chat_template(rendered)["input_ids"].shape[1]
        return length + sum(map(len, found)) * skipped_positions(self.model)

    @overload
    def restore(self, contexts: CompressedContext, **options: Any) -> RestoredText: ...

    @overload
    def restore(self, contexts: Sequence[CompressedContext], **options: Any) -> list[RestoredText]: ...

    def restore(
        self, contexts: CompressedContext | Sequence[CompressedContext], **options: Any
    ) -> RestoredText | list[RestoredText]:
        """Generate the text of a compressed context back, or those of several: segments of all share batches.

        See [`iter_restored`] for the options (`batch_size`, `max_new_tokens`, `progress`) and errors.
        """
        texts = restore_all(_several(contexts), self.restorer, **options)
        return texts[0] if isinstance(contexts, CompressedContext) else texts

    def iter_restored(
        self, contexts: CompressedContext | Sequence[CompressedContext], **options: Any
    ) -> Iterator[tuple[bytes, bool]]:
        """As [`restore`], segment after segment, see [`iter_restored`]."""
        return iter_restored(_several(contexts), self.restorer, **options)

    def round_trip(self, texts: Sequence[str], **options: Any) -> list[str]:
        """Compress each text, in as few segments as the model has positions for, and restore them.

        Args:
            texts: The texts.
            options: Those of [`restore`].

        Returns:
            What came back, in the order of `texts`, not stripped.

        Raises:
            TypeError: If `texts` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of strings, got a single str. Wrap it in a list.")
        room = self.segment_room
        contexts = [self.compress(text, segment_length=room) for text in texts]
        return [restored.text for restored in self.restore(contexts, **options)]

    def verify(self, context: CompressedContext, source: Source, **options: Any) -> CompressedContext:
        """Measure what a compressed context brings back of its text, see [`verify_context`]."""
        return verify_context(context, source, self.restorer, **options)

    def ask(
        self, contexts: CompressedContext | Sequence[CompressedContext], question: str = "", **options: Any
    ) -> Answer:
        """Ask compressed contexts what the model was trained for, see [`ask`]."""
        return ask(_several(contexts), self.restorer, question, **options)

    @torch.no_grad()
    def __call__(
        self,
        messages: str | Conversation | Sequence[Conversation],
        *,
        streamer: BaseStreamer | None = None,
        chat_template: str | None = None,
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """Chat.

        Args:
            messages: A conversation, several of them, or the text of one user message. Contents may hold parts
                `{"type": "context", "text": str}` and `{"type": "context", "context": CompressedContext}`.
            streamer: Is given a single reply as it comes.
            chat_template: Instead of the default one, see [`C3Processor.apply_chat_template`].
            generate_kwargs: What `generate` takes.

        Returns:
            The reply, or those of several conversations.

        Raises:
            ValueError: If a message cannot be rendered, see [`C3Processor.apply_chat_template`].
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        conversations, single = as_chats(messages)
        # One batch takes its contexts as texts or as latents; texts get their own strides only as latents.
        stored = self.model.config.latent_stride is not None or any(
            isinstance(part, dict) and part.get("context") is not None
            for conversation in conversations
            for message in conversation
            if not isinstance(message.get("content"), str)
            for part in message.get("content") or []
        )
        rendered, strides = conversations, []
        if stored:
            rendered = []
            for conversation in conversations:
                found: list[CompressedContext] = []
                rendered.append([self._with_latents(message, found) for message in conversation])
                strides.append([stride for context in found for stride in self._strides(context)])
        begun = [conversation[-1]["role"] == "assistant" for conversation in rendered if conversation]
        if any(begun) and not all(begun):
            raise ValueError("`messages`: either every conversation ends with a begun reply or none does.")
        inputs = self.processor.apply_chat_template(
            rendered, chat_template=chat_template, continue_final_message=any(begun)
        ).to(self.device)
        if any(strides):
            # Slots behind a conversation's own contexts are not used.
            rows = [torch.tensor(row, dtype=torch.long) for row in strides]
            inputs["context_strides"] = pad_rows(rows, left=False, value=1)[0].to(self.device)
        output = self.model.generate(**inputs, streamer=streamer, **generate_kwargs)
        replies = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        return replies[0] if single and len(replies) == 1 else replies

    def _with_latents(self, message: dict[str, Any], found: list[CompressedContext]) -> dict[str, Any]:
        """The message with latents in the place of its contexts, which are added to `found`."""
        if isinstance(message.get("content"), str):
            return message
        content: list[Any] = []
        for part in message.get("content") or []:
            context = part.get("context") if isinstance(part, dict) else None
            if context is None and isinstance(part, dict) and part.get("type") == "context" and "text" in part:
                context = self.compress(part["text"], latent_dtype=torch.float32)
            found += [] if context is None else _several([context])
            if context is None:
                content.append(part)
            elif len(context):
                self.restorer.fingerprints.check(context)
                content.append({"type": "context", "latents": context.project(self.model)})
        return {**message, "content": content}

    def _strides(self, context: CompressedContext) -> list[int]:
        strides = context.context_strides(self.model)
        return [] if strides is None else strides[0].tolist()


def _several(contexts: CompressedContext | Sequence[CompressedContext]) -> list[CompressedContext]:
    """One context or several, as a list.

    Raises:
        TypeError: If one of them is none.
    """
    several: list[Any] = list(contexts) if isinstance(contexts, (list, tuple)) else [contexts]
    for context in several:
        if not isinstance(context, CompressedContext):
            raise TypeError(
                f"`contexts` must be compressed contexts, got {context!r:.60}. Open a file with "
                "CompressedContext.load, make one of a text with C3Pipeline.compress."
            )
    return several


def compress(source: Source, model: PreTrainedModel, processor: ProcessorMixin, **options: Any) -> CompressedContext:
    """[`C3Pipeline.compress`] with a model in hand."""
    return C3Pipeline(model, processor).compress(source, **options)


def restore(
    context: CompressedContext, model: PreTrainedModel, processor: ProcessorMixin, **options: Any
) -> RestoredText:
    """[`C3Pipeline.restore`] with a model in hand."""
    return C3Pipeline(model, processor).restore(context, **options)


def verify(
    context: CompressedContext, source: Source, model: PreTrainedModel, processor: ProcessorMixin, **options: Any
) -> CompressedContext:
    """[`C3Pipeline.verify`] with a model in hand."""
    return C3Pipeline(model, processor).verify(context, source, **options)


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
