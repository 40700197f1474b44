"""`c3-hf compress`: text files into compressed contexts."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from ..files import JOURNAL_SUFFIX, file_sha256, is_stream
from ..options import LATENT_DTYPES, CompressionOptions
from .files import (
    STREAM,
    SUFFIX,
    Job,
    add_output_arguments,
    check_jobs,
    is_context,
    is_folder_name,
    opened_for_writing,
    read_inputs,
)
from .loading import add_model_arguments, load_model
from .messages import Failures
from .parsing import CommandParser, as_typed
from .remote import Remote, add_server_argument


# Options of compressing that the command calls otherwise.
_FLAGS = {"exact_check": "--check"}
_TYPES = {"int": int, "float": float}


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
    add_output_arguments(
        parser,
        "the file to write (- for stdout), or a directory (with / at its end, or for several inputs) to make or to "
        "put FILE.c3 into (default: FILE.c3 beside each)",
        "replace an existing output that is no compressed context",
    )
    parser.add_argument("--append", action="store_true", help="add to an existing output instead of replacing it")
    add_model_arguments(parser)
    add_server_argument(parser, "compress on, and print the ids in", "output", "append", "force")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: CommandParser) -> None:
    """Add the fields of `CompressionOptions`: their names, defaults and docstring."""
    page = inspect.getdoc(CompressionOptions) or ""
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", page, flags=re.MULTILINE)
    words = {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}
    known = set(parser.typed.values())
    fields = [field for field in dataclasses.fields(CompressionOptions) if _flag(field.name) not in known]
    parser.typed.update((field.name, _flag(field.name)) for field in fields)
    for field in fields:
        kind, default = str(field.type).removesuffix(" | None"), field.default
        options: dict[str, Any] = {"type": _TYPES.get(kind), "metavar": kind.upper()}
        if kind == "bool":
            options = {"action": argparse.BooleanOptionalAction}
        elif field.name == "latent_dtype":
            options = {"choices": LATENT_DTYPES}
        # Python without docstrings (-OO) has no words.
        said = as_typed(words.get(field.name, ""), parser.typed).replace("`", "").rstrip(".")
        shown = "" if default in (None, False) else f" (default: {'on' if default is True else default})"
        # What is not given is left to the field's own default.
        shown = said[:1].lower() + said[1:] + shown
        parser.add_argument(_flag(field.name), default=argparse.SUPPRESS, help=shown, **options)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `CompressionOptions` that were given."""
    names = {field.name: _flag(field.name)[2:].replace("-", "_") for field in dataclasses.fields(CompressionOptions)}
    return {field: getattr(args, name) for field, name in names.items() if hasattr(args, name)}


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def run(args: argparse.Namespace) -> int:
    """Compress every input; 1 if one of them could not be done."""
    failures = Failures(args)
    if args.server is not None:
        return _compress_on_server(args, failures)
    jobs = plan_jobs(args.inputs, args.output, args.append, args.force, failures)
    total = len(jobs) + failures.count
    if jobs:
        pipe, options = load_model(args), options_of(args)
    for job in jobs:
        with failures.noted(job.source):
            if len(jobs) > 1 and _is_current(job, pipe, options):
                print(f"{job.target}: up to date", file=sys.stderr)
            else:
                _compress(job, pipe, options, args.append)
    return failures.status(total)


def _compress_on_server(args: argparse.Namespace, failures: Failures) -> int:
    """Send every input and print the id of its context; 1 if one of them could not be done."""
    options = {name: value for name, value in options_of(args).items() if name not in args.local}
    if "latent_dtype" in options:
        # The server's form has latents only.
        options["dtype"] = options.pop("latent_dtype")
    sources = [source for source, _, _ in read_inputs(args.inputs, lambda name: True, failures)]
    total = len(sources) + failures.count
    with Remote(args) as server:
        for source in sources:
            with failures.noted(source), _opened(source) as file:
                told = server.add(os.path.basename(source), file, options)
                print(f"{told['id']}  {source}", flush=True)
                print(f"{source}: {told['tokens']:,} tokens in {told['latents']:,} latents", file=sys.stderr)
    return failures.status(total)


def _opened(source: str) -> BinaryIO:
    # A pipe is read first: it has no length to announce.
    return io.BytesIO(sys.stdin.buffer.read()) if source == STREAM else open(source, "rb")


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
    return check_jobs(jobs, force=force, replaceable=is_context, beside=JOURNAL_SUFFIX)


def _compress(job: Job, pipe: Any, options: dict[str, Any], append: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        through = job.target == STREAM or is_stream(job.target)
        path = Path(folder) / f"stdout{SUFFIX}" if through else Path(job.target)
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
        source = sys.stdin.buffer if job.source == STREAM else Path(job.source)
        context = pipe.compress(source, output=path, append=append, progress=True, **options)
        print(f"{job.target}: {context!r}", file=sys.stderr)
        if through:
            with path.open("rb") as file, opened_for_writing(job.target) as target:
                shutil.copyfileobj(file, target)


def _is_current(job: Job, pipe: Any, options: dict[str, Any]) -> bool:
    """Whether the target is what compressing the present source would give, so that a directory run can go on."""
    from c3_hf.latents import CompressedContext

    if not (os.path.isfile(job.source) and os.path.isfile(job.target)) or os.path.exists(job.target + JOURNAL_SUFFIX):
        return False
    try:
        context = CompressedContext.load(job.target)
    except ValueError as error:
        print(f"{job.target}: made anew ({error})", file=sys.stderr)
        return False
    return pipe.would_make(context, file_sha256(job.source), **options)
