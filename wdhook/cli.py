"""The command line: ``wdhook <command>``, or ``python -m wdhook <command>``."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from . import __version__
from ._base.errors import WdhookError
from ._base.terminal import folded_lines
from ._base.text import did_you_mean, near
from ._commands import audit, demo, doctor, inspect, optimizers
from ._commands.help import HelpFormatter
from ._commands.shared import (
    BAD_USAGE,
    CLOSED_PIPE,
    INTERRUPTED,
    MODULE,
    UsageError,
    program,
)

_DESCRIPTION = (
    "Weight decay taken out of the optimizer: once per step, on weights and nothing else."
)

_EXAMPLES = """\
examples:
  python -m wdhook inspect torchvision.models:resnet50   which parameters are decayed, and why
  python -m wdhook audit my_file.py:build --input 'randn(2, 3, 32, 32)'
                                                         how the model uses each parameter
  python -m wdhook doctor train.py:make                  what is wrong with the decay of a step
  python -m wdhook optimizers Lion                       what was measured with your optimizer
  python -m wdhook demo                                  four ways of decaying, on real digits
  python -m wdhook demo --help                           what the demo shows, and its options
"""

_COMMANDS = (inspect, audit, doctor, optimizers, demo)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        argv: the arguments, without the program; None takes those of the process.

    Returns:
        0: nothing was found. 1: a problem or a difference was found. 2: the command could not run.
        130: Ctrl-C. 141: the reader of stdout has closed the pipe.

    Raises:
        SystemExit: (argparse) after ``--help``, and with status 2 for arguments without a meaning.
    """
    with _printable():
        arguments = _parsed(sys.argv[1:] if argv is None else argv)
        try:
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        except (UsageError, WdhookError) as error:
            said = f"{program()} {arguments.command}: error: {error}"
            print(*folded_lines(said, sys.stderr), sep="\n", file=sys.stderr)
            return BAD_USAGE
        except KeyboardInterrupt:
            print(f"\n{program()} {arguments.command}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # The reader is gone. Python would complain when it closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED_PIPE
        return status


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, and answer slips with near commands and options."""
    parser, commands = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(BAD_USAGE)
    known = commands.choices
    if argv[0] not in known and not argv[0].startswith("-"):
        parser.error(
            f"invalid choice: {argv[0]!r} (choose from {', '.join(known)})"
            f"{did_you_mean(argv[0], known)}"
        )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        mine: argparse.ArgumentParser = known[arguments.command]
        first = next((word for word in unknown if word.startswith("--")), "")
        advice = _about_option(first.partition("=")[0], arguments.command, known)
        mine.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    return arguments


def _about_option(option: str, command: str, known: Mapping[str, argparse.ArgumentParser]) -> str:
    """Name the commands that have an option, or else near options of this command."""
    options = {}
    for name, parser in known.items():
        options[name] = {o[2:] for o in re.findall(r"--[\w-]+", parser.format_help())}
    owners = [name for name in known if option[2:] in options[name]]
    if owners:
        return f". {option} is an option of: {', '.join(owners)}"
    words = near(option[2:], options[command])
    return f". Did you mean {' or '.join(f'--{word}' for word in words)}?" if words else ""


def _parser() -> tuple[
    argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]
]:
    parser = argparse.ArgumentParser(
        prog=program(),
        description=_DESCRIPTION,
        epilog=_EXAMPLES.replace(MODULE, program()),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wdhook {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for command in _COMMANDS:
        command.add(commands)
    # A usage line that lists the commands, where argparse would write "<command>".
    parser.usage = f"{program()} [-h] [--version] {{{','.join(commands.choices)}}} ..."
    return parser, commands


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
