"""The walk of docs/serving.md with a book on a laptop, step by step, and what each step gave.

`python -m benchmarks.serving_walk --data DATA`
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx
import openai
import torch
from rapidfuzz.distance import Levenshtein

from c3_hf.cli import main as c3_hf_command
from c3_hf.data.tasks import FIND_PROMPT

from .latents_setup import data_hash, load, records, write_record
from .serving import QUESTION, ServerProcess, served, serving_parser


BEGINNING = "What seemed to gratify him"
MIDDLE = "“One would think that you’d got"


class Walk:
    """The requests of the page.

    Args:
        server: What is asked, and killed once.
        book: The text of which it is.
        segment: The segment that is asked about.
        ratio: The lower ratio at which the book is uploaded again.
    """

    def __init__(self, server: ServerProcess, book: str, segment: int, ratio: int):
        self.server, self.book, self.segment, self.ratio = server, book, segment, ratio
        self.http = httpx.Client(base_url=f"{server.url}/v1", timeout=None)
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def steps(self) -> Iterator[dict[str, Any]]:
        """What each step gave, in the order of the page."""
        stored = yield from self.upload("upload")
        yield from self.upload("the same upload")
        path = f"contexts/{stored['id']}/text"
        yield {"step": "a segment", "text": self.http.get(path, params={"segments": self.segment}).text}
        reply = self.ask(stored, [self.segment])
        yield {"step": "asked for the segment", **reply}
        self.server.stop(signal.SIGKILL)
        self.server.start()
        again = self.ask(stored, [self.segment])
        yield {"step": "asked after kill -9", **again, "same": again == reply}
        restored = self.http.get(path).text
        yield {"step": "the whole text", "differences": differences(self.book, restored)}
        neighbours = [self.segment, self.segment + 1]
        yield {"step": "asked for two segments", **self.ask(stored, neighbours)}
        yield {"step": "asked for all", **self.ask(stored, None)}
        yield {"step": "begun with its beginning", **self.ask(stored, [self.segment], start=f" {BEGINNING} and")}
        yield {"step": "begun in the middle", **self.ask(stored, [self.segment], start=MIDDLE)}
        yield {"step": "to be found", **self.ask(stored, [self.segment], FIND_PROMPT, MIDDLE)}
        yield {"step": "c3-hf ask", **self.command(stored, BEGINNING)}
        low = yield from self.upload("upload at a low ratio", ratio=str(self.ratio))
        yield {"step": "c3-hf ask at a low ratio", **self.command(low, BEGINNING)}
        yield {"step": "c3-hf ask at a low ratio, in the middle", **self.command(low, MIDDLE)}

    def upload(self, step: str, **fields: str) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """The book sent as a file: the step, and then what the server answered."""
        begun = time.perf_counter()
        answer = self.http.post("contexts", files={"file": ("book.txt", self.book.encode())}, data=fields)
        seconds = time.perf_counter() - begun
        yield {"step": step, "seconds": seconds, "status": answer.status_code, "answer": answer.json()}
        return answer.json()

    def ask(
        self, stored: dict[str, Any], segments: list[int] | None, prompt: str = QUESTION, start: str | None = None
    ) -> dict[str, Any]:
        """A streamed reply of 40 tokens, or how it was refused."""
        part = {"type": "context", "id": stored["id"]} | ({} if segments is None else {"segments": segments})
        messages: list[Any] = [{"role": "user", "content": [part, {"type": "text", "text": prompt}]}]
        if start is not None:
            messages.append({"role": "assistant", "content": start})
        try:
            chunks = list(
                self.client.chat.completions.create(
                    model="served",
                    messages=messages,
                    max_tokens=40,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
        except openai.APIStatusError as error:
            return {"status": error.status_code, "message": error.message}
        reply = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        return {"reply": reply, "usage": chunks[-1].usage.model_dump(exclude_none=True)}

    def command(self, stored: dict[str, Any], start: str) -> dict[str, Any]:
        """What `c3-hf ask` prints, its status, and the last line it says besides."""
        words = ["ask", stored["id"], "--start", start, "--server", self.server.url]
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
            status = c3_hf_command(words)
        return {"status": status, "printed": printed.getvalue(), "said": said.getvalue().splitlines()[-1:]}


def differences(original: str, restored: str) -> list[list[str]]:
    """The words in which a text and what came back of it differ, each with the white space behind it."""
    words, other = (re.findall(r"\s*\S+\s*|\s+", text) for text in (original, restored))
    codes = Levenshtein.opcodes(words, other)
    return [["".join(words[a:b]), "".join(other[c:d])] for tag, a, b, c, d in codes if tag != "equal"]


def main(arguments: Sequence[str]) -> int:
    options = serving_parser(__doc__)
    options.add_argument("--book", default="The Brothers Karamazov", help="title, in long/books_and_code")
    options.add_argument("--characters", type=int, default=120_000, help="of its beginning")
    options.add_argument("--segment", type=int, default=3)
    options.add_argument("--ratio", type=int, default=2, help="at which it is uploaded again")
    options = options.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, _ = load(options)
    books = records(options.data / "long" / "books_and_code.jsonl.gz", None)
    (book,) = (record["text"][: options.characters] for record in books if record["title"] == options.book)
    with served(options) as server:
        walk = Walk(server, book, options.segment, options.ratio)
        with walk.http, walk.client:
            rows = list(walk.steps())
    print(json.dumps(rows, indent=2, ensure_ascii=False), file=sys.stderr)
    more = {"data_sha256": data_hash([book]), "openai": openai.__version__}
    write_record("serving_walk", options, model, started, rows, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
