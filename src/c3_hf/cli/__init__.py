"""The command `c3-hf`: one subcommand a module, each loaded with the standard library alone until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import ask, compress, convert, demo, evaluate, export, inspect, new, report, restore, serve, train
from .messages import FAILED, INTERRUPTED, abandon_stdout, expected_errors, one_line, prepare_streams, say
from .parsing import CommandParser


# In the order in which --help lists them.
COMMANDS = (demo, compress, restore, inspect, ask, convert, export, new, train, evaluate, report, serve)
# The extra of setup.cfg that a command needs.
EXTRAS = {"demo": "demo", "train": "train", "evaluate": "eval", "report": "eval", "serve": "serve"}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand on it."""
    parser = argparse.ArgumentParser(
        prog="c3-hf", description="Context Cascade Compression: long text in a few latents, and back."
    )
    parser.add_argument("--version", action="version", version=f"c3-hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=CommandParser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; without one, say which there are.

    Args:
        arguments: The words after `c3-hf`; those of the process when None.

    Returns:
        The exit status: 0 on success, 1 when the command failed on what it was given, 130 when interrupted.
        argparse itself exits with 2 on words it cannot read.
    """
    prepare_streams()
    parsed = None
    try:
        parser = build_parser()
        parsed = parser.parse_args(arguments)
        if parsed.command is None:
            parser.print_help()
            return 0
        status = parsed.run(parsed)
        # What cannot be written shall not be found out when Python ends, behind a status of success.
        sys.stdout.flush()
        return status
    except expected_errors() as error:
        say(parsed, one_line(error))
        if isinstance(error, ImportError) and parsed is not None and parsed.command in EXTRAS:
            print(f'In a clone of the repository: pip install ".[{EXTRAS[parsed.command]}]"', file=sys.stderr)
        if isinstance(error, OSError):
            abandon_stdout()
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
