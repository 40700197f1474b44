"""Requests a second, time to the first token and memory of `c3-hf serve`, for several numbers of clients at once.

Each client asks one request after the other, of a stored context or of the same text as a prompt, on the same engine.
Each row has a server started anew, because memory that a process has freed often stays with it and would be counted
for nobody.

`python -m benchmarks.serving --data DATA`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from c3_hf import C3Pipeline

from .latents_setup import data_hash, load, parser, texts, write_record
from .record import ROOT, process_memory


QUESTION = "Repeat the text: "


class ServerProcess:
    """`c3-hf serve` as a process of its own, at the same port each time it is started.

    Args:
        words: What stands behind `c3-hf serve` besides port, store and name.
        store: Folder of its contexts.
    """

    def __init__(self, words: Sequence[str], store: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._words = ["serve", *words, "--port", str(port), "--store", str(store), "--name", "served"]
        self._log = store.with_name("server.log")

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "c3_hf.cli", *self._words], stderr=log, stdout=log, env=environment
            )
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it by a signal."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait()

    def errors(self) -> int:
        """Failures inside that the log tells of, of requests, batches and compressions, whatever clients were told."""
        return len(re.findall(r"(?: s, |failed: )\w+ at |^Traceback ", self._log.read_text(), flags=re.MULTILINE))

    def memory(self, key: str) -> int:
        """Bytes of a line of its /proc/PID/status."""
        return process_memory(key, self.process.pid)

    def reset_peak(self) -> None:
        """Set VmHWM, which loading the model has raised, to what it holds now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[ServerProcess]:
    """A server on a store of its own, ended with the block."""
    words = [str(options.model), "--dtype", options.dtype, "--device", options.device]
    for url in options.engine_url:
        words += ["--engine", "vllm", "--engine-url", url]
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(words, Path(folder) / "store")
        server.start()
        try:
            yield server
        finally:
            server.stop()


def serving_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of the measurements on a server."""
    parsed = parser(description)
    parsed.add_argument("--engine-url", action="append", default=[], help="a vLLM server of the exported decoder")
    parsed.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    return parsed


def main(arguments: Sequence[str]) -> int:
    options = serving_parser(__doc__)
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument(
        "--requests",
        type=int,
        default=16,
        help="at least so many of a row; each client asks equally many, at least two",
    )
    options.add_argument("--segments", type=int, default=3, help="segments of the context")
    options.add_argument("--new-tokens", type=int, default=8)
    options = options.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, processor = load(options)
    text = long_text(C3Pipeline(model, processor), texts(options, "passages_en"), options.segments)
    with served(options) as server:
        begun = time.perf_counter()
        stored = httpx.post(f"{server.url}/v1/contexts", json={"text": text, "verify": False}, timeout=None).json()
        compress_s = time.perf_counter() - begun
        parts = {
            "stored": {"type": "context", "id": stored["id"]},
            "text": {"type": "text", "text": text},
        }
        rows = []
        for clients in options.clients:
            for kind, part in parts.items():
                server.stop()
                server.start()
                row = asyncio.run(measure_clients(server, part, clients, options))
                rows.append({"clients": clients, "prompt": kind, **row})
                print(rows[-1], file=sys.stderr)
    known = {"data_sha256": data_hash([text]), "tokens": stored["tokens"], "compress_s": compress_s}
    write_record("serving", options, model, started, rows, **known)
    return 0


def long_text(pipe: C3Pipeline, passages: Sequence[str], segments: int) -> str:
    """The beginning of the passages, one after the other, that fills so many segments."""
    context = pipe.compress("\n".join(passages)[: 8 * segments * pipe.model.config.longest_segment])
    return "\n".join(passages)[: int(context.char_offsets[min(segments, len(context))])]


async def measure_clients(
    server: ServerProcess, part: dict[str, Any], clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: so many clients, each asking one request after the other; of a server that has answered nothing yet."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}],
        "max_tokens": options.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    rounds = max(2, -(-options.requests // clients))
    firsts: list[float] = []
    wholes: list[float] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        # What every request needs, whatever its length, is loaded by a short one.
        await ask(http, {**body, "messages": [{"role": "user", "content": QUESTION}]})
        server.reset_peak()
        before = server.memory("VmRSS")
        _first, _whole, usage = await ask(http, body)

        async def one_client() -> None:
            for _ in range(rounds):
                first, whole, _usage = await ask(http, body)
                firsts.append(first)
                wholes.append(whole)

        begun = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    return {
        "requests": rounds * clients,
        "requests_per_s": rounds * clients / seconds,
        "first_token_s": percentiles(firsts),
        "reply_s": percentiles(wholes),
        "prompt_tokens": usage["prompt_tokens"],
        "reply_tokens": usage["completion_tokens"],
        "memory_bytes_a_client": (server.memory("VmHWM") - before) / clients,
    }


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float, dict[str, int]]:
    """Seconds to the first text and to the end of a streamed reply, and its usage."""
    begun = time.perf_counter()
    first = None
    usage: dict[str, int] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {(await answer.aread())[:500]!r}")
        async for line in answer.aiter_lines():
            if first is None and '"content": "' in line and '"content": ""' not in line:
                first = time.perf_counter() - begun
            if '"usage"' in line:
                usage = json.loads(line.removeprefix("data: "))["usage"]
    whole = time.perf_counter() - begun
    return whole if first is None else first, whole, usage


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th and the 95th of a hundred: the least value that so many do not exceed."""
    ordered = sorted(values)
    return {f"p{share}": ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in (50, 95)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
