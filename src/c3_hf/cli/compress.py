"""`c3-hf compress`: text files into compressed contexts."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .files import (
    STREAM,
    SUFFIX,
    Job,
    check_jobs,
    is_context,
    is_folder_name,
    opened_for_writing,
    read_inputs,
)
from .loading import add_model_arguments, load_model
from .messages import Failures, stdin_bytes


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compress",
        help="compress text files into latents",
        description="Compress text into a file of latents that can be asked and restored. Killed and called again "
        "with the same words, it goes on where it was; of several inputs it passes over those whose output is up to "
        "date, every option considered. Of files that are there it replaces compressed contexts only.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE", help="text files, directories (all files below), or - for stdin"
    )
    parser.add_argument(
        "-o",
        "--output",
        help="the file to write (- for stdout), or a directory (with / at its end, or for several inputs) to make or "
        "to put FILE.c3 into (default: FILE.c3 beside each)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing output that is no compressed context"
    )
    parser.add_argument("--append", action="store_true", help="add to an existing output instead of replacing it")
    parser.add_argument("--verify", action="store_true", help="measure and store what each segment brings back")
    parser.add_argument("--exact", action="store_true", help="byte-exact: store corrections, and check by restoring")
    parser.add_argument(
        "--no-check",
        dest="exact_check",
        action="store_false",
        help="with --exact: do not restore now to see whether all comes back (restoring checks in any case)",
    )
    parser.add_argument(
        "--exact-margin",
        type=float,
        metavar="LOGITS",
        help="with --exact: correct right tokens too that are closer than this to another (default: 0.01 in float32, "
        "0.5 in bfloat16, 0.1 in float16)",
    )
    parser.add_argument(
        "--target-fidelity", type=float, metavar="SHARE", help="token accuracy each segment shall reach, such as 0.999"
    )
    parser.add_argument(
        "--segment-length",
        type=int,
        metavar="TOKENS",
        help="most tokens of a segment (default: what the model was made for, else 20 for each latent)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "int8"),
        help="how latents are stored (default: %(default)s)",
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compress every input; 1 if one of them could not be done."""
    failures = Failures("compress")
    jobs = plan_jobs(args.inputs, args.output, args.append, args.force, failures)
    total = len(jobs) + failures.count
    if jobs:
        model, processor = load_model(args)
    for job in jobs:
        with failures.noted(job.source):
            if len(jobs) > 1 and _is_current(job, model, processor, args):
                print(f"{job.target}: up to date", file=sys.stderr)
            else:
                _compress(job, model, processor, args)
    return failures.status(total)


def plan_jobs(inputs: list[str], output: str | None, append: bool, force: bool, failures: Failures) -> list[Job]:
    """Which file becomes which, checked before any work.

    Raises:
        ValueError: If stdin comes without `--output`, there is no input, or an output cannot be as asked for.
    """
    several = len(inputs) > 1 or os.path.isdir(inputs[0])
    if several and (STREAM in inputs or output == STREAM or append):
        raise ValueError("stdin, stdout and `--append` go with a single input file; give the inputs one by one.")
    if not several and inputs[0] == STREAM and (output is None or (output != STREAM and is_folder_name(output))):
        raise ValueError("`--output` must be given with stdin: a file, or - for stdout.")
    if several and output is not None and os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"`--output` must be a directory for several inputs, {output} is a file.")
    into_folder = output is not None and output != STREAM and (several or is_folder_name(output))
    jobs = []
    for source, place, below in read_inputs(inputs, lambda name: not name.endswith(SUFFIX), failures):
        if not below and place.name.endswith(SUFFIX):
            failures.add(source, f"its name says that it is compressed already; rename it if it is text ({SUFFIX})")
            continue
        if output is None:
            target = source + SUFFIX
        elif into_folder:
            target = str(Path(output) / place) + SUFFIX
        else:
            target = output
        jobs.append(Job(source, target))
    if not jobs and not failures.count:
        raise ValueError(f"`FILE`: there is no file below {', '.join(inputs)}.")
    return check_jobs(jobs, force=force, replaceable=is_context, beside=".journal")


def _compress(job: Job, model: Any, processor: Any, args: argparse.Namespace) -> None:
    from c3_hf.files import is_stream
    from c3_hf.pipeline import compress

    with tempfile.TemporaryDirectory() as folder:
        through = job.target == STREAM or is_stream(job.target)
        path = Path(folder) / f"stdout{SUFFIX}" if through else Path(job.target)
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
        context = compress(
            stdin_bytes() if job.source == STREAM else Path(job.source),
            model,
            processor,
            output=path,
            append=args.append,
            progress=True,
            **_options(args),
        )
        print(f"{job.target}: {context!r}", file=sys.stderr)
        if through:
            with path.open("rb") as file, opened_for_writing(job.target) as target:
                shutil.copyfileobj(file, target)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `CompressionOptions` that are arguments of the command."""
    import torch

    from c3_hf.latents import CompressionOptions

    names = [field.name for field in dataclasses.fields(CompressionOptions)]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {**options, "dtype": getattr(torch, args.dtype)}


def _is_current(job: Job, model: Any, processor: Any, args: argparse.Namespace) -> bool:
    """Whether the target is what compressing the present source would give, so that a directory run can go on."""
    from c3_hf.latents import CompressedContext
    from c3_hf.pipeline import C3Pipeline

    if not (os.path.isfile(job.source) and os.path.isfile(job.target)) or os.path.exists(job.target + ".journal"):
        return False
    try:
        context = CompressedContext.load(job.target)
    except ValueError as error:
        print(f"{job.target}: made anew ({error})", file=sys.stderr)
        return False
    digest = hashlib.sha256()
    with open(job.source, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return C3Pipeline(model, processor).would_make(context, digest.hexdigest(), **_options(args))
