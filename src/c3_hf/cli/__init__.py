"""The command `c3-hf`: one subcommand a module, each loaded with the standard library alone until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import ask, compress, convert, demo, evaluate, export, inspect, new, report, restore, train


# In the order in which --help lists them.
COMMANDS = (demo, compress, restore, inspect, ask, convert, export, new, train, evaluate, report)
# The extra of setup.cfg that a command needs.
EXTRAS = {"train": "train", "evaluate": "eval", "report": "eval"}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand on it."""
    parser = argparse.ArgumentParser(
        prog="c3-hf", description="Context Cascade Compression: long text in a few latents, and back."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `c3-hf`; those of the process when None.

    Returns:
        The exit status: 0 on success, 1 when the command failed on what it was given, 130 when interrupted.
        argparse itself exits with 2 on words it cannot read.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        print(f"c3-hf {parsed.command}: {error}", file=sys.stderr)
        if isinstance(error, ImportError) and parsed.command in EXTRAS:
            print(f'In a clone of the repository: pip install ".[{EXTRAS[parsed.command]}]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
