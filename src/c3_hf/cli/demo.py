"""`c3-hf demo`: compress a text into latents, restore it, and show what came back; in a terminal or as a page."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import MIN_SEGMENT_LENGTH
from .loading import add_model_arguments, check_address, load_model
from .messages import say


if TYPE_CHECKING:
    from c3_hf.pipeline import C3Pipeline


SAMPLE = Path(__file__).with_name("sample.txt")
RED, YELLOW, RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="compress and restore a text, and show what came back",
        description="Compress a text into latents, restore it from them alone, and show what came back: that it is "
        "the same text, or both, with the differences marked. A large --ratio shows how a model forgets. With --web "
        "as a page in the browser, on which much more can be tried (docs/demo.md).",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="UTF-8 text, or - for stdin (default: a sample)")
    parser.add_argument(
        "--ratio", type=float, help="tokens a latent at most, such as 40 (default: what the model was made for)"
    )
    add_model_arguments(parser)
    web = parser.add_argument_group("the page", "what counts with --web only")
    web.add_argument(
        "--web", nargs="?", const="", metavar="MODEL", help="serve the page, with this model in place of --model"
    )
    web.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    web.add_argument("--port", type=int, help="port to listen on (default: the first that is free from 7860)")
    web.add_argument(
        "--time-limit", type=float, default=60, metavar="SECONDS", help="for each click (default: %(default)s)"
    )
    parser.set_defaults(run=run, of_page={name: parser.get_default(name) for name in ("host", "port", "time_limit")})


def run(args: argparse.Namespace) -> int:
    """Restore the text and print what came back and the numbers; 0 whatever came back."""
    if args.web is not None:
        return _serve(args)
    for name, default in args.of_page.items():
        if getattr(args, name) != default:
            raise ValueError(f"`{name}` means nothing without `--web`; add it, or leave this out.")
    text = _read(args.file)
    if not text.strip():
        raise ValueError(f"`FILE` {args.file!r} holds no text; give one that does, or none for the sample")
    if args.ratio is not None and not 0 < args.ratio < float("inf"):
        raise ValueError(f"`--ratio` must be positive, 3 for three tokens per latent, got {args.ratio}")

    import torch

    from c3_hf.evaluation.metrics.characters import char_precision

    if args.model is None:
        # The bundled model is so small that a second thread costs more than it brings, on a busy machine far more.
        torch.set_num_threads(1)
    pipe = load_model(args)
    print(pipe.describe())
    length = None if args.ratio is None else _segment_length(pipe, args.ratio)
    started = time.perf_counter()
    # As bytes, because a text may be the name of a file.
    context = pipe.compress(text.encode(), segment_length=length, batch_size=args.batch_size, progress=True)
    restored = pipe.restore(context, batch_size=args.batch_size, progress=True).text
    seconds = time.perf_counter() - started

    size = f"{len(text):,} characters, {context.num_tokens:,} tokens"
    latents = f"{len(context)} × {context.header.num_latents} latents"
    if restored == text:
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        print(f"{text.rstrip()}\n\nRestored from {latents}: identical")
        print(f"({size}, sha256 {digest})")
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(f"Original: {size}\n\n{text.rstrip()}\n")
        print(f"Restored from {latents}: not the same\n")
        print(f"{mark_differences(text, restored, colour).rstrip()}\n")
    print(
        f"{context.compression_ratio:.1f} tokens and {len(text) / context.total_latents:.1f} characters a latent, "
        f"character precision {100 * char_precision(restored, text):.2f} %, "
        f"{seconds:.2f} s ({context.num_tokens / seconds:.0f} tokens/s)"
    )
    return 0


def _serve(args: argparse.Namespace) -> int:
    """Show the page until interrupted."""
    if args.web and args.model:
        raise ValueError("`--web` and `--model` both name a model; give one of them.")
    if args.ratio is not None:
        raise ValueError("`--ratio` means nothing with `--web`, where the page has a control for it; leave it out.")
    check_address(args)
    if not 0 < args.time_limit < float("inf"):
        raise ValueError(f"`--time-limit` must be a positive number of seconds, got {args.time_limit}.")
    text = None if args.file is None else _read(args.file)

    from c3_hf.web.app import launch
    from c3_hf.web.study import Limits

    args.model = args.web or args.model
    pipe = load_model(args)
    say(args, pipe.describe())
    limits = Limits(seconds=args.time_limit)
    launch(pipe, text, limits, server_name=args.host, server_port=args.port)
    return 0


def _segment_length(pipe: C3Pipeline, ratio: float) -> int:
    """Tokens of a segment at `ratio` tokens a latent, as far as the model has positions for them."""
    num_latents = pipe.model.config.num_latents
    length = min(max(int(ratio * num_latents), MIN_SEGMENT_LENGTH), pipe.segment_room)
    if length != int(ratio * num_latents):
        print(
            f"--ratio {ratio:g}: a segment has {MIN_SEGMENT_LENGTH} to {pipe.segment_room:,} tokens, so that "
            f"this is {length / num_latents:.1f} tokens a latent"
        )
    return length


def mark_differences(original: str, restored: str, colour: bool) -> str:
    """The restored text with its differences marked.

    Args:
        colour: With it, wrong characters are red and missing ones yellow (ANSI escapes); without it, they stand in
            `{+wrong+}` and `[-missing-]`.

    Returns:
        `restored` with marks; `restored` itself where the two are equal.
    """
    from rapidfuzz.distance import Levenshtein

    wrong = (RED, RESET) if colour else ("{+", "+}")
    missing = (YELLOW, RESET) if colour else ("[-", "-]")
    pieces = []
    for edit in Levenshtein.opcodes(original, restored):
        lost, got = original[edit.src_start : edit.src_end], restored[edit.dest_start : edit.dest_end]
        if edit.tag == "equal":
            pieces.append(got)
            continue
        pieces += [f"{missing[0]}{lost}{missing[1]}"] * bool(lost) + [f"{wrong[0]}{got}{wrong[1]}"] * bool(got)
    return "".join(pieces)


def _read(file: str | None) -> str:
    if file is None:
        return SAMPLE.read_text(encoding="utf-8")
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`FILE` {file!r} is not UTF-8 text ({error}); convert it first") from error
