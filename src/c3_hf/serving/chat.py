"""Chats and completions: from OpenAI's requests to prompts, and from pieces of replies to OpenAI's answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError

from ..latents.decoding import decoder_positions
from ..pipeline import C3Pipeline
from .contexts import Contexts, Latents, check_texts
from .protocol import ApiError, ChatForm, CompletionForm, ContextPart, GenerationForm, Limits
from .replies import Piece, Prompt, Run, Settings, positions_taken


# Tokens of a reply where neither the request nor the checkpoint says how many.
_DEFAULT_TOKENS = 512


@dataclass
class Usage:
    """What a request took: tokens the decoder read and wrote, and the text tokens that latents stood for."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    context_tokens: int = 0
    context_latents: int = 0

    def body(self) -> dict[str, int]:
        """As OpenAI's `usage`, with `context_tokens` and `context_tokens_saved` beside it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "context_tokens": self.context_tokens,
            "context_tokens_saved": self.context_tokens - self.context_latents,
        }


@dataclass
class Asked:
    """What to reply to, and how."""

    prompts: list[Prompt]
    settings: list[Settings]
    usage: Usage = field(default_factory=Usage)


class PromptReader:
    """Reads requests with the processor of the model.

    Args:
        pipe: The model.
        contexts: Where contexts of requests come from.
        limits: What a client may ask for.
    """

    def __init__(self, pipe: C3Pipeline, contexts: Contexts, limits: Limits):
        self._pipe, self._contexts, self._limits = pipe, contexts, limits

    async def read_chat(self, form: ChatForm) -> Asked:
        """The prompt of a chat.

        Raises:
            ApiError: 400, 404, 409 or 413, saying what is wrong.
        """
        self._check_form(form, num_prompts=1)
        messages = _with_documents(form)
        parts = [part for _, content in messages for part in content]
        contexts = [part for part in parts if isinstance(part, ContextPart)]
        if len(contexts) > self._limits.max_contexts:
            raise ApiError(
                400,
                f"a request may have {self._limits.max_contexts} contexts, got {len(contexts)}.",
                "too_many_contexts",
            )
        check_texts([str(part if isinstance(part, str) else part.text or "") for part in parts], self._limits)
        usage = Usage()
        read: list[tuple[str, list[Run]]] = []
        strides: list[int] = []
        for role, content in messages:
            runs: list[Run] = []
            for part in content:
                if isinstance(part, ContextPart):
                    latents: Latents = await self._contexts.latents_of(part)
                    usage.context_tokens += latents.tokens
                    usage.context_latents += latents.blocks.shape[0] * latents.blocks.shape[1]
                    strides += latents.strides
                    if len(latents.blocks):
                        runs.append(latents.blocks)
                elif runs and isinstance(runs[-1], str):
                    runs[-1] += part
                else:
                    runs.append(part)
            read.append((role, runs))
        blocks = [run for _, runs in read for run in runs if isinstance(run, torch.Tensor)]
        begun = read[-1][0] == "assistant"
        ids = await asyncio.to_thread(self._render, read, begun)
        prompt = Prompt(ids, torch.cat(blocks) if blocks else None, strides, read, begun)
        usage.prompt_tokens = len(ids)
        most = form.max_completion_tokens or form.max_tokens
        return Asked([prompt], [self._settings(form, most, prompt)], usage)

    async def read_completion(self, form: CompletionForm) -> Asked:
        """The prompts of a completion.

        Raises:
            ApiError: As `read_chat`.
        """
        texts = [form.prompt] if isinstance(form.prompt, str) else form.prompt
        self._check_form(form, len(texts))
        check_texts(texts, self._limits)
        if not texts or not all(texts):
            raise ApiError(400, "`prompt` is empty: give at least a word to go on from.", "empty_prompt", "prompt")
        read = await asyncio.to_thread(self._pipe.processor.reader.read_plain, texts)
        prompts = [Prompt(ids) for ids, _ in read]
        settings = [self._settings(form, form.max_tokens or 16, prompt) for prompt in prompts]
        return Asked(prompts, settings, Usage(prompt_tokens=sum(len(prompt.ids) for prompt in prompts)))

    def _check_form(self, form: GenerationForm, num_prompts: int) -> None:
        if form.model not in (None, self._pipe.name):
            raise ApiError(
                404, f"there is no model {form.model!r} here; it is {self._pipe.name!r}.", "model_not_found", "model"
            )
        most = self._limits.max_choices
        if num_prompts * (form.n or 1) > most:
            raise ApiError(400, f"a request may ask for {most} replies (`n` times prompts).", "too_many", "n")

    def _render(self, messages: Sequence[tuple[str, Sequence[Run]]], begun: bool) -> list[int]:
        chat = []
        for role, runs in messages:
            content: list[dict[str, Any]] = [
                {"type": "text", "text": run} if isinstance(run, str) else {"type": "context", "num_blocks": len(run)}
                for run in runs
            ]
            chat.append({"role": role, "content": content or ""})
        try:
            inputs = self._pipe.processor.apply_chat_template(chat, continue_final_message=begun)
            return inputs["input_ids"][0].tolist()
        except (ValueError, TemplateError) as error:
            raise ApiError(
                400, f"these messages cannot be rendered: {error}", "invalid_messages", "messages"
            ) from error

    def _settings(self, form: GenerationForm, max_tokens: int | None, prompt: Prompt) -> Settings:
        own = self._pipe.model.generation_config
        positions, taken = decoder_positions(self._pipe.model), positions_taken(prompt, self._pipe)
        room = positions - taken
        if room < 1 or (max_tokens or 1) > room:
            raise ApiError(
                400,
                f"the prompt takes {taken:,} positions and the reply may take {max_tokens or 1:,}, the model has "
                f"{positions:,}. Shorten one of them.",
                "context_length_exceeded",
                "messages" if isinstance(form, ChatForm) else "prompt",
            )
        sampled = bool(own.do_sample)
        temperature = (own.temperature or 1.0) if sampled else 0.0
        top_p = (own.top_p or 1.0) if sampled and form.temperature is None else 1.0
        return Settings(
            max_tokens or min(own.max_new_tokens or _DEFAULT_TOKENS, room),
            temperature if form.temperature is None else form.temperature,
            top_p if form.top_p is None else form.top_p,
            form.seed,
            form.stops,
            form.n or 1,
        )


def _with_documents(form: ChatForm) -> list[tuple[str, list[str | ContextPart]]]:
    """Role and parts of each message; documents stand in front of the first user message, as in the chat template."""
    messages: list[tuple[str, list[str | ContextPart]]] = []
    for message in form.messages:
        content = [message.content] if isinstance(message.content, str) else message.content
        parts = [part if isinstance(part, (str, ContextPart)) else part.text for part in content]
        messages.append(("system" if message.role == "developer" else message.role, parts))
    if form.documents:
        first = next((content for role, content in messages if role == "user"), None)
        if first is None:
            raise ApiError(
                400, "`documents` stand in the first user message, and there is none.", "no_place", "documents"
            )
        front: list[str | ContextPart] = []
        for document in form.documents:
            front += [f"{document.title}\n"] * bool(document.title)
            front.append(document)
        first[:0] = front
    return messages


class Answer:
    """One answer in OpenAI's form, whole or as chunks.

    Args:
        model: The model's name.
        is_chat: Whether it answers a chat; else a completion.
        usage: What the request takes; the tokens of the replies are added as they come.
    """

    def __init__(self, model: str, is_chat: bool, usage: Usage):
        self._is_chat, self._usage = is_chat, usage
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        """The body when all replies are there."""
        texts: dict[int, list[str]] = {}
        reasons: dict[int, str] = {}
        async for piece in pieces:
            texts.setdefault(piece.index, []).append(piece.text)
            if piece.finish is not None:
                reasons[piece.index] = piece.finish
                self._usage.completion_tokens += piece.tokens
        choices: list[dict[str, Any]] = []
        for index in sorted(texts):
            text = "".join(texts[index])
            said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reasons[index]})
        return {**self._head(chunk=False), "choices": choices, "usage": self._usage.body()}

    async def chunks(
        self, pieces: AsyncGenerator[Piece, None], include_usage: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The bodies of the events of a stream."""
        seen: set[int] = set()
        async for piece in pieces:
            if self._is_chat and piece.index not in seen:
                seen.add(piece.index)
                yield self._chunk(piece.index, {"role": "assistant", "content": ""}, None)
            if piece.text:
                yield self._chunk(piece.index, {"content": piece.text}, None)
            if piece.finish is not None:
                self._usage.completion_tokens += piece.tokens
                yield self._chunk(piece.index, {}, piece.finish)
        if include_usage:
            yield {**self._head(chunk=True), "choices": [], "usage": self._usage.body()}

    def _head(self, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._is_chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head(chunk=True), "choices": [choice]}
