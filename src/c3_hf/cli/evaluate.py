"""`c3-hf evaluate`: measure a checkpoint, or a baseline on its decoder, over tasks."""

from __future__ import annotations

import argparse

from .files import check_run_folder
from .loading import add_dtype_argument


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate` and its arguments to the subcommands of `c3-hf`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure restoring and answering over tasks",
        description=(
            "Run one system over tasks. The folder gets config.json first, one JSON line an item as it finishes, and "
            "summary.json last; started again with the same arguments, the run goes on where it was."
        ),
    )
    parser.add_argument("--model", help="a C3 model folder or Hub id (default: the bundled c3-tiny)")
    parser.add_argument("--system", default="c3", help="what is measured; a wrong name lists them (default: c3)")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-dir", help="folder with the tasks' data files, searched to any depth")
    data.add_argument(
        "--data-file",
        metavar="FILE",
        help='texts of your own: a JSON Lines file with {"text": …} a line, or questions',
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="with --data-dir: task names; a wrong one lists them (default: all)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--limit", type=int, help="most texts or questions of a task, evenly spaced over it (default: all)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="texts computed at once (default: 16)")
    parser.add_argument(
        "--segment-tokens",
        type=int,
        help="tokens of a segment of long text (default: the model's own, or 20 a latent)",
    )
    parser.add_argument(
        "--cut", action="store_true", help="restore texts longer than a segment in segments (default: in one block)"
    )
    parser.add_argument("--max-new-tokens", type=int, help="limit of a restored segment (default: from its length)")
    parser.add_argument("--answer-tokens", type=int, default=32, help="limit of an answer (default: 32)")
    add_dtype_argument(parser, "float32")
    parser.add_argument("--device", default="auto", help="torch device (default: what accelerate gives the process)")
    parser.add_argument("--system-model", help="weights of a system that brings its own (llmlingua2, deepseek_ocr)")
    parser.add_argument("--font", help="TrueType file for systems that draw the text")
    parser.add_argument(
        "--hash-only",
        metavar="PATTERN",
        help="items whose id or source this regular expression finds are recorded with hashes in place of texts",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="record from a checkout that differs from its commit (default: refuse, no one could get that code back)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the tasks and print one line for each."""
    check_run_folder(args.output)

    from pathlib import Path

    from c3_hf import tiny_model_path
    from c3_hf.evaluation import catalogue
    from c3_hf.evaluation.run import RunSettings, run

    own = ("own_texts", "own_questions")
    if args.data_file:
        if args.tasks:
            raise ValueError("`--tasks` goes with `--data-dir`: of a file of your own, every line is run.")
        tasks = list(own)
    elif args.tasks in (None, ["all"]):
        tasks = [name for name in catalogue.names("tasks") if name not in own]
    else:
        tasks = args.tasks
    settings = RunSettings(
        model=args.model or tiny_model_path(),
        tasks=tuple(tasks),
        **{name: getattr(args, name) for name in RunSettings.__dataclass_fields__ if name not in ("model", "tasks")},
    )
    data = Path(args.data_file or args.data_dir)
    summary = run(settings, data, Path(args.output), args.allow_changes)
    if summary.get("skipped"):
        print(f"{args.system} is skipped: {summary['skipped']}")
    for task, groups in summary.get("metrics", {}).items():
        print(_line(task, groups["all"]))
    return 0


def _line(task: str, means: dict) -> str:
    shown = ("char_precision", "fox_precision", "exact_match", "best_subspan_match", "contains_answer")
    values = "  ".join(f"{name} {means[name]:.4f}" for name in shown if name in means)
    ratios = f"{means['compression_ratio']:6.1f}x, {means['characters_a_slot']:.1f} characters a slot"
    return f"{task:16s} {means['items']:4d} items  {ratios}  {values}"
