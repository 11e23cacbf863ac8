"""What all commands share: exit statuses, the mistake of a user, and how a parser looks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

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


def require(what: str, packages: Sequence[str]) -> None:
    """Raise `UsageError` where `what` needs packages of the extra ``demo`` that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{what} needs packages that are not installed: {', '.join(missing)}\n"
            "  Install them: pip install 'wdhook[demo]'"
        )


def png(text: str) -> Path:
    """A path that can be written: found out before the training, not after it."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return path
