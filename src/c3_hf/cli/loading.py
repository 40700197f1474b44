"""What the commands on compressed contexts share: which model, and how it is loaded."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--dtype`, `--device` and `--batch-size`."""
    parser.add_argument("--model", help="a C3 model, folder or Hub id (default: the bundled c3-tiny, offline)")
    parser.add_argument(
        "--model-dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="the dtype to compute in; a byte-exact file wants the one it was made with (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="segments in one batch (default: %(default)s)")


def add_context_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the compressed contexts to read, `files`, and the model's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILE.c3", help="compressed contexts, or - for stdin")
    add_model_arguments(parser)


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and processor that the arguments ask for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils import logging

    import c3_hf

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    path = args.model or c3_hf.tiny_model_path()
    # Asking for a public name registers C3 with the auto classes.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.model_dtype))
    return model.to(args.device).eval(), AutoProcessor.from_pretrained(path)


@contextlib.contextmanager
def context_path(path: str) -> Iterator[Path]:
    """`path` itself, or for "-" a temporary file that holds what stdin gives: contexts are mapped, not streamed."""
    if path != "-":
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stdin.c3"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield copy


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` once it is written in full."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
