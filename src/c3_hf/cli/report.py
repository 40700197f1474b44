"""`c3-hf report`: tables, plots and receipts of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import check_run_folder
from .loading import check_numbers


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `report` and its arguments to the subcommands of `c3-hf`."""
    parser = subparsers.add_parser(
        "report",
        help="tables, plots and receipts of runs of `evaluate`",
        description=(
            "Write report.md, its PNG plots and receipts.html (the worst items as coloured differences) from one or "
            "more run folders. The first run is the one whose kinds and receipts are shown."
        ),
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="output folders of `c3-hf evaluate`")
    parser.add_argument("--output", metavar="DIR", help="folder of the report (default: the first run's)")
    parser.add_argument("--receipts", type=int, default=10, help="number of worst items shown (default: 10)")
    parser.add_argument("--force", action="store_true", help="replace a report.md that is none of this command's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is."""
    check_numbers(args, "receipts")
    output = Path(args.output or args.runs[0])
    check_run_folder(str(output))
    page = output / "report.md"
    if page.is_file() and not args.force and not page.read_bytes().startswith(b"# Evaluation report\n"):
        raise ValueError(f"`--output`: {page} exists and is no report. Give another folder, or --force to replace it.")

    from c3_hf.evaluation.report import write_report

    runs = [Path(folder) for folder in args.runs]
    print(write_report(runs, output, args.receipts))
    return 0
