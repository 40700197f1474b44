"""`c3-hf ask`: questions to compressed contexts."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import STREAM, SUFFIX, check_context, check_stdin, context_path
from .loading import add_model_arguments, check_numbers, load_model
from .messages import check_text
from .parsing import as_typed
from .remote import CONTEXT_ID, Remote, add_server_argument


if TYPE_CHECKING:
    from c3_hf.latents.ask import Answer


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "ask",
        help="ask about compressed contexts what the model was trained for",
        description="Put compressed contexts and a question in front of the model; the text itself is not needed, "
        "and the encoder does not run. The checkpoint says which prompts it was trained for (docs/contexts.md): one "
        "for free questions takes QUESTION, one for finding takes --start, words of the text from which the reply "
        "goes on. What the model was not trained for is refused. Of contexts that are longer than the model reads, "
        "the segments are used that share most words with the question; stderr says which.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FILE.c3 ... [QUESTION]",
        help="compressed contexts, or - for stdin; the last word is the question, unless it is the name of a file",
    )
    parser.add_argument("--start", metavar="TEXT", default="", help="how the reply begins")
    parser.add_argument(
        "--segments", metavar="LIST", help="the segments to use, such as 0,4-7, counted from 0 over all files"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="the text of the one context, to choose segments by (else restored)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="most tokens of the answer (default: %(default)s)"
    )
    add_model_arguments(parser)
    add_server_argument(parser, "ask contexts of, named by their ids or sent as files,", "text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; refuse what the model was not trained for."""
    check_numbers(args, "max_new_tokens")
    files, question = split_words(args.words)
    check_text("QUESTION", question)
    check_text("--start", args.start)
    segments = None if args.segments is None else parse_segments(args.segments)
    check_stdin(files)
    for name in files:
        if args.server is None or not CONTEXT_ID.fullmatch(name):
            check_context(name)
    if args.server is not None:
        with Remote(args) as server:
            return _ask_server(server, args, files, question, segments)

    from c3_hf.latents import CompressedContext
    from c3_hf.latents.ask import choose_prompt

    pipe = load_model(args)
    with contextlib.ExitStack() as stack:
        contexts = [CompressedContext.load(stack.enter_context(context_path(name))) for name in files]
        printer = _printer(pipe.processor.tokenizer, args.start)
        # What is found is printed as far as it stands in the text, which is known at its end.
        finds = choose_prompt(pipe.processor.prompts, question, args.start) == "find"
        answer = pipe.ask(
            contexts,
            question,
            start=args.start,
            segments=segments,
            text=None if args.text is None else Path(args.text),
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            progress=True,
            streamer=None if finds else printer,
        )
    if not printer.printed:
        print(answer)
    _tell(args, answer, sum(map(len, contexts)))
    return 0


def _tell(args: argparse.Namespace, answer: Answer, count: int) -> None:
    """Say which of so many segments were used, and what of the reply was left out."""
    if answer.reason:
        listed, reason = ", ".join(map(str, answer.segments)), as_typed(answer.reason, args.typed)
        print(f"used: segment {listed} of 0 to {count - 1} ({reason}; --segments chooses others)", file=sys.stderr)
    if answer.cut:
        print(f"cut where the reply leaves the text: {answer.cut[:40]!r}", file=sys.stderr)


def _ask_server(
    server: Remote, args: argparse.Namespace, names: list[str], question: str, segments: list[int] | None
) -> int:
    """As `C3Pipeline.ask`, with contexts and a model that are elsewhere."""
    from c3_hf.latents.ask import Answer, choose_prompt, find_place, part_in_text

    prompts = server.prompts()
    prompt = choose_prompt(prompts, question, args.start)
    ids = [name if CONTEXT_ID.fullmatch(name) else _send(server, name) for name in names]
    places = [(name, index) for name in ids for index in range(server.describe(name)["segments"])]
    chosen = list(range(len(places))) if segments is None else segments
    if not chosen or chosen[-1] >= len(places):
        raise ValueError(f"`segments` must name some of 0 to {len(places) - 1}, got {chosen}.")
    text, reason = "", None
    if prompt == "find":
        texts = _texts(server, [places[index] for index in chosen])
        place = find_place(args.start, texts)
        chosen, text, reason = [chosen[place]], texts[place], "it holds the words of `start`"
    parts: list[dict[str, Any]] = [{"type": "context", "id": places[i][0], "segments": [places[i][1]]} for i in chosen]
    parts.append({"type": "text", "text": prompts[prompt] + question})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    messages += [{"role": "assistant", "content": args.start}] * bool(args.start)
    pieces = server.chat(messages, args.max_new_tokens)
    if prompt == "find":
        reply = "".join(pieces)
        right = part_in_text(reply, text, args.start)
        print(args.start + right)
        _tell(args, Answer(right, tuple(chosen), reason, reply[len(right) :]), len(places))
        return 0
    print(args.start, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _texts(server: Remote, places: list[tuple[str, int]]) -> list[str]:
    """The texts of segments, given by context and number; neighbours are asked for at once."""
    runs: list[tuple[str, int, int]] = []
    for name, index in places:
        if runs and runs[-1][0] == name and runs[-1][2] == index - 1:
            runs[-1] = (name, runs[-1][1], index)
        else:
            runs.append((name, index, index))
    return [text for run in runs for text in server.texts(*run)]


def _send(server: Remote, name: str) -> str:
    with context_path(name) as path, open(path, "rb") as file:
        return server.add(f"context{SUFFIX}", file)["id"]


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """The files and the question, which is the last word unless that is the name of a file; else it is empty."""
    last = words[-1]
    if last == STREAM or last.endswith(SUFFIX) or os.path.exists(last) or CONTEXT_ID.fullmatch(last):
        return list(words), ""
    if len(words) == 1:
        raise ValueError(f"`FILE{SUFFIX}`: there is no file {last}. Give a compressed context in front of a question.")
    return list(words[:-1]), last


def parse_segments(text: str) -> list[int]:
    """Numbers and ranges such as "0,4-7", ascending.

    Raises:
        ValueError: If it is anything else.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        # No file holds ten million segments, and a list of them would fill the memory.
        if not (first.isdecimal() and last.isdecimal() and len(last) < 8 and int(first) <= int(last)):
            raise ValueError(f"`--segments` must be numbers and ranges such as 0,4-7, got {text!r}.")
        numbers.update(range(int(first), int(last) + 1))
    return sorted(numbers)


def _printer(tokenizer: Any, start: str) -> Any:
    """A streamer that prints the reply as it comes, `start` in front of it, and knows whether it did."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        printed = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(text if self.printed else start + text, stream_end)
            self.printed = True

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
