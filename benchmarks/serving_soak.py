"""Many mixed requests to `c3-hf serve`, with clients that leave, bad bodies and one kill -9: is anything lost?

`python -m benchmarks.serving_soak --data DATA`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from .latents_setup import data_hash, load, texts, write_record
from .serving import QUESTION, ServerProcess, served, serving_parser


# Kinds of request and how many of a hundred are of each.
SHARES = {
    "chat": 24,
    "stream": 16,
    "completion": 10,
    "leave in a stream": 10,
    "leave before the reply": 5,
    "new context": 6,
    "same context": 5,
    "restore": 8,
    "describe": 6,
    "bad body": 10,
}
BAD_BODIES: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b"\xff\xfe\x00"),
    ("/v1/chat/completions", b'{"messages": "no list"}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "context", "id": "c3-0"}]}]}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}'),
    ("/v1/completions", b'{"prompt": ""}'),
    ("/v1/contexts", b'{"text": "\\ud800"}'),
    ("/v1/contexts", b'{"text": "a", "dtype": "float8"}'),
    ("/v1/contexts", b'{"text": "a", "segment_length": 0}'),
)


class Soak:
    """The requests, and what came of them.

    Args:
        server: What is asked, and killed once.
        pieces: Texts of contexts.
        options: Of the command.
    """

    def __init__(self, server: ServerProcess, pieces: Sequence[str], options: argparse.Namespace):
        self.server, self.pieces, self.options = server, pieces, options
        self.rng = random.Random(options.seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.confirmed: dict[str, str] = {}
        self.replies: dict[str, str] = {}
        self.problems: Counter[str] = Counter()
        self.begun = self.repeated = self.next_piece = 0
        self.up = asyncio.Event()
        self.http = httpx.AsyncClient(base_url=server.url, timeout=600)

    async def run(self) -> None:
        """Ask everything, kill in the middle, and look whether all is there."""
        self.up.set()
        for _ in range(4):
            await self.count("new context", self.new_context())
        workers = [asyncio.create_task(self.work()) for _ in range(self.options.clients)]
        while self.begun < self.options.requests // 2:
            await asyncio.sleep(0.05)
        self.up.clear()
        await asyncio.to_thread(self.server.stop, signal.SIGKILL)
        await asyncio.to_thread(self.server.start)
        self.up.set()
        await asyncio.gather(*workers)
        await self.check()
        await self.http.aclose()

    async def work(self) -> None:
        """One client."""
        while self.begun < self.options.requests:
            self.begun += 1
            (kind,) = self.rng.choices(list(SHARES), list(SHARES.values()))
            await self.count(kind, self.of_kind(kind))

    def of_kind(self, kind: str) -> Any:
        """A coroutine function that makes a request of this kind; called again where the server was killed."""
        if kind == "new context":
            return self.new_context()
        context_id = self.rng.choice(list(self.confirmed))
        bad = self.rng.choice(BAD_BODIES)
        return {
            "chat": lambda: self.chat(context_id),
            "stream": lambda: self.stream(context_id),
            "completion": lambda: self.status("POST", "/v1/completions", json={"prompt": "The", "max_tokens": 4}),
            "leave in a stream": lambda: self.stream(context_id, leave=True),
            "leave before the reply": lambda: self.leave(context_id),
            "same context": lambda: self.post(self.confirmed[context_id]),
            "restore": lambda: self.restore(context_id),
            "describe": lambda: self.status("GET", f"/v1/contexts/{context_id}"),
            "bad body": lambda: self.status("POST", bad[0], content=bad[1]),
        }[kind]

    async def count(self, kind: str, request: Any) -> None:
        """Make a request, again where the server was killed under it, and count what came."""
        while True:
            await self.up.wait()
            try:
                outcome = await request()
            except httpx.TransportError:
                if self.up.is_set() and self.server.process.poll() is None:
                    self.problems["connection broken though the server was up"] += 1
                self.repeated += 1
                await asyncio.sleep(0.2)
                continue
            self.counts[kind, outcome] += 1
            return

    def body(self, context_id: str) -> dict[str, Any]:
        parts = [{"type": "context", "id": context_id}, {"type": "text", "text": QUESTION}]
        return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}

    async def status(self, method: str, path: str, **options: Any) -> str:
        return str((await self.http.request(method, path, **options)).status_code)

    async def chat(self, context_id: str) -> str:
        answer = await self.http.post("/v1/chat/completions", json=self.body(context_id))
        if answer.status_code == 200:
            self.compare(context_id, answer.json()["choices"][0]["message"]["content"])
        return str(answer.status_code)

    async def stream(self, context_id: str, leave: bool = False) -> str:
        body = {**self.body(context_id), "stream": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            events = []
            async for line in answer.aiter_lines():
                events += [line.removeprefix("data: ")] * bool(line)
                if leave and answer.status_code == 200:
                    return "left"
        if answer.status_code == 200:
            if events.pop() == "[DONE]":
                deltas = [choice["delta"] for data in events for choice in json.loads(data).get("choices", ())]
                self.compare(context_id, "".join(delta.get("content", "") for delta in deltas))
            else:
                self.problems["streams without an end"] += 1
        return str(answer.status_code)

    async def leave(self, context_id: str) -> str:
        try:
            await self.http.post("/v1/chat/completions", json=self.body(context_id), timeout=0.02)
        except httpx.TimeoutException:
            return "left"
        return "200"

    def new_context(self) -> Any:
        text = f"{self.next_piece}: {self.pieces[self.next_piece % len(self.pieces)]}"
        self.next_piece += 1
        return lambda: self.post(text)

    async def post(self, text: str) -> str:
        answer = await self.http.post("/v1/contexts", json={"text": text, "exact": True, "verify": False})
        if answer.status_code in (200, 201):
            self.confirmed[answer.json()["id"]] = text
        return str(answer.status_code)

    async def restore(self, context_id: str) -> str:
        answer = await self.http.get(f"/v1/contexts/{context_id}/text")
        if answer.status_code == 200 and answer.text != self.confirmed[context_id]:
            self.problems["texts that differ"] += 1
        return str(answer.status_code)

    def compare(self, context_id: str, reply: str) -> None:
        if self.replies.setdefault(context_id, reply) != reply:
            self.problems["replies that differ from the first of the same context"] += 1

    async def check(self) -> None:
        """Every context that was confirmed is there with its text, and no place is taken any more."""
        for context_id, text in self.confirmed.items():
            answer = await self.http.get(f"/v1/contexts/{context_id}/text")
            self.problems["contexts lost"] += answer.status_code != 200
            self.problems["texts that differ"] += answer.status_code == 200 and answer.text != text
        # Who left is noticed at the next token.
        await asyncio.sleep(1)
        lines = (await self.http.get("/metrics")).text.splitlines()
        taken = sum(float(line.split()[-1]) for line in lines if line.startswith("c3_places_used{"))
        self.problems["places still taken"] += int(taken)
        self.problems["errors in the server's log"] += self.server.errors()

    def failures(self) -> int:
        """Problems, good requests that got anything but a good answer or a refusal in time, bad ones not refused."""
        wrong = 0
        for (kind, outcome), number in self.counts.items():
            right = outcome[0] == "4" if kind == "bad body" else outcome in ("200", "201", "left", "429", "503")
            wrong += number * (not right)
        return wrong + self.problems.total()


def main(arguments: Sequence[str]) -> int:
    options = serving_parser(__doc__)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--requests", type=int, default=2000)
    options.add_argument("--characters", type=int, default=300, help="of a context")
    options = options.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, _ = load(options)
    size = options.characters
    passages = texts(options, "passages_en")
    pieces = [text[start : start + size] for text in passages for start in range(0, len(text) - size, size)]
    with served(options) as server:
        soak = Soak(server, pieces, options)
        asyncio.run(soak.run())
        memory = server.memory("VmRSS")
    rows = [
        {"kind": kind, "outcome": outcome, "requests": number}
        for (kind, outcome), number in sorted(soak.counts.items())
    ]
    summary = {
        "requests": soak.counts.total(),
        "kills": 1,
        "repeated_because_of_the_kill": soak.repeated,
        "contexts_confirmed": len(soak.confirmed),
        "failures": soak.failures(),
        "problems": {problem: number for problem, number in soak.problems.items() if number},
        "memory_bytes_at_the_end": memory,
    }
    print(summary, file=sys.stderr)
    write_record("serving_soak", options, model, started, [summary, *rows], data_sha256=data_hash(pieces))
    return 1 if soak.failures() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
