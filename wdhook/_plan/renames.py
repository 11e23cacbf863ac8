"""Follows parameters whose names change: parametrizations, pruning and adapters rename them."""

from __future__ import annotations

import re
from dataclasses import replace

from .decision import Decision

# The parts of parameter names that parametrizations, pruning, the older norms of weights, and
# adapters insert or append.
_RENAMED = re.compile(
    r"(?<![^.])(?:(?:base_layer|original_module|modules_to_save\.[^.]+)\."
    r"|parametrizations\.(?P<local>\w+)\.original\d*$|(?P<pruned>\w+)_orig$|(?P<normed>weight\w*)_v$)"
)


def former_name(name: str) -> str:
    """The name before the parameter was renamed."""
    return _RENAMED.sub(_former_part, name)


def _former_part(found: re.Match[str]) -> str:
    return found["local"] or found["pruned"] or found["normed"] or ""


def inherited(new: Decision, old: Decision | None) -> Decision:
    """`new`, with the exemption, absolute λ and target that its parameter had under another
    name."""
    if old is None or not new.eligible:
        return new
    new = replace(new, toward=old.toward)
    if old.follows:
        return new
    reason = f"was {old.name}: {old.reason}"
    return replace(new, weight_decay=old.weight_decay, follows=False, reason=reason)


def under(name: str, decision: Decision) -> Decision:
    """`decision` on a parameter that is called `name` now."""
    if decision.name == name:
        return decision
    return replace(decision, name=name, reason=f"was {decision.name}: {decision.reason}")
