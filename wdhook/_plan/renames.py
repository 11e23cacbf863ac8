"""Follows parameters whose names change: parametrizations, pruning and adapters rename them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .._roles.marks import bare_name
from .decision import Decision

# The parts of parameter names that parametrizations, pruning, the older norms of weights, and
# adapters insert or append.
_RENAMED = re.compile(
    r"(?<![^.])(?:(?:base_layer|original_module|modules_to_save\.[^.]+)\."
    r"|parametrizations\.(?P<local>\w+)\.original\d*$|(?P<pruned>\w+)_orig$|(?P<normed>weight\w*)_v$)"
)


def added(known: Mapping[str, Decision], newer: Iterable[Decision]) -> dict[str, Decision]:
    """The decisions of `newer` on names that `known` lacks.

    A parameter that `known` holds under a former name keeps its exemption or absolute λ.
    """
    former = {_former_name(name): decision for name, decision in known.items()}
    more = {}
    for decision in newer:
        if decision.name not in known:
            old = former.get(_former_name(decision.name))
            more[decision.name] = _inheriting(decision, old)
    return more


def _former_name(name: str) -> str:
    """The name before the parameter was renamed."""

    def original(found: re.Match[str]) -> str:
        return found["local"] or found["pruned"] or found["normed"] or ""

    return _RENAMED.sub(original, bare_name(name))


def _inheriting(new: Decision, old: Decision | None) -> Decision:
    """`new`, with the exemption or absolute λ that its parameter had under another name."""
    if old is None or old.follows or not new.eligible:
        return new
    reason = f"was {old.name}: {old.reason}"
    return replace(new, weight_decay=old.weight_decay, follows=False, reason=reason)
