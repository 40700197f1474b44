"""`c3-hf restore`: the text of compressed contexts."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from .files import (
    STREAM,
    SUFFIX,
    Job,
    add_output_arguments,
    check_jobs,
    check_parent,
    context_path,
    is_folder_name,
    opened_for_writing,
    read_inputs,
)
from .loading import add_model_arguments, load_model
from .messages import Failures


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "restore",
        help="generate the text of a compressed context back",
        description="Restore the text of FILE.c3: to the byte if it was compressed with --exact, else as well as the "
        "model can. Says on stderr how many segments are exact. A file that fails does not keep the others from it.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE.c3", help="compressed contexts, directories (all below), or - for stdin"
    )
    add_output_arguments(
        parser,
        "the file to write, or a directory, made if its name ends with / or a directory is restored; the files below "
        "it are as they were when that was compressed (default: stdout)",
        "replace existing files",
    )
    parser.add_argument(
        "--strict", action="store_true", help="give nothing out, and fail, where the text is not exact"
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Restore every file; 1 if one of them could not be done."""
    failures = Failures(args)
    jobs = plan_jobs(args.files, args.output, args.force, failures)
    total = len(jobs) + failures.count
    if jobs:
        pipe = load_model(args)
    for job in jobs:
        with failures.noted(job.source):
            _restore(job, pipe, args)
    return failures.status(total)


def plan_jobs(names: list[str], output: str | None, force: bool, failures: Failures) -> list[Job]:
    """Which context becomes which file, checked before any work.

    Raises:
        ValueError: If there is no context, or an output cannot be as asked for.
    """
    tree = any(map(os.path.isdir, names))
    output = STREAM if output is None else output
    into_folder = output != STREAM and (tree or is_folder_name(output))
    if output != STREAM and len(names) > 1 and not into_folder:
        raise ValueError(
            f"`--output` must be an existing directory for several files, got {output!r}. Write {output + os.sep!r} "
            "to make it."
        )
    if tree and output != STREAM and os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"`--output` must be a directory for the contexts of a directory, {output} is a file.")
    jobs = []
    for source, place, _ in read_inputs(names, lambda name: name.endswith(SUFFIX), failures):
        # A file that is called nothing but the suffix keeps its name.
        place = place if place.name == SUFFIX else place.with_name(place.name.removesuffix(SUFFIX))
        target = str(Path(output) / place) if into_folder else output
        jobs.append(Job(source, target))
    if not jobs and not failures.count:
        raise ValueError(f"`FILE{SUFFIX}`: there is no compressed context below {', '.join(names)}.")
    if not into_folder:
        check_parent(output)
    return check_jobs(jobs, force=force)


def _restore(job: Job, pipe: Any, args: argparse.Namespace) -> None:
    from c3_hf.latents import CompressedContext

    with context_path(job.source) as path:
        context = CompressedContext.load(path)
        if not args.strict:
            with opened_for_writing(job.target) as file:
                exact = _write_restored(context, file, pipe, args.batch_size)
        else:
            # Whether all of it is exact is known behind the last segment: until then it goes nowhere.
            with tempfile.TemporaryFile() as held:
                exact = _write_restored(context, held, pipe, args.batch_size)
                if exact < len(context):
                    raise ValueError(
                        f"{exact} of {len(context)} segments exact, and with --strict nothing else is given out. "
                        "Compress with --exact, or restore without --strict."
                    )
                held.seek(0)
                with opened_for_writing(job.target) as file:
                    shutil.copyfileobj(held, file)
    print(f"{job.source}: {exact} of {len(context)} segments exact", file=sys.stderr)


def _write_restored(context: Any, file: IO[bytes], pipe: Any, batch_size: int) -> int:
    """Write the text, and give the number of exact segments."""
    exact = 0
    for data, is_exact in pipe.iter_restored(context, batch_size=batch_size, progress=True):
        file.write(data)
        exact += is_exact
    return exact
