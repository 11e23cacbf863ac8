"""What the commands that make a plan share: its arguments, and the plan as a table and as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .._base.errors import ArgumentError
from .._base.text import Row, aligned
from .._base.validate import check_factor
from .._plan.decision import Decision
from .._plan.plan import PlanDiff
from .._plan.recipes import RECIPES

Override = tuple[str, float | bool]


def add_plan_arguments(parser: argparse._ActionsContainer, weight_decay: float) -> None:
    """Add the arguments of `wdhook.plan`."""
    parser.add_argument(
        "--weight-decay",
        type=_factor,
        default=weight_decay,
        metavar="λ",
        help=f"per step (default: {weight_decay:g})",
    )
    known = ", ".join(RECIPES)
    parser.add_argument(
        "--recipe", choices=list(RECIPES), help=f"decide by a known rule: {known}", metavar="NAME"
    )
    parser.add_argument(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="SELECTOR=λ",
        help="a glob on the name, or a role; λ is a number, or `true` for the one given; the last match wins",
    )


def _factor(text: str) -> float:
    try:
        return check_factor(float(text))
    except (ArgumentError, ValueError):
        raise argparse.ArgumentTypeError(f"must be a number ≥ 0, got {text!r}") from None


def _override(text: str) -> Override:
    selector, equals, value = text.rpartition("=")
    if not equals or not selector:
        raise argparse.ArgumentTypeError(f"must be SELECTOR=λ, got {text!r}")
    if value.lower() in ("true", "false"):
        return selector, value.lower() == "true"
    return selector, _factor(value)


def overrides_of(arguments: argparse.Namespace) -> dict[str, float | bool] | None:
    """The overrides of a command line; one that is given twice counts where it was given last."""
    found: dict[str, float | bool] = {}
    for selector, value in arguments.override:
        found.pop(selector, None)
        found[selector] = value
    return found or None


def print_table(
    rows: Sequence[Row], right: Sequence[int] = (), strong: Sequence[bool] = ()
) -> None:
    """Print rows below their heading: by rich where it is installed and stdout is a terminal, else as plain text.

    Args:
        rows: the first is the heading.
        right: columns that are flush right.
        strong: for each row after the heading, whether it is to be seen first.
    """
    if not (sys.stdout.isatty() and find_spec("rich") is not None):
        print(*aligned(rows, right), sep="\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    for index, row in enumerate(rows[1:]):
        table.add_row(*row, style="bold" if index < len(strong) and strong[index] else None)
    Console(highlight=False, markup=False).print(table)


def as_dict(decision: Decision) -> dict[str, Any]:
    """A decision as JSON."""
    return {
        "name": decision.name,
        "shape": list(decision.shape),
        "numel": decision.numel,
        "role": str(decision.role),
        "weight_decay": decision.weight_decay,
        "follows": decision.follows,
        "guess": decision.guess,
        "reason": decision.reason,
    }


def sums(decisions: Sequence[Decision]) -> dict[str, int]:
    """Tensors and elements, and how many of them are decayed."""
    decayed = [d for d in decisions if d.weight_decay > 0]
    return {
        "tensors": len(decisions),
        "decayed_tensors": len(decayed),
        "elements": sum(d.numel for d in decisions),
        "decayed_elements": sum(d.numel for d in decayed),
    }


def diff_as_dict(diff: PlanDiff, recipe: str) -> dict[str, Any]:
    """A difference as JSON."""
    return {
        "recipe": recipe,
        "tensors": len(diff),
        "elements": diff.numel,
        "parameters": [
            {
                "name": name,
                "weight_decay": one.weight_decay,
                "other_weight_decay": other.weight_decay,
                "reason": one.reason,
                "other_reason": other.reason,
            }
            for name, (one, other) in diff.items()
            if one is not None and other is not None  # both plans are of one model
        ],
    }
