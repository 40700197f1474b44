"""`c3-hf compress`: text files into compressed contexts."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .loading import add_model_arguments, load_model


SUFFIX = ".c3"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compress",
        help="compress text files into latents",
        description="Compress text into a file of latents that can be asked and restored. Killed and called again "
        "with the same words, it goes on where it was.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE", help="text files, directories (all files below), or - for stdin"
    )
    parser.add_argument(
        "-o",
        "--output",
        help="the file to write (- for stdout), or a directory for several inputs (default: FILE.c3 beside each)",
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
    """Compress every input; 1 if one of several failed."""
    jobs = list(plan_jobs(args.inputs, args.output, args.append))
    model, processor = load_model(args)
    if len(jobs) == 1:
        _compress(*jobs[0], model, processor, args)
        return 0
    failed = sum(not _compress_one_of_several(*job, model, processor, args) for job in jobs)
    if failed:
        print(f"c3-hf compress: {failed} of {len(jobs)} inputs failed", file=sys.stderr)
    return 1 if failed else 0


def plan_jobs(inputs: list[str], output: str | None, append: bool) -> Iterator[tuple[str, str]]:
    """Which file becomes which; "-" stands for stdin and stdout.

    Raises:
        ValueError: If stdin comes without `--output`, several inputs would become one file, or there is no input.
    """
    single = len(inputs) == 1 and not Path(inputs[0]).is_dir()
    if single:
        if inputs[0] == "-" and output is None:
            raise ValueError("`--output` must be given with stdin: a file, or - for stdout.")
        if output is None:
            output = inputs[0] + SUFFIX
        elif output != "-" and Path(output).is_dir():
            output = str(Path(output) / (Path(inputs[0]).name + SUFFIX))
        yield inputs[0], output
        return
    if "-" in inputs or output == "-" or append:
        raise ValueError("stdin, stdout and `--append` go with a single input file; give the inputs one by one.")
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"`--output` must be a directory for several inputs, {output} is a file.")
    found = False
    for given in map(Path, inputs):
        files = sorted(path for path in given.rglob("*") if path.is_file()) if given.is_dir() else [given]
        for file in files:
            if file.name.endswith((SUFFIX, SUFFIX + ".journal")):
                continue
            found = True
            relative = file.relative_to(given) if given.is_dir() else Path(file.name)
            target = (file.parent if output is None else Path(output) / relative.parent) / (file.name + SUFFIX)
            yield str(file), str(target)
    if not found:
        raise ValueError(f"`FILE`: there is no file below {', '.join(inputs)}.")


def _compress_one_of_several(source: str, target: str, model: Any, processor: Any, args: argparse.Namespace) -> bool:
    """Whether it went well; a file that cannot be compressed does not keep the others from it."""
    try:
        if _is_current(Path(target), Path(source), model, args):
            print(f"{target}: up to date", file=sys.stderr)
        else:
            _compress(source, target, model, processor, args)
    except (ValueError, OSError) as error:
        print(f"c3-hf compress: {source}: {error}", file=sys.stderr)
        return False
    return True


def _compress(source: str, target: str, model: Any, processor: Any, args: argparse.Namespace) -> None:
    import torch

    from c3_hf.latents import compress

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdout.c3" if target == "-" else Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        context = compress(
            sys.stdin.buffer if source == "-" else Path(source),
            model,
            processor,
            output=path,
            append=args.append,
            segment_length=args.segment_length,
            dtype=getattr(torch, args.dtype),
            verify=args.verify,
            exact=args.exact,
            target_fidelity=args.target_fidelity,
            exact_check=args.exact_check,
            batch_size=args.batch_size,
            progress=True,
        )
        print(f"{target}: {context!r}", file=sys.stderr)
        if target == "-":
            with path.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)


def _is_current(target: Path, source: Path, model: Any, args: argparse.Namespace) -> bool:
    """Whether `target` is what compressing the present `source` would give, so that a directory run can go on."""
    from c3_hf.latents import CompressedContext
    from c3_hf.latents.fingerprints import fingerprint_model

    if not target.exists() or target.with_name(target.name + ".journal").exists():
        return False
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    context = CompressedContext.load(target)
    header = context.header
    wants_margins = args.verify or args.target_fidelity is not None
    return (
        (header.text_sha256, header.model) == (digest.hexdigest(), fingerprint_model(model))
        and (context.is_exact, context.margins is not None) == (args.exact, wants_margins)
        and (header.target_fidelity, str(context.latents.dtype)) == (args.target_fidelity, f"torch.{args.dtype}")
        and args.segment_length in (None, header.segment_length)
    )
