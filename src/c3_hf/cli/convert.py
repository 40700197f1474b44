"""`c3-hf convert`: a checkpoint in the released layout becomes one ordinary Hub repository."""

from __future__ import annotations

import argparse

from ..files import check_new_folder
from .loading import add_dtype_argument, add_hub_arguments, hub_arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("convert", help="make a transformers model of the released checkpoint")
    parser.add_argument("source", help="folder or Hub id of a checkpoint in the released layout")
    parser.add_argument("output", help="folder to make; it appears complete or not at all")
    add_hub_arguments(parser)
    add_dtype_argument(parser, None, ": cast them (default: keep the stored types)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: %(default)s)")
    parser.add_argument("--base-model", action="append", default=[], help="Hub id for the model card; may be repeated")
    parser.add_argument("--verify", action="store_true", help="reload the output and compare it with the source")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say what was done."""
    output = check_new_folder(args.output)

    import torch

    from c3_hf.conversion.convert_c3_to_hf import convert

    record = convert(
        args.source,
        output,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard_size=args.max_shard_size,
        base_models=args.base_model,
        verify=args.verify,
        **hub_arguments(args),
    )
    print(f"{args.output}: {len(record['tensors'])} tensors, {len(record['dropped'])} left out")
    for drop in record["dropped"]:
        print(f"  left out {drop['tensor']}: {drop['reason']}")
    if not record["has_processor"]:
        print("  the source has no tokenizer, so the model has no processor")
    if record["verification"]:
        forward = record["verification"]["forward"]
        print(f"  verified: {record['verification']['tensors_equal']} tensors equal the source's, byte for byte")
        print(
            f"  verified: logits differ by at most {forward['max_difference']:.3g} from an independent computation "
            f"({len(forward['samples'])} samples, {forward['dtype']}, largest logit {forward['max_logit']:.3g})"
        )
    return 0
