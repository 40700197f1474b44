"""`c3-hf demo`: compress a text into latents, restore it, and show what came back."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from .loading import add_model_arguments, check_numbers, load_model
from .messages import stdin_bytes


SAMPLE = """\
The night train left the harbour a little after nine. Rain ran down the windows, and the lamps of the last \
warehouses slid past one by one until there was nothing outside but the dark. An old man in the corner seat opened \
his bag, took out a loaf of bread and a small knife, and began to cut the bread into even slices.

"You are going far?" asked the girl across from him.

"Only to the end of the line," he said, and held out a slice to her on the flat of the knife.

She took it. It was rye, still warm in the middle, and for a while neither of them spoke. The guard came through \
with his lantern, counted them as if they might have changed in number since the harbour, and went on into the next \
carriage.

"My sister keeps the lighthouse at Varne," the old man said at last. "Forty-one years. She writes down every ship \
that passes: the hour, the flag, the weather. Last winter she sent me the books, all nineteen of them, because the \
damp was getting into the shelves. I have read as far as the spring of 1903."

"Is it interesting?"

"No," he said, and laughed. "Ship after ship after ship. But on the eleventh of March there is a line that does not \
belong: 'Quarter past four, no flag, no lights, and someone on deck playing the violin very badly.' I have been \
thinking about it for two months. So now I am going to ask her what the tune was."

The girl looked out at the dark, where a single lamp had appeared, far off and low, and was keeping pace with the \
train. It went out, came back, and went out again.

"And if she does not remember?"

"Then," said the old man, folding his knife, "I shall have to learn the violin."

Toward midnight the rain stopped. At a station with no name the girl stepped down, turned, and waved with the bread \
still in her hand. He raised his hat. On the empty seat she had left her newspaper, and along its margin, in \
pencil, seven notes on a crooked staff, and under them the words: perhaps this one."""

RED, YELLOW, RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="compress and restore a text, and show what came back",
        description="Compress a text into latents, restore it from them alone, and show both with the differences.",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="UTF-8 text, or - for stdin (default: a sample)")
    parser.add_argument("--ratio", type=float, help="tokens per latent at most (default: what suits the model)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Restore the text and print the original, what came back and the numbers; 0 whatever came back."""
    check_numbers(args, "batch_size")
    text = _read(args.file)
    if not text.strip():
        raise ValueError(f"`FILE` {args.file!r} holds no text; give one that does, or none for the sample")
    if args.ratio is not None and not 0 < args.ratio < float("inf"):
        raise ValueError(f"`--ratio` must be positive, 3 for three tokens per latent, got {args.ratio}")

    import torch

    from c3_hf.evaluation.metrics.characters import char_precision
    from c3_hf.latents.compressor import default_segment_length
    from c3_hf.latents.restoring import restore_texts
    from c3_hf.latents.segmentation import iter_segments

    if args.model is None:
        # The bundled model is so small that a second thread costs more than it brings, on a busy machine far more.
        torch.set_num_threads(1)
    model, processor = load_model(args)
    started = time.perf_counter()
    num_latents = model.config.num_latents
    length = default_segment_length(model.config) if args.ratio is None else int(num_latents * args.ratio)
    segments = list(iter_segments(text, processor.encoder_tokenizer, length))
    texts = [segment.text for segment in segments]
    restored = "".join(restore_texts(model, processor, texts, batch_size=args.batch_size, progress=True))
    seconds = time.perf_counter() - started

    num_tokens = sum(len(segment.token_ids) for segment in segments)
    ratio = num_tokens / (len(segments) * num_latents)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"Original: {len(text)} characters, {num_tokens} tokens\n\n{text.rstrip()}\n")
    print(f"Restored from {len(segments)} × {num_latents} latents\n")
    print(f"{mark_differences(text, restored, colour).rstrip()}\n")
    print(
        f"compression ratio {ratio:.2f}×, character precision {100 * char_precision(restored, text):.2f} %, "
        f"{seconds:.2f} s ({num_tokens / seconds:.0f} tokens/s)"
    )
    return 0


def mark_differences(original: str, restored: str, colour: bool) -> str:
    """The restored text with its differences marked.

    Args:
        original: The text that was compressed.
        restored: What came back.
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
        return SAMPLE
    content = stdin_bytes().read() if file == "-" else Path(file).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`FILE` {file!r} is not UTF-8 text ({error}); convert it first") from error
