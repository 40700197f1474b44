"""What the commands on a model share: which one, what it computes in, and how it is loaded."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from c3_hf.pipeline import C3Pipeline


def add_dtype_argument(parser: argparse.ArgumentParser, default: str | None, words: str = "", *others: str) -> None:
    """Add `--dtype`, which in every command is the model's: that of its weights, and what it computes in.

    Args:
        words: What the command does with it.
        others: Further choices.
    """
    parser.add_argument(
        "--dtype",
        default=default,
        choices=("float32", "bfloat16", "float16", *others),
        help="dtype of the model's weights, in which it computes" + (words or " (default: %(default)s)"),
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how a Hub repository is fetched, see [`hub_arguments`]."""
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--token", help="access token for the Hub")
    parser.add_argument("--cache-dir", help="where downloads are kept")
    parser.add_argument("--local-files-only", action="store_true", help="take files from the cache, never ask the Hub")


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What [`add_hub_arguments`] added, by the names that `huggingface_hub` has."""
    return {name: getattr(args, name) for name in ("revision", "token", "cache_dir", "local_files_only")}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--dtype`, `--device` and `--batch-size`."""
    parser.add_argument("--model", help="a C3 model, folder or Hub id (default: the bundled c3-tiny, offline)")
    add_dtype_argument(parser, "float32", "; a byte-exact file wants the one it was made with (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="segments in one batch (default: %(default)s)")


def check_address(args: argparse.Namespace) -> None:
    """Raise ValueError if `host` and `port` are no address to listen on.

    An empty host would be every address of the machine, open to whoever reaches it.
    """
    if not args.host.strip():
        raise ValueError("`host` is empty. Give an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine.")
    if args.port is not None and not 0 <= args.port < 1 << 16:
        raise ValueError(f"`port` must be 0 to 65535, got {args.port}.")


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if one of these arguments is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def load_model(args: argparse.Namespace) -> C3Pipeline:
    """The model and processor that the arguments ask for.

    Raises:
        ValueError: If there is no C3 model, or the device or the batch size cannot be used.
    """
    check_numbers(args, "batch_size")
    from transformers.utils import logging

    from c3_hf.pipeline import C3Pipeline

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return C3Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
