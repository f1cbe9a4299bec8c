"""The command line: `lightning-interp compare RUN RUN [...]` and `lightning-interp influence CHECKPOINT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_interp.cli.compare import add_compare_command
from lightning_interp.cli.influence import add_influence_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error that the user can fix is one line on standard error.

    Args:
        arguments: as typed after `lightning-interp`; those of this process when None.

    Returns:
        The exit status: 0, or 2 after an error.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        print(f"lightning-interp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-interp", description="What networks learned, after training.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_compare_command(commands)
    add_influence_command(commands)
    return parser
