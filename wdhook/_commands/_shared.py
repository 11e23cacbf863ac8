"""What all commands share: exit statuses, the mistake of a user, and how a parser looks."""

from __future__ import annotations

import argparse
from collections.abc import Callable

FOUND = 1  # the command did its work, and found what it looks for: a problem, a difference
BAD_USAGE = 2  # argparse's own exit status for a mistake of the user

PROGRAM = "python -m wdhook"

Commands = argparse._SubParsersAction  # its parsers are `argparse.ArgumentParser`


class UsageError(Exception):
    """A mistake of the user that is found after the arguments were parsed: printed without a traceback, status 2."""


def add_command(
    commands: Commands[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    *,
    name: str,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add the parser of one command, which leads to `run`; the texts keep their line breaks."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, command=name)
    return parser


def first_line(error: BaseException) -> str:
    """The first line of the message of an error."""
    return (str(error).strip().splitlines() or ["(no message)"])[0]
