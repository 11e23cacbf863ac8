"""Reads the argument `toward`: the values to which decay draws parameters, where not to zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from .._base.errors import ArgumentError, SelectorError
from .._base.problem import Problem
from .._base.validate import is_number
from .anchor import Anchor
from .decision import Decision
from .overrides import Candidate, Selector, selected

Target = float | Literal["init"] | Anchor
Toward = Target | Mapping[Any, Target]
"""A target for all, or selector → target. (`Mapping` is invariant in its keys; see `Selector`.)"""


def aim(
    candidates: Sequence[Candidate],
    decisions: Mapping[str, Decision],
    toward: Toward,
    strict: bool,
) -> Iterator[tuple[str, float | Anchor]]:
    """Yield (parameter name, target) in order: the last one wins.

    Args:
        candidates: every name of every parameter.
        decisions: name → decision. Exempt parameters have no target.
        toward: see `wdhook.plan`.
        strict: a selector that matches no decayed parameter is an error.

    Raises:
        ArgumentError: a target has no meaning.
        SelectorError: a selector matches nothing, or exempt parameters alone.
    """
    pairs = toward.items() if isinstance(toward, Mapping) else [(None, toward)]
    for selector, given in pairs:
        names, label = _names(selector, candidates, strict)
        target = _target(given, label)
        eligible = [name for name in names if decisions[name].eligible]
        if strict and selector is not None and names and not eligible:
            raise SelectorError(
                Problem(
                    "A selector in `toward` matches exempt parameters alone, which are not "
                    "decayed at all.",
                    f"Make them eligible: overrides={{{label}: True}}",
                    {"selector": label, "parameters": _some(names)},
                )
            )
        for name in eligible:
            yield name, target


def _names(
    selector: Selector | None, candidates: Sequence[Candidate], strict: bool
) -> tuple[list[str], str]:
    if selector is None:
        return list(dict.fromkeys(c.name for c in candidates)), "all"
    return selected(selector, candidates, "toward", strict)


def _target(given: object, label: str) -> float | Anchor:
    if isinstance(given, Anchor):
        return given
    if isinstance(given, str) and given == "init":
        return Anchor()
    if is_number(given) and math.isfinite(given):
        return float(given)
    raise ArgumentError(
        Problem(
            'A target in `toward` is a finite number, "init", or a wdhook.Anchor.',
            "For values of another model: toward=wdhook.Anchor(model) or Anchor(state_dict)",
            {"selector": label, "got": given if is_number(given) else type(given).__name__},
        )
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
