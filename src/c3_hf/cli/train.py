"""`c3-hf train`: train a C3 model by a recipe."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a C3 model by a YAML recipe",
        description="Train a C3 model by a YAML recipe (examples/recipes). Any field of the recipe can be overridden: "
        "--max_steps 100 --data_dir texts. A run that was interrupted goes on from its last checkpoint.",
    )
    parser.add_argument("recipe", help="YAML file, see docs/training.md")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="recipe fields to override"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and lay a card beside the weights."""
    from ..conversion.card import write_model_card
    from ..modeling.configuration_c3 import C3Config
    from ..training.train import main

    folder = main([args.recipe, *args.overrides])
    if folder is not None:
        write_model_card(C3Config.from_pretrained(folder), folder, folder.name)
    return 0
