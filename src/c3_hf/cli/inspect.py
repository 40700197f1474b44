"""`c3-hf inspect`: what is in a compressed context."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from .files import Job, check_jobs, check_parent, context_path, is_folder_name, opened_for_writing
from .loading import add_model_arguments, load_model


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="show segments, ratio, fidelity and sizes of a compressed context",
        description="Show what a compressed context holds. With --text, show that text coloured by what comes back.",
    )
    parser.add_argument("file", metavar="FILE.c3", help="a compressed context, or - for stdin")
    parser.add_argument("--segments", action="store_true", help="one line a segment")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--text", metavar="FILE", help="the text it was made from: colour it (measured if need be)")
    parser.add_argument("--html", metavar="FILE", help="with --text, write a page instead of colouring the terminal")
    parser.add_argument("--force", action="store_true", help="with --html, replace an existing file")
    # What is written is checked as every output is.
    parser.typed["output"] = "--html"
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the file says of itself."""
    from c3_hf.latents import CompressedContext

    if args.html and not args.text:
        raise ValueError("`--html` needs `--text`, the text the context was made from.")
    if args.html:
        if is_folder_name(args.html):
            raise ValueError(f"`--html`: {args.html} is a folder. Give the name of the page.")
        check_parent(args.html)
        check_jobs([Job(args.file, args.html)], force=args.force, reads=[args.text])
    with context_path(args.file) as path:
        context = CompressedContext.load(path)
        context.check()
        if args.text:
            _show_heat(context, args)
            return 0
        summary = summarise(context)
        if args.json:
            print(json.dumps({**summary, "segments": segment_rows(context)}, indent=2))
            return 0
        _print_summary(summary)
        if args.segments:
            _print_segments(segment_rows(context))
    return 0


def summarise(context: Any) -> dict[str, Any]:
    """Numbers about the whole context; sizes in bytes."""
    fidelity = context.fidelity
    summary: dict[str, Any] = {
        "header": dataclasses.asdict(context.header),
        "num_segments": len(context),
        "num_tokens": context.num_tokens,
        "num_characters": context.num_characters,
        "text_bytes": int(context.byte_offsets[-1] - context.byte_offsets[0]),
        "num_latents": context.total_latents,
        "compression_ratio": context.compression_ratio,
        "sizes": {name: tensor.nbytes for name, tensor in context.tensors().items()},
    }
    if fidelity is not None:
        target = context.header.target_fidelity
        summary["fidelity"] = {
            "token_accuracy": context.token_accuracy,
            "exact_segments": sum(segment.is_exact for segment in fidelity),
            "certain_tokens": sum(segment.exact_prefix for segment in fidelity),
            "worst_segment": min((segment.token_accuracy for segment in fidelity), default=None),
            "expected_precision": sum(context.expected_precision()) / max(1, len(fidelity)),
            "below_target": None if target is None else sum(segment.token_accuracy < target for segment in fidelity),
        }
    if context.is_exact:
        records = [context.segment_residual(index) for index in range(len(context))]
        summary["residual"] = {
            "bits_a_token": 8 * context.residual.nbytes / max(1, context.num_tokens),
            "corrected_tokens": sum(len(record.corrections) for record in records),
            "stored_segments": sum(record.stored is not None for record in records),
        }
    return summary


def segment_rows(context: Any) -> list[dict[str, Any]]:
    """One row a segment: where it is, and what comes back."""
    rows: list[dict[str, Any]] = []
    fidelity = context.fidelity
    for index in range(len(context)):
        row: dict[str, Any] = {"segment": index}
        for unit in ("char", "byte", "token"):
            start, end = getattr(context, f"{unit}_offsets")[index : index + 2].tolist()
            row[f"{unit}s"] = [start, end]
        if fidelity is not None:
            row["token_accuracy"] = fidelity[index].token_accuracy
            row["first_error"] = fidelity[index].first_error
        if context.is_exact:
            record = context.segment_residual(index)
            row["stored"] = record.stored is not None
            row["corrections"] = len(record.corrections)
        rows.append(row)
    return rows


def _print_summary(summary: dict[str, Any]) -> None:
    header = summary["header"]
    print(f"source       {header['source'] or '-'}  sha256 {header['text_sha256'] or '-'}")
    print(f"model        {header['model']}")
    print(f"tokenizer    {header['tokenizer']}")
    print(f"written by   {header['writer']}")
    print(
        f"text         {summary['num_characters']:,} characters, {summary['text_bytes']:,} bytes, "
        f"{summary['num_tokens']:,} tokens"
    )
    print(
        f"latents      {summary['num_latents']:,} in {summary['num_segments']:,} segments of up to "
        f"{header['segment_length']} tokens: {summary['compression_ratio']:.1f} tokens a latent"
    )
    sizes = summary["sizes"]
    listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    print(f"sizes        {sum(sizes.values()):,} bytes: {listed}")
    fidelity = summary.get("fidelity")
    if fidelity is None:
        print("fidelity     not measured (compress with --verify)")
    else:
        worst = fidelity["worst_segment"]
        print(
            f"fidelity     token accuracy {fidelity['token_accuracy']:.4f}, worst segment "
            f"{'-' if worst is None else f'{worst:.4f}'}; certain: {fidelity['exact_segments']:,} segments whole, "
            f"{fidelity['certain_tokens']:,} tokens; expected free-running precision "
            f"{fidelity['expected_precision']:.3f}"
        )
        if fidelity["below_target"]:
            print(f"             {fidelity['below_target']:,} segments miss the target {header['target_fidelity']}")
    residual = summary.get("residual")
    if residual is not None:
        print(
            f"byte-exact   {residual['bits_a_token']:.2f} bits a token, {residual['corrected_tokens']:,} tokens "
            f"corrected, {residual['stored_segments']:,} segments stored as bytes"
        )


def _print_segments(rows: list[dict[str, Any]]) -> None:
    print("\nsegment  characters             tokens  accuracy  first error")
    for row in rows:
        accuracy = f"{row['token_accuracy']:.4f}" if "token_accuracy" in row else "-"
        first = "-" if row.get("first_error") is None else row["first_error"]
        start, end = row["chars"]
        tokens = row["tokens"][1] - row["tokens"][0]
        print(f"{row['segment']:7d}  {start:>10,}-{end:<10,}  {tokens:6d}  {accuracy:>8}  {first}")


def _show_heat(context: Any, args: argparse.Namespace) -> None:
    from c3_hf.latents.rendering import render_html, render_terminal

    pipe = load_model(args)
    source = Path(args.text)
    if context.margins is None:
        context = pipe.verify(context, source, batch_size=args.batch_size, progress=True)
    if args.html:
        with opened_for_writing(args.html) as file:
            for part in render_html(context, source, pipe.processor):
                file.write(part.encode())
        return
    for part in render_terminal(context, source, pipe.processor):
        sys.stdout.write(part)
    sys.stdout.write("\n")
