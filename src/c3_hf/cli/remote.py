"""A running `c3-hf serve` in the place of a model here: `--server URL`."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from .messages import check_text
from .serve import KEY_VARIABLE


CONTEXT_ID = re.compile(r"c3-[0-9a-f]{32}")
_CONNECT_SECONDS = 10.0
_EXAMPLE = "one such as http://127.0.0.1:8000"


def add_server_argument(parser: argparse.ArgumentParser, words: str, *local: str) -> None:
    """Add `--server`.

    Args:
        parser: Where to add it, behind the arguments in `local`.
        words: What the command does with it.
        local: Arguments that mean nothing to a server.
    """
    parser.add_argument(
        "--server", metavar="URL", help=f"{words} a running c3-hf serve, its key in {KEY_VARIABLE}; needs httpx"
    )
    names = (*local, "model", "dtype", "device", "batch_size")
    parser.set_defaults(local={name: parser.get_default(name) for name in names})


class Remote:
    """The contexts and the model of a server; a context manager, which closes the connection.

    Args:
        args: Of the command, with `server`.

    Raises:
        ValueError: If the address is none, or an argument was given that means nothing to a server.
        ImportError: If httpx is missing.
    """

    def __init__(self, args: argparse.Namespace):
        for name, default in args.local.items():
            if getattr(args, name) != default:
                raise ValueError(f"`{name}` means nothing with `--server`, where the server decides; leave it out.")
        if not re.match(r"https?://[^/\s]", args.server, flags=re.IGNORECASE):
            raise ValueError(f"`server` {args.server!r} is no URL; expected {_EXAMPLE}.")
        try:
            import httpx
        except ImportError as error:
            raise ImportError("`--server` needs the package httpx: pip install httpx") from error
        self._httpx, self.url = httpx, args.server.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE)
        check_text(KEY_VARIABLE, key)
        try:
            self._client = httpx.Client(
                base_url=f"{self.url}/v1",
                # As bytes: a key may be any text.
                headers={b"authorization": f"Bearer {key}".encode()} if key else {},
                # Compressing a book takes its time.
                timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"`server` {args.server!a} is no URL ({error}); expected {_EXAMPLE}.") from error

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def add(self, name: str, file: BinaryIO, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a text, or a file whose name ends in .c3; gives what the server says of the context."""
        fields = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in (options or {}).items()
        }
        # A name that is not UTF-8 cannot travel as it is.
        name = name.encode("utf-8", "replace").decode()
        return self._told(self._request("POST", "/contexts", files={"file": (name, file)}, data=fields), "id")

    def describe(self, context_id: str) -> dict[str, Any]:
        """What the server says of a context that is ready."""
        told = self._told(self._request("GET", f"/contexts/{context_id}"), "status")
        if told["status"] != "ready":
            raise ValueError(f"{self.url}: {context_id} is still being compressed; ask again when it is done.")
        return told

    def texts(self, context_id: str, first: int, last: int) -> list[str]:
        """The texts of segments, both ends included, which the server restores together."""
        query = {"segments": f"{first}-{last}", "format": "jsonl"}
        answer = self._request("GET", f"/contexts/{context_id}/text", params=query)
        try:
            return [json.loads(line)["text"] for line in answer.content.splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise self._another("its segments are no lines of JSON") from error

    def prompts(self) -> dict[str, str]:
        """What the server's model was trained for."""
        models = self._told(self._request("GET", "/models"), "data")["data"]
        if not (isinstance(models, list) and models and isinstance(models[0], dict) and "prompts" in models[0]):
            raise self._another("its models say no prompts")
        return models[0]["prompts"]

    def chat(self, messages: list[dict[str, Any]], max_tokens: int) -> Iterator[str]:
        """The reply, piece by piece, without chance."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._check(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise ValueError(f"{self.url}: {event['error']['message']}")
                        yield from (choice["delta"].get("content") or "" for choice in event["choices"])
        except self._httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._client.request(method, path, **options)
        except self._httpx.TransportError as error:
            raise self._unreachable(error) from error
        self._check(answer)
        return answer

    def _told(self, answer: Any, entry: str) -> dict[str, Any]:
        """The JSON of an answer; a ValueError where it is none with `entry`, as that of another program."""
        try:
            told = answer.json()
        except ValueError as error:
            raise self._another("its answer is no JSON") from error
        if not isinstance(told, dict) or entry not in told:
            raise self._another(f"its answer has no {entry!r}")
        return told

    def _another(self, sign: str) -> ValueError:
        return ValueError(f"`server` {self.url} is no `c3-hf serve` ({sign}). Check the address.")

    def _check(self, answer: Any) -> None:
        if answer.is_success:
            return
        try:
            said = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = f"status {answer.status_code}; expected `c3-hf serve`, check the address"
        advice = f" Set {KEY_VARIABLE}." if answer.status_code == 401 else ""
        raise ValueError(f"{self.url}: {said}{advice}")

    def _unreachable(self, error: Exception) -> ValueError:
        return ValueError(
            f"`server` {self.url} cannot be reached ({str(error) or type(error).__name__}). Start `c3-hf serve` "
            "there, or check the address."
        )
