"""`c3-hf export`: a C3 model in the original's layout, or one half of it as a stock causal language model."""

from __future__ import annotations

import argparse

from ..files import check_new_folder
from .loading import add_hub_arguments, hub_arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("export", help="write a model in the original's layout, or one half of it")
    parser.add_argument("model", help="folder or Hub id of a C3 model")
    parser.add_argument("output", help="folder to make; it appears complete or not at all")
    parser.add_argument(
        "--layout",
        required=True,
        choices=("original", "decoder", "encoder"),
        help="the released layout, or one half as a stock causal language model",
    )
    add_hub_arguments(parser)
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and name the files written."""
    output = check_new_folder(args.output)

    from c3_hf.conversion.export import export

    files = export(args.model, output, args.layout, max_shard_size=args.max_shard_size, **hub_arguments(args))
    print(f"{args.output} ({args.layout}): {', '.join(files)}")
    if args.layout == "original":
        print(
            "  for the original's code, copy modeling_C3.py and tokenization_qwen.py of its repository into the folder"
        )
    return 0
