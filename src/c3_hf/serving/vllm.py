"""The engine `vllm`: servers of the exported decoder somewhere else, to which only latents and text travel.

Each server was started on what `c3-hf export --layout decoder` wrote, with `--enable-prompt-embeds`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import httpx
import torch
from transformers.utils import logging

from ..pipeline import C3Pipeline
from .engine import ModelThread
from .protocol import ApiError, Limits
from .replies import Piece, Places, Prompt, Run, Settings


logger = logging.get_logger(__name__)

# Seconds for which a server that did not answer is left out.
LEFT_OUT = 10.0
_CONNECT_SECONDS = 5.0
_CHECK_TEXTS = (
    "The night train left the harbour a little after nine.",
    "Seven grey horses stood under the old oak and waited for the rain.",
)


class VllmEngine:
    """Replies by vLLM servers, used in turn; one that cannot be reached is left out for a while.

    A context travels as embeddings with those of its markers around it, since the exported chat template keeps user
    text plain. User text that holds a special string travels as embeddings of its plain tokens, for decoders whose
    tokenizer would take the string for the token. A salt made of the embeddings keeps a server's prefix cache from
    mixing up prompts whose contexts differ.

    Args:
        pipe: The model the decoder was exported from: its projector and embeddings are used here.
        thread: Where it computes.
        urls: Of the servers, such as "http://127.0.0.1:8001"; at least one.
        limits: How many replies at a time, and for how long.
        api_key: What the servers ask for.
        transport: Instead of the network, for tests.

    Raises:
        ValueError: If there is no URL, one is none, or the model's latents have a stride, which vLLM's positions
            cannot follow.
    """

    name = "vllm"

    def __init__(
        self,
        pipe: C3Pipeline,
        thread: ModelThread,
        urls: Sequence[str],
        limits: Limits,
        *,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        if not urls:
            raise ValueError("`urls` is empty: name at least one server that runs vLLM (--engine-url).")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"`urls`: {url!r} is no URL; expected one such as http://127.0.0.1:8001.")
        if pipe.model.config.latent_stride is not None:
            raise ValueError(
                "`pipe`: the latents of this model have a stride, so that its positions jump, and vLLM's do not. Use "
                "the engine transformers."
            )
        self._pipe, self._thread, self._urls = pipe, thread, [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.places = Places(limits.max_waiting, "places for replies")
        self._limits = limits
        self._dead_until = dict.fromkeys(self._urls, 0.0)
        self._turn = 0
        self._is_checked = False
        self._models: dict[str, str] = {}
        tokenizer = pipe.processor.tokenizer
        self._special = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
        self._client = httpx.AsyncClient(
            transport=transport,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(limits.seconds, connect=_CONNECT_SECONDS),
        )

    async def start(self) -> None:
        """Ask each server two different contexts, once.

        Raises:
            ValueError: If one cannot be reached, takes no embeddings, reads another prompt than this model has, or
                does not tell the contexts apart.
        """
        if self._is_checked:
            return
        for url in self._urls:
            texts = [await self._ask_check(url, text) for text in _CHECK_TEXTS]
            if texts[0] == texts[1]:
                raise ValueError(
                    f"`urls`: {url} gives the same reply to two different contexts, so it does not read them, or its "
                    "prefix cache mixes prompts up whose embeddings differ. Start vLLM on this model's exported "
                    "decoder, with --enable-prompt-embeds and --no-enable-prefix-caching."
                )
        self._is_checked = True

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def reply(self, prompt: Prompt, settings: Settings) -> AsyncGenerator[Piece, None]:
        """See [`Engine`].

        Raises:
            ApiError: 429 without a free place, 503 if no server can be reached, 502 if one fails on the way.
        """
        with self.places.taken(settings.num_replies):
            path, body = await self._request(prompt, settings)
            busy = ApiError(503, "no engine can be reached; try again in a while.", "no_engine", retry=True)
            for url in self._in_turn():
                begun = False
                try:
                    async with aclosing(
                        self._stream(url, path, body, copies=settings.num_replies // body["n"])
                    ) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                    return
                except httpx.TransportError as error:
                    self._leave_out(url, error)
                    if begun:
                        raise ApiError(
                            502, "the engine broke off in the middle of a reply.", "engine_error"
                        ) from error
                except ApiError as error:
                    if begun or not error.retry:
                        raise
                    busy = error
            raise busy

    def _in_turn(self) -> list[str]:
        """The servers in the order to try them, without those that were dead a moment ago, unless all were."""
        self._turn += 1
        order = [self._urls[(self._turn + step) % len(self._urls)] for step in range(len(self._urls))]
        now = time.monotonic()
        return [url for url in order if self._dead_until[url] <= now] or order

    def _leave_out(self, url: str, error: Exception) -> None:
        self._dead_until[url] = time.monotonic() + LEFT_OUT
        self._models.pop(url, None)
        logger.warning(f"the engine {url} is left out for {LEFT_OUT:.0f} s: {type(error).__name__}")

    async def _model_of(self, url: str) -> str:
        if url not in self._models:
            answer = await self._client.get(f"{url}/v1/models", timeout=_CONNECT_SECONDS)
            if answer.status_code != 200:
                raise ApiError(
                    502, f"the engine does not list its models (status {answer.status_code}).", "engine_error"
                )
            self._models[url] = answer.json()["data"][0]["id"]
        return self._models[url]

    async def _ask_check(self, url: str, text: str) -> str:
        pipe, processor = self._pipe, self._pipe.processor
        latents = await self._thread.run(
            lambda: pipe.compress(text, latent_dtype=torch.float32).project(pipe.model).cpu()
        )
        ids = processor.apply_chat_template(processor.restore_messages(latents))["input_ids"][0].tolist()
        prompt = Prompt(ids, latents, messages=[("user", (latents, processor.prompts["restore"]))])
        path, body = await self._request(prompt, Settings(max_tokens=16))
        usage: dict[str, int] = {}
        try:
            reply = "".join([piece.text async for piece in self._stream(url, path, body, usage)])
        except (httpx.HTTPError, ApiError) as error:
            raise ValueError(
                f"`urls`: {url} does not answer as vLLM with prompt embeddings does ({str(error)[:300]}). Start it on "
                "the exported decoder with --enable-prompt-embeds, then start this server."
            ) from error
        if usage.get("prompt_tokens") != len(ids):
            raise ValueError(
                f"`urls`: {url} reads {usage.get('prompt_tokens')} tokens in a prompt that has {len(ids)} here, so "
                "its chat template or tokenizer is not this model's. Start vLLM on this model's exported decoder."
            )
        return reply

    async def _request(self, prompt: Prompt, settings: Settings) -> tuple[str, dict[str, Any]]:
        """Path and body of the request to a server."""
        body: dict[str, Any] = {
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            # vLLM refuses several replies without chance: they are one, given several times.
            "n": settings.num_replies if settings.temperature > 0 else 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.seed is not None:
            body["seed"] = settings.seed
        if settings.stop:
            body["stop"] = list(settings.stop)
        if prompt.messages is None:
            return "/v1/completions", {**body, "prompt": list(prompt.ids)}
        messages = []
        salt = hashlib.sha256()
        for role, runs in prompt.messages:
            content = await self._thread.run(lambda runs=runs: self._content(runs))  # type: ignore[misc]
            for part in content:
                salt.update(part.get("data", "").encode())
            messages.append({"role": role, "content": content})
        body |= {"messages": messages, "cache_salt": salt.hexdigest()}
        if prompt.begun:
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return "/v1/chat/completions", body

    @torch.no_grad()
    def _content(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Parts of a message: text that the engine reads as it is, and embeddings."""
        parts: list[dict[str, Any]] = []
        markup = ""
        for run in runs:
            if isinstance(run, torch.Tensor):
                parts += [_text(markup)] * bool(markup)
                parts += [context_part(self._pipe, block) for block in run]
                # As the chat template of C3 ends a context.
                markup = "\n"
            elif not any(special in run for special in self._special):
                markup += run
            else:
                # With the line break that stands in front, since both may be one token.
                end = "\n" if markup.endswith("\n") else ""
                parts += [_text(markup.removesuffix("\n"))] * bool(markup.removesuffix("\n"))
                parts.append(_embeds(self._embed(end + run)))
                markup = ""
        return parts + [_text(markup)] * bool(markup)

    def _embed(self, text: str) -> torch.Tensor:
        """Embeddings of plain text, `(num_tokens, text_hidden_size)`."""
        ids = self._pipe.processor.reader.read_plain([text])[0][0]
        return self._pipe.model.get_input_embeddings()(torch.tensor(ids, device=self._pipe.device))

    async def _stream(
        self, url: str, path: str, body: dict[str, Any], usage: dict[str, int] | None = None, copies: int = 1
    ) -> AsyncGenerator[Piece, None]:
        """The pieces that a server gives, so many times; the tokens that it counts are put into `usage`."""
        body = {**body, "model": await self._model_of(url)}
        finished: dict[int, str] = {}
        usage = {} if usage is None else usage
        async with self._client.stream("POST", url + path, json=body) as answer:
            if answer.status_code != 200:
                raise _refusal(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ApiError(502, "the engine failed in the middle of a reply.", "engine_error")
                usage.update(chunk.get("usage") or {})
                for choice in chunk.get("choices", ()):
                    text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                    if choice.get("finish_reason"):
                        finished[choice["index"]] = choice["finish_reason"]
                    for copy in range(copies if text else 0):
                        yield Piece(choice["index"] + copy, text)
        if len(finished) < body["n"]:
            raise ApiError(502, "the engine broke off in the middle of a reply.", "engine_error")
        # The server counts the tokens of all replies together.
        tokens = copies * usage.get("completion_tokens", 0)
        ends = [(index + copy, reason) for index, reason in sorted(finished.items()) for copy in range(copies)]
        for place, (index, reason) in enumerate(ends):
            yield Piece(index, "", reason, tokens if place == 0 else 0)


@torch.no_grad()
def context_part(pipe: C3Pipeline, block: torch.Tensor) -> dict[str, Any]:
    """A segment of a context as a part of a message to a vLLM server.

    Args:
        pipe: The model the decoder was exported from.
        block: Projected latents of one segment, `(num_latents, text_hidden_size)`: `context.project(pipe.model)[0]`.

    Returns:
        `{"type": "prompt_embeds", "data": …}` with the embeddings of the markers in front and behind.
    """
    config = pipe.model.config
    markers = torch.tensor([config.context_start_token_id, config.context_end_token_id], device=block.device)
    start, end = pipe.model.get_input_embeddings()(markers).to(block.dtype)
    return _embeds(torch.cat([start[None], block, end[None]]))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _embeds(rows: torch.Tensor) -> dict[str, Any]:
    """Embeddings `(num_positions, text_hidden_size)` as a part of a message."""
    file = io.BytesIO()
    # A view would bring its whole storage along.
    torch.save(rows.detach().cpu().contiguous().clone(), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


def _refusal(status: int, content: bytes) -> ApiError:
    """A server's refusal: the request's fault is told the client, anything else is the engine's."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "no reason was given"
    if status == 400:
        return ApiError(400, f"the engine refuses the request: {str(message)[:500]}", "engine_refused")
    if status in (429, 503):
        return ApiError(status, "the engine is busy; try again in a while.", "busy", retry=True)
    return ApiError(502, f"the engine failed with status {status}.", "engine_error")
