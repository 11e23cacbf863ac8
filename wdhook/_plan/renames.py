"""Decisions on parameters whose names change: parametrizations, pruning and adapters rename
them."""

from __future__ import annotations

from dataclasses import replace

from .decision import Decision


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
