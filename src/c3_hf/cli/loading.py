"""What the commands on compressed contexts share: which model, and how it is loaded."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .messages import one_line


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--model-dtype`, `--device` and `--batch-size`."""
    parser.add_argument("--model", help="a C3 model, folder or Hub id (default: the bundled c3-tiny, offline)")
    parser.add_argument(
        "--model-dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="the dtype to compute in; a byte-exact file wants the one it was made with (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="segments in one batch (default: %(default)s)")


def add_context_arguments(parser: argparse.ArgumentParser, names: str) -> None:
    """Add the compressed contexts to read, `files`, with `names` as their help, and the model's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILE.c3", help=names)
    add_model_arguments(parser)


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if one of these arguments is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")


def check_device(name: str) -> str:
    """`name`, if torch can compute there.

    Raises:
        ValueError: If it is no device, or one that this machine or this torch has not.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        usable = device.type != "meta"
        reason = "it holds no values"
    except (RuntimeError, AssertionError) as error:
        usable, reason = False, one_line(error).split(". ")[0].split("; ")[0]
    if not usable:
        raise ValueError(
            f"`--device` {name!r} cannot be used here ({reason}). Give cpu, or a device this machine has."
        )
    return name


def check_model(path: str) -> None:
    """Raise ValueError if `path` holds no C3 model; only its configuration is looked at."""
    from transformers import AutoConfig

    # Code from the Hub is never run for this: C3's own is here.
    config = _loaded(path, AutoConfig, trust_remote_code=False)
    if config.model_type != "c3":
        raise ValueError(
            f"`--model` {path} is a model of type {config.model_type!r}, not a C3 model. Give one, or make one of two "
            "language models with `c3-hf new`."
        )


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and processor that the arguments ask for.

    Raises:
        ValueError: If there is no C3 model, or the device or the batch size cannot be used.
    """
    check_numbers(args, "batch_size")
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils import logging

    import c3_hf

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    path = args.model or c3_hf.tiny_model_path()
    device = check_device(args.device)
    check_model(path)
    model = _loaded(path, AutoModelForCausalLM, dtype=getattr(torch, args.model_dtype))
    return model.to(device).eval(), _loaded(path, AutoProcessor)


def _loaded(path: str, auto_class: Any, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"`--model` {path}: no C3 model can be loaded from there ({one_line(error)[:300]}). Give the folder or "
            "the Hub id of one."
        ) from error
