"""`c3-hf ask`: questions to compressed contexts."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import STREAM, SUFFIX, check_context, check_stdin, context_path
from .loading import add_model_arguments, check_numbers, load_model
from .messages import check_text
from .parsing import as_typed


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; refuse what the model was not trained for."""
    check_numbers(args, "max_new_tokens", "batch_size")
    files, question = split_words(args.words)
    check_text("QUESTION", question)
    check_text("--start", args.start)
    segments = None if args.segments is None else parse_segments(args.segments)
    check_stdin(files)
    for name in files:
        check_context(name)

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
    if answer.reason:
        listed, last = ", ".join(map(str, answer.segments)), sum(map(len, contexts)) - 1
        reason = as_typed(answer.reason, args.typed)
        print(f"used: segment {listed} of 0 to {last} ({reason}; --segments chooses others)", file=sys.stderr)
    if answer.cut:
        print(f"cut where the reply leaves the text: {answer.cut[:40]!r}", file=sys.stderr)
    return 0


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """The files and the question, which is the last word unless that is the name of a file; else it is empty."""
    last = words[-1]
    if last == STREAM or last.endswith(SUFFIX) or os.path.exists(last):
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
