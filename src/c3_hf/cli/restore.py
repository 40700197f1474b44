"""`c3-hf restore`: the text of compressed contexts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any, BinaryIO

from .loading import add_context_arguments, atomic_output, context_path, load_model


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "restore",
        help="generate the text of a compressed context back",
        description="Restore the text of FILE.c3: to the byte if it was compressed with --exact, else as well as the "
        "model can. Says on stderr how many segments are exact.",
    )
    add_context_arguments(parser)
    parser.add_argument("-o", "--output", help="the file to write, or a directory for several (default: stdout)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Restore every file."""
    several = len(args.files) > 1
    if several and args.output is not None and not Path(args.output).is_dir():
        raise ValueError(f"`--output` must be an existing directory for several files, got {args.output!r}.")
    model, processor = load_model(args)
    for name in args.files:
        with context_path(name) as path, _open_output(name, args.output) as file:
            _restore(path, name, file, model, processor, args.batch_size)
    return 0


@contextlib.contextmanager
def _open_output(name: str, output: str | None):
    if output is None or output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(output)
    if target.is_dir():
        target /= Path(name).name.removesuffix(".c3")
    with atomic_output(target) as file:
        yield file


def _restore(path: Path, name: str, file: BinaryIO, model: Any, processor: Any, batch_size: int) -> None:
    from c3_hf.latents import CompressedContext, iter_restored

    context = CompressedContext.load(path)
    exact = 0
    for data, is_exact in iter_restored(context, model, processor, batch_size=batch_size, progress=True):
        file.write(data)
        exact += is_exact
    print(f"{name}: {exact} of {len(context)} segments exact", file=sys.stderr)
