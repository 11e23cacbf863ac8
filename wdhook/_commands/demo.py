"""``wdhook demo``: arguments and required packages. `digits` holds the trainings."""

from __future__ import annotations

import argparse

from .shared import Commands, add_command, picture, require

_PACKAGES = ("matplotlib", "rich", "sklearn", "tqdm")

_DESCRIPTION = """\
Train a small residual BatchNorm network on the scanned digits of scikit-learn four times, from the
same weights, on the same batches: (a) no decay, (b) the optimizer's decay on everything, (c) the
optimizer's param groups, written by hand, (d) wdhook.attach. Then print accuracy, norms and the
ratio of times, say whether (c) and (d) are equal to the last bit, and plot the norms over training.

exit status: 0 when (c) and (d) are equal to the last bit, 1 when they differ, 2 when it cannot run.
"""

_EXAMPLES = """\
examples:
  python -m wdhook demo                          under a minute on two cores, writes demo.png
  python -m wdhook demo --seed 3 --out run3.png  other weights, batches and test split
  python -m wdhook demo --epochs 4               a quick look
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the parser of the command."""
    parser = add_command(
        commands,
        run,
        name="demo",
        summary="train on real digits and compare wdhook with the optimizer's own decay",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of weights, batches and split (default: 0)",
    )
    parser.add_argument(
        "--epochs", type=_epochs, default=16, metavar="N", help="of each training (default: 16)"
    )
    parser.add_argument(
        "--out",
        type=picture,
        default="demo.png",
        metavar="FILE",
        help="the plot: .png, .svg or .pdf (default: demo.png)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Raises:
        UsageError: a package of the extra is not installed.
    """
    require("the demo", _PACKAGES)
    from .digits_report import demo

    return demo(arguments.seed, arguments.epochs, arguments.out)


def _seed(text: str) -> int:
    # scikit-learn takes 32 bits.
    return _integer(text, 0, 2**32 - 1)


def _epochs(text: str) -> int:
    return _integer(text, 1, 10_000)


def _integer(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {low} to {high}, got {text!r}"
        )
    return int(text)
