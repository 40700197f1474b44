"""What every request passes: its id, the API key, the size of its body, the clock, one log line, the counters."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, MutableMapping, Sequence
from typing import Any, TypeVar, cast

import anyio
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from transformers.utils import logging

from .chat import Usage
from .engine import describe_error
from .protocol import ApiError, Limits


logger = logging.get_logger(__name__)

T = TypeVar("T")
Message = MutableMapping[str, Any]

# What needs no key: whoever looks after the process asks it.
_OPEN_PATHS = frozenset(("/health",))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Nobody reads this answer; the status is for the log and the counters.
CLIENT_LEFT = 499


class Metrics:
    """The counters of `/metrics`, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("c3_requests", "Requests", ["route", "status"], registry=registry)
        self.seconds = Histogram("c3_request_seconds", "Time of a request", ["route"], registry=registry)
        self.first_token = Histogram("c3_first_token_seconds", "Time to the first piece of a reply", registry=registry)
        self.batch = Histogram(
            "c3_batch_rows", "Replies made together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.prompt_tokens = Counter("c3_prompt_tokens", "Tokens of prompts the decoder read", registry=registry)
        self.reply_tokens = Counter("c3_reply_tokens", "Tokens of replies", registry=registry)
        self.saved_tokens = Counter("c3_context_tokens_saved", "Text tokens that latents stood for", registry=registry)
        self.places = Gauge("c3_places_used", "Requests that wait or run", ["kind"], registry=registry)
        self.store_bytes = Gauge("c3_store_bytes", "Bytes of the store", registry=registry)

    def count(self, usage: Usage) -> None:
        """Add what a request took."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.reply_tokens.inc(usage.completion_tokens)
        self.saved_tokens.inc(max(0, usage.context_tokens - usage.context_latents))


class Gate:
    """An ASGI application in front of the routes.

    Args:
        app: The routes.
        limits: What a client may ask for.
        metrics: Where requests are counted.
        api_keys: One of them must come as `Authorization: Bearer …`; without any the server is open.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, api_keys: Sequence[str] = ()):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started, status, read, is_read = time.monotonic(), 0, 0, False

        async def counted_receive() -> Message:
            nonlocal read, is_read
            if is_read:
                return await receive()
            try:
                left = started + self._limits.seconds - time.monotonic()
                message = await asyncio.wait_for(receive(), max(0.01, left))
            except asyncio.TimeoutError as error:
                raise ApiError(408, "the body did not come in time.", "timeout") from error
            is_read = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._limits.max_body:
                raise self._too_large()
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        failure, is_fault = "", False
        try:
            self._check(scope["path"], headers)
            await self._app(scope, counted_receive, marked_send)
        except ApiError as error:
            await error_response(error)(scope, receive, marked_send)
        except BaseException as error:
            failure = f", {describe_error(error)}"
            # The server takes a request down only when it is stopped before the request has ended.
            is_fault = not isinstance(error, asyncio.CancelledError)
            if not status:
                fault = ApiError(500, "the server failed on this request.", "server_error")
                stopped = ApiError(503, "the server is shutting down.", "shutting_down", retry=True)
                await error_response(fault if is_fault else stopped)(scope, receive, marked_send)
            if not isinstance(error, Exception):
                raise
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            line = f"{request_id} {scope['method']} {route} {status} {seconds:.3f} s{failure}"
            logger.log(logging.ERROR if is_fault else logging.INFO, line)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._keys and path not in _OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, so that the time says nothing.
            matches = [hmac.compare_digest(key.strip(), own) for own in self._keys]
            if scheme.lower() != b"bearer" or not any(matches):
                raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY.", "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body may have {self._limits.max_body:,} bytes.", "body_too_large")


class Connection:
    """Whether the client of a request, whose body has been read, is still there."""

    def __init__(self, receive: Any):
        self._receive = receive
        self._gone = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue

    async def while_there(self, awaitable: Awaitable[T]) -> T:
        """The result of `awaitable`, which is cancelled when the client leaves.

        Raises:
            ApiError: 499 if it has left.
        """
        work = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait({work, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
        finally:
            if not work.done():
                work.cancel()
                # Starlette cancels by anyio, which cancels each further wait too, unless it is shielded.
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({work})
        raise ApiError(CLIENT_LEFT, "the client has left.", "client_left")

    def close(self) -> None:
        """Stop looking."""
        self._gone.cancel()


class ClosingStream(StreamingResponse):
    """A stream whose source is closed at its end, also where the client has left in the middle."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await cast("AsyncGenerator[Any, None]", self.body_iterator).aclose()


def error_response(error: ApiError) -> JSONResponse:
    """The answer that tells a client of an error."""
    return JSONResponse(error.body(), error.status, error.headers())


def tell_errors_in_openai_form(app: FastAPI) -> None:
    """What routes raise, and what the framework itself refuses, in one form."""

    @app.exception_handler(ApiError)
    async def _(_request: Any, error: ApiError) -> JSONResponse:
        return error_response(error)

    # Starlette's own class, from which FastAPI's is derived, is what its router raises.
    @app.exception_handler(HTTPException)
    async def _(_request: Any, error: HTTPException) -> JSONResponse:
        return error_response(ApiError(error.status_code, str(error.detail), "http_error"))
