"""The command line: ``python -m wdhook <command>``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import __version__
from ._base.errors import WdhookError
from ._commands import audit, demo, doctor, inspect
from ._commands.shared import BAD_USAGE, PROGRAM, UsageError

_DESCRIPTION = (
    "Weight decay taken out of the optimizer: once per step, on weights and nothing else."
)

_EXAMPLES = """\
examples:
  python -m wdhook inspect torchvision.models:resnet50   which parameters are decayed, and why
  python -m wdhook audit my_file.py:build --input 'randn(2, 3, 32, 32)'
                                                         what the model really does with each parameter
  python -m wdhook doctor train.py:make                  what is wrong with the decay of a training step
  python -m wdhook demo                                  train on real digits, compare four ways of decaying
  python -m wdhook demo --help                           what the demo shows, and its options
"""

_COMMANDS = (inspect, audit, doctor, demo)  # in the order of the help; each has `add` and `run`
_CLOSED_PIPE = (
    141  # what a shell reports of a program that SIGPIPE ended, as `head` does to its neighbour
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 well, 1 something was found, 2 bad usage.

    Args:
        argv: the arguments, without the program; None takes those of the process.

    Raises:
        SystemExit: (argparse) after ``--help``, and with status 2 for arguments that have no meaning.
    """
    with _printable():
        arguments = _parser().parse_args(argv)
        try:
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        except (UsageError, WdhookError) as error:
            print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
            return BAD_USAGE
        except BrokenPipeError:
            # Nobody reads on. Python would complain when it closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _CLOSED_PIPE
        return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wdhook {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for command in _COMMANDS:
        command.add(commands)
    # Whoever gives no command sees which there are.
    parser.usage = f"{PROGRAM} [-h] [--version] {{{','.join(commands.choices)}}} ..."
    return parser


@contextmanager
def _printable() -> Iterator[None]:
    """Print "?" for a λ that the terminal's encoding lacks, where Python would raise."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [s.errors for s in streams]
    for stream in streams:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)
