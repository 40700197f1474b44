"""What travels between client and server: requests and their limits, replies, and errors in OpenAI's form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


# Fields of OpenAI's requests that change nothing here.
_WITHOUT_EFFECT = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
# Fields that would change the reply, at the values that leave it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "best_of": (1,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
}
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        max_body: Bytes of a request's body.
        max_text: Bytes of UTF-8 of the texts of one request, contexts and messages together.
        max_contexts: Contexts of one request.
        max_choices: Replies of one request, `n` times prompts.
        max_waiting: Replies that are being made or wait for it, over all clients; one more is refused with 429.
        max_jobs: Compressions, and texts being restored, at a time; likewise.
        max_batch: Replies made together.
        seconds: Time for one request, waiting included.
    """

    max_body: int = 32 * 10**6
    max_text: int = 16 * 10**6
    max_contexts: int = 64
    max_choices: int = 8
    max_waiting: int = 64
    max_jobs: int = 8
    max_batch: int = 16
    seconds: float = 600.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")


class ApiError(Exception):
    """An error that the client is told, in OpenAI's form.

    Args:
        status: The HTTP status.
        message: For the client's user.
        code: For the client's program, such as "context_not_found".
        param: The field of the request.
        retry: Whether the same request may succeed in a while.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: bool = False
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that tell clients, OpenAI's among them, whether to try again."""
        return {"retry-after": "1"} if self.retry else {"x-should-retry": "false"}


class _Form(BaseModel):
    # A misspelt field is an error, not a setting that is lost.
    model_config = ConfigDict(extra="forbid", strict=True)


class CompressionForm(_Form):
    """Options of `compress` that a client may set, by their names; a context is measured (`verify`) unless it says no.

    A form has nothing but latents, so that theirs is just the `dtype` there.
    """

    ratio: int | None = None
    segment_length: int | None = None
    latent_dtype: Literal["float32", "bfloat16", "int8"] = Field("bfloat16", alias="dtype")
    verify: bool = True
    exact: bool = False
    target_fidelity: float | None = None


class ContextForm(CompressionForm):
    """`POST /v1/contexts` with a JSON body."""

    text: str
    background: bool = False


class TextPart(_Form):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class ContextPart(_Form):
    """A part of a message that is a context: one that is stored, or a text to compress for this request."""

    type: Literal["context"] = "context"
    id: str | None = None
    text: str | None = None
    segments: list[int] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ContextPart:
        if (self.id is None) == (self.text is None):
            raise ValueError("a context has exactly one of `id` and `text`")
        return self


class Document(ContextPart):
    """A context in front of the first user message, with its title."""

    title: str | None = None


class Message(_Form):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ContextPart, Field(discriminator="type")]]


class StreamOptions(_Form):
    """What a stream brings beside the reply."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationForm(BaseModel):
    """What chat and completions have in common. What would be left out in silence is refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _nothing_is_lost(self) -> GenerationForm:
        for name, value in (self.model_extra or {}).items():
            if name in _WITHOUT_EFFECT or not value or value in _NEUTRAL.get(name, ()):
                continue
            raise ValueError(f"`{name}` is not known here, or cannot be had; leave it out")
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError("`stop` must be up to 4 strings that are not empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatForm(GenerationForm):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    documents: list[Document] = Field(default_factory=list)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionForm(GenerationForm):
    """`POST /v1/completions`: text without a chat's turns, and without contexts."""

    prompt: str | list[str]


F = TypeVar("F", bound=BaseModel)


def read_form(form: type[F], body: bytes | dict[str, Any]) -> F:
    """The request that a body holds.

    Raises:
        ApiError: If it is no JSON, or not of this form. What was sent is not repeated.
    """
    try:
        return form.model_validate_json(body) if isinstance(body, bytes) else form.model_validate(body)
    except ValidationError as error:
        # Where a field may be one of several types, the one that was meant got farthest.
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        first = max(faults, key=lambda fault: len(fault["loc"]))
        place = ".".join(_fields(first["loc"]))
        where = f"`{place}`: " if place else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}{message}.", "invalid_request", place or None) from error


def _fields(steps: Sequence[int | str]) -> Iterator[str]:
    """The steps of an error's place, without pydantic's names for one of several types a value may have."""
    for before, step in zip((None, *steps), steps):
        of_union = step == "str" or str(step).startswith(("list[", "function-"))
        # A part of a message is told apart by its `type`.
        if not of_union and not (isinstance(before, int) and step in ("text", "context")):
            yield str(step)


_SEGMENTS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def read_segments(text: str | None, count: int) -> range:
    """The segments that a query names: "3", or "3-5" with both ends, counted from 0; None are all of `count`.

    Raises:
        ApiError: If it is of another form, or they are not there.
    """
    if text is None:
        return range(count)
    match = _SEGMENTS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if match is None or first > last or last >= count:
        raise ApiError(
            400, f"`segments` must be one of 0 to {count - 1}, or two with - between them.", "no_segment", "segments"
        )
    return range(first, last + 1)


def segment_line(number: int, data: bytes, is_exact: bool) -> bytes:
    """A restored segment as a line of JSON; bytes that are no UTF-8 come out as U+FFFD."""
    told = {"segment": number, "text": data.decode("utf-8", "replace"), "exact": is_exact}
    return json.dumps(told, ensure_ascii=False).encode() + b"\n"


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
