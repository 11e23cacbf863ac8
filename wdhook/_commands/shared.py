"""Exit statuses, `UsageError` and the set-up of parsers, shared by all commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from .._base.text import did_you_mean
from .help import HelpFormatter

FOUND = 1  # the command worked, and found a problem or a difference
BAD_USAGE = 2  # argparse's own exit status for a mistake of the user
INTERRUPTED = 130  # a shell's status of a program that Ctrl-C ended: 128 + SIGINT
CLOSED_PIPE = 141  # a shell's status of a program that SIGPIPE ended, as before `| head`

MODULE = "python -m wdhook"
SCRIPT = "wdhook"

PICTURES = (".png", ".svg", ".pdf")

# What pip calls a package that is imported by another name.
_ON_PYPI: Mapping[str, str] = {"sklearn": "scikit-learn"}

Commands = argparse._SubParsersAction  # its parsers are `argparse.ArgumentParser`


class UsageError(Exception):
    """A mistake of the user found after parsing: printed without a traceback, status 2."""


def program() -> str:
    """Name this program as the user called it: ``wdhook`` or ``python -m wdhook``."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else MODULE


def add_command(
    commands: Commands[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    *,
    name: str,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add the parser of a command, and let it lead to `run`."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples.replace(MODULE, program()),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, command=name)
    return parser


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Make a `type=` of argparse for `choices`, with the nearest choice in its error.

    Raises:
        argparse.ArgumentTypeError: (of the function returned) the text is none of `choices`.
    """

    def choice(text: str) -> str:
        if text in choices:
            return text
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(choices)})"
            f"{did_you_mean(text, choices)}"
        )

    return choice


def whole(text: str) -> int:
    """A `type=` of argparse for whole numbers above 0.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    number = int(text.replace("_", "")) if text.replace("_", "").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


def braced(choices: Iterable[str]) -> str:
    """Write choices like argparse in a usage line: ``{a,b}``."""
    return f"{{{','.join(choices)}}}"


def first_line(error: BaseException) -> str:
    """The first line of the message of an error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, in the singular for 1: "1 tensor", "0 tensors"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun."""
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def say(arguments: argparse.Namespace, sentence: str) -> None:
    """Print a remark to stderr; stdout holds the answer alone."""
    print(f"{program()} {arguments.command}: {sentence}", file=sys.stderr)


def require(what: str, packages: Sequence[str]) -> None:
    """Check for optional packages.

    Raises:
        UsageError: one is missing; `what` is the subject of the sentence.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return
    names = " ".join(_ON_PYPI.get(name, name) for name in missing)
    raise UsageError(
        f"{what} needs packages that are not installed: {', '.join(missing)}\n"
        f"  Install them: pip install {names}"
    )


def picture(text: str) -> Path:
    """A `type=` of argparse for pictures: checks suffix and place before any work.

    Raises:
        argparse.ArgumentTypeError: the suffix is none of `PICTURES`, or the place is not writable.
    """
    path = Path(text)
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be the name of a {', '.join(PICTURES[:-1])} or {PICTURES[-1]} file, got {text!r}"
        )
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return path
