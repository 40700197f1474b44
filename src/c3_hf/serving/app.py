"""The routes: contexts, OpenAI's chat and completions, health and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile
from transformers.utils import logging

from .. import __version__
from ..latents.decoding import decoder_positions
from ..pipeline import C3Pipeline
from .chat import Answer, Asked, PromptReader, Usage
from .contexts import Contexts
from .engine import ModelThread
from .gate import ClosingStream, Connection, Gate, Metrics, tell_errors_in_openai_form
from .protocol import (
    ApiError,
    ChatForm,
    CompletionForm,
    CompressionForm,
    ContextForm,
    GenerationForm,
    Limits,
    event,
    read_form,
    read_segments,
    segment_line,
)
from .replies import Engine, Piece
from .store import SUFFIX, ContextStore


logger = logging.get_logger(__name__)


class Server:
    """A model, its store and an engine behind HTTP.

    Args:
        pipe: The model.
        thread: Where it computes.
        store: Where contexts are kept.
        engine: What makes replies.
        limits: What a client may ask for.
        metrics: Where requests are counted.
    """

    def __init__(
        self,
        pipe: C3Pipeline,
        thread: ModelThread,
        store: ContextStore,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
    ):
        self._pipe, self._thread, self._engine, self._metrics = pipe, thread, engine, metrics
        self._contexts = Contexts(pipe, thread, store, limits)
        self._prompts = PromptReader(pipe, self._contexts, limits)
        self._ready = False
        metrics.places.labels("reply").set_function(lambda: engine.places.used)
        metrics.places.labels("context").set_function(lambda: self._contexts.places.used)
        metrics.store_bytes.set_function(store.nbytes)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """From the engine's start to its end."""
        await self._engine.start()
        self._ready = True
        yield
        self._ready = False
        self._contexts.close()
        await self._engine.close()
        await asyncio.to_thread(self._thread.close)

    def add_routes(self, app: FastAPI) -> None:
        """Put every route on an application."""
        for method, path, handler in (
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{name}", self.get_model),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.complete),
            ("POST", "/v1/contexts", self.post_context),
            ("GET", "/v1/contexts", self.list_contexts),
            ("GET", "/v1/contexts/{context_id}", self.get_context),
            ("DELETE", "/v1/contexts/{context_id}", self.delete_context),
            ("GET", "/v1/contexts/{context_id}/text", self.get_text),
        ):
            app.add_api_route(path, handler, methods=[method], response_model=None)

    async def health(self) -> Response:
        """200 while it can serve."""
        status = "ready" if self._ready else "starting"
        return JSONResponse({"status": status, "engine": self._engine.name}, 200 if self._ready else 503)

    async def metrics(self) -> Response:
        """The counters, as Prometheus reads them."""
        return Response(
            await asyncio.to_thread(generate_latest, self._metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    async def list_models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [self._describe_model()]}

    async def get_model(self, name: str) -> dict[str, Any]:
        """The model, by its name."""
        if name != self._pipe.name:
            raise ApiError(404, f"there is no such model here; it is {self._pipe.name!r}.", "model_not_found", "model")
        return self._describe_model()

    def _describe_model(self) -> dict[str, Any]:
        config = self._pipe.model.config
        return {
            "id": self._pipe.name,
            "object": "model",
            "created": 0,
            "owned_by": "c3_hf",
            "num_latents": config.num_latents,
            "positions": decoder_positions(self._pipe.model),
            "prompts": self._pipe.processor.prompts,
        }

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        form = read_form(ChatForm, await request.body())
        return await self._answer(request, form, self._prompts.read_chat(form))

    async def complete(self, request: Request) -> Response:
        """OpenAI's completions."""
        form = read_form(CompletionForm, await request.body())
        return await self._answer(request, form, self._prompts.read_completion(form))

    async def _answer(self, request: Request, form: GenerationForm, reading: Any) -> Response:
        connection = Connection(request.receive)
        try:
            asked: Asked = await connection.while_there(reading)
            answer = Answer(self._pipe.name, isinstance(form, ChatForm), asked.usage)
            pieces = self._pieces(asked)
            if not form.stream:
                async with aclosing(pieces):
                    body = await connection.while_there(answer.whole(pieces))
                connection.close()
                self._metrics.count(asked.usage)
                return JSONResponse(body)
            include_usage = form.stream_options is not None and form.stream_options.include_usage
            chunks = answer.chunks(pieces, include_usage)
            # What is refused is refused with its status, before the stream begins.
            with self._metrics.first_token.time():
                first = await connection.while_there(_next(chunks))
        except BaseException:
            connection.close()
            raise
        return ClosingStream(
            self._events(connection, first, chunks, pieces, asked.usage), media_type="text/event-stream"
        )

    async def _events(
        self,
        connection: Connection,
        chunk: dict[str, Any] | None,
        chunks: AsyncGenerator[dict[str, Any], None],
        pieces: AsyncGenerator[Piece, None],
        usage: Usage,
    ) -> AsyncGenerator[bytes, None]:
        """The stream of a reply; the reply is given up when the client has left."""
        try:
            while chunk is not None:
                yield event(chunk)
                chunk = await connection.while_there(_next(chunks))
            yield event("[DONE]")
        except ApiError as error:
            yield event(error.body())
        finally:
            connection.close()
            self._metrics.count(usage)
            with anyio.CancelScope(shield=True):
                for part in (chunks, pieces):
                    await part.aclose()

    async def _pieces(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """The replies to all prompts of a request, one prompt after the other."""
        first = 0
        for prompt, settings in zip(asked.prompts, asked.settings):
            async with aclosing(self._engine.reply(prompt, settings)) as pieces:
                async for piece in pieces:
                    yield Piece(first + piece.index, piece.text, piece.finish, piece.tokens)
            first += settings.num_replies

    async def post_context(self, request: Request) -> Response:
        """Compress a text and keep it, or take in a `.c3` file."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            return await self._post_upload(request)
        form = read_form(ContextForm, await request.body())
        try:
            data = form.text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, "`text` holds a lone surrogate, which is no character.", "invalid_text") from error
        return await self._compress(request, data, form, form.background)

    async def _post_upload(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=16) as fields:
            file = fields.get("file")
            options = {name: _value(value) for name, value in fields.items() if isinstance(value, str)}
            if not isinstance(file, UploadFile):
                raise ApiError(400, "`file` is missing: a text, or a file whose name ends in .c3.", "no_file", "file")
            if (file.filename or "").endswith(SUFFIX):
                return JSONResponse(await self._contexts.add(file.file), 201)
            background = options.pop("background", False) is True
            return await self._compress(request, await file.read(), read_form(CompressionForm, options), background)

    async def _compress(self, request: Request, data: bytes, form: CompressionForm, background: bool) -> Response:
        with closing(Connection(request.receive)) as connection:
            status, body = await connection.while_there(self._contexts.compress(data, form, background))
        return JSONResponse(body, status)

    async def list_contexts(self) -> dict[str, Any]:
        """The ids of all contexts, the most recently used first."""
        ids = await asyncio.to_thread(self._contexts.store.ids)
        return {"object": "list", "data": [{"id": name, "object": "context"} for name in ids]}

    async def get_context(self, context_id: str) -> dict[str, Any]:
        """What is known about a context, or how far its compression is."""
        return await self._contexts.describe(context_id)

    async def delete_context(self, context_id: str) -> dict[str, Any]:
        """Remove a context."""
        await asyncio.to_thread(self._contexts.store.delete, context_id)
        return {"id": context_id, "object": "context", "deleted": True}

    async def get_text(self, context_id: str, segments: str | None = None, format: str = "text") -> Response:
        """The text of a context, or of some segments of it, streamed: as it is, or a line of JSON for each segment."""
        if format not in ("text", "jsonl"):
            raise ApiError(400, "`format` must be text or jsonl.", "invalid_format", "format")
        context = await self._contexts.open(context_id)
        chosen = read_segments(segments, len(context))
        pieces = self._contexts.restored(context_id, context[chosen.start : chosen.stop])
        first: list[tuple[bytes, bool]] = await anext(pieces, [])

        async def written() -> AsyncGenerator[bytes, None]:
            some, numbers = first, iter(chosen)
            async with aclosing(pieces):
                while some:
                    if format == "text":
                        yield b"".join(data for data, _ in some)
                    else:
                        yield b"".join(segment_line(next(numbers), *piece) for piece in some)
                    some = await anext(pieces, [])

        kind = "text/plain; charset=utf-8" if format == "text" else "application/jsonl"
        return ClosingStream(written(), media_type=kind)


def create_app(
    pipe: C3Pipeline,
    thread: ModelThread,
    store: ContextStore,
    engine: Engine,
    limits: Limits,
    *,
    metrics: Metrics | None = None,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """The application, for an ASGI server; one process serves one model.

    Args:
        pipe, thread, store, engine, limits, metrics: See [`Server`].
        api_keys: See [`Gate`].
    """
    metrics = Metrics() if metrics is None else metrics
    server = Server(pipe, thread, store, engine, limits, metrics)
    app = FastAPI(title="c3_hf", version=__version__, lifespan=server.lifespan, docs_url=None, redoc_url=None)
    server.add_routes(app)
    tell_errors_in_openai_form(app)
    app.add_middleware(Gate, limits=limits, metrics=metrics, api_keys=api_keys)
    return app


async def _next(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    return await anext(chunks, None)


def _value(text: str) -> Any:
    """A form field as JSON would have it."""
    try:
        return json.loads(text)
    except ValueError:
        return text
