"""The arguments of `wdhook.plan` on a command line, and plans as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .._base.errors import ArgumentError
from .._base.validate import check_factor
from .._plan.decision import Decision
from .._plan.plan import PlanDiff
from .._plan.recipes import RECIPES
from .shared import one_of

Override = tuple[str, float | bool]


def add_plan_arguments(parser: argparse._ActionsContainer, weight_decay: float) -> None:
    """Add the arguments of `wdhook.plan`."""
    parser.add_argument(
        "--weight-decay",
        type=_factor,
        default=weight_decay,
        metavar="λ",
        help=f"per optimizer step (default: {weight_decay:g})",
    )
    parser.add_argument(
        "--recipe",
        type=one_of(list(RECIPES)),
        help=f"decide by a known rule: {', '.join(RECIPES)}",
        metavar="NAME",
    )
    parser.add_argument(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="SELECTOR=λ",
        help="a glob on the name, or a role, and a number, or `true` for the λ of --weight-decay; "
        "the last match wins",
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
    """Collect the overrides; a selector given twice counts at its last place."""
    found: dict[str, float | bool] = {}
    for selector, value in arguments.override:
        found.pop(selector, None)
        found[selector] = value
    return found or None


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
    """Count tensors and elements, all and decayed."""
    decayed = [d for d in decisions if d.weight_decay > 0]
    return {
        "tensors": len(decisions),
        "decayed_tensors": len(decayed),
        "elements": sum(d.numel for d in decisions),
        "decayed_elements": sum(d.numel for d in decayed),
    }


def diff_as_dict(diff: PlanDiff, recipe: str) -> dict[str, Any]:
    """A difference as JSON."""
    parameters = []
    for name, (one, other) in diff.items():
        if one is None or other is None:
            continue  # never: both plans are of one model
        parameters.append(
            {
                "name": name,
                "weight_decay": one.weight_decay,
                "other_weight_decay": other.weight_decay,
                "reason": one.reason,
                "other_reason": other.reason,
            }
        )
    return {
        "recipe": recipe,
        "tensors": len(diff),
        "elements": diff.numel,
        "parameters": parameters,
    }
