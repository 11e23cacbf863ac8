"""The command line: ``python -m wdhook <command>``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from . import __version__

BAD_USAGE = 2  # argparse's own exit status for a mistake of the user
_DEMO_PACKAGES = ("matplotlib", "rich", "sklearn", "tqdm")

_DESCRIPTION = "Weight decay taken out of the optimizer: once per step, on weights and nothing else."

_EXAMPLES = """\
examples:
  python -m wdhook demo                train on real digits, compare four ways of decaying
  python -m wdhook demo --help         what the demo shows, and its options
"""

_DEMO_DESCRIPTION = """\
Train a small residual BatchNorm network on the scanned digits of scikit-learn four times, from the
same weights, on the same batches: (a) no decay, (b) the optimizer's decay on everything, (c) the
optimizer's param groups, written by hand, (d) wdhook.attach. Then print accuracy, norms and time per
step, say whether (c) and (d) are equal to the last bit, and plot the norms over training.

exit status: 0 when (c) and (d) are equal to the last bit, 1 when they differ, 2 when it cannot run.
"""

_DEMO_EXAMPLES = """\
examples:
  python -m wdhook demo                          under a minute on two cores, writes demo.png
  python -m wdhook demo --seed 3 --out run3.png  other weights, batches and test split
  python -m wdhook demo --epochs 4               a quick look
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments, without the program; None takes those of the process.

    Raises:
        SystemExit: (argparse) after ``--help``, and with status 2 for arguments that have no meaning.
    """
    with _printable():
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wdhook",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wdhook {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    # One function for each command: it adds a parser and names what runs it.
    for add in (_add_demo,):
        add(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train on real digits and compare wdhook with the optimizer's own decay",
        description=_DEMO_DESCRIPTION,
        epilog=_DEMO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of weights, batches and split (default: 0)")
    parser.add_argument("--epochs", type=_epochs, default=16, metavar="N", help="of each training (default: 16)")
    parser.add_argument(
        "--out", type=_png, default="demo.png", metavar="PNG", help="where the plot goes (default: demo.png)"
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in _DEMO_PACKAGES if find_spec(name) is None]
    if missing:
        print(
            f"python -m wdhook demo: error: the demo needs packages that are not installed: {', '.join(missing)}\n"
            "  Install them: pip install 'wdhook[demo]'",
            file=sys.stderr,
        )
        return BAD_USAGE
    from ._demo import demo

    return demo(arguments.seed, arguments.epochs, arguments.out)


def _seed(text: str) -> int:
    # scikit-learn takes 32 bits.
    return _integer(text, 0, 2**32 - 1)


def _epochs(text: str) -> int:
    return _integer(text, 1, 10_000)


def _integer(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
    return int(text)


def _png(text: str) -> Path:
    """A path that can be written: found out before the training, not after it."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return path


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
