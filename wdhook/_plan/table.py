"""Plans as text: a table a person can believe, also for 300 parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .._base.text import NUMBER, Row, aligned, fold_by
from .decision import Decision


def plan_table(weight_decay: float, decisions: Sequence[Decision]) -> str:
    """The decisions as a table: guesses first, then model order, and totals by role."""
    rows, sums = plan_rows(decisions), totals(decisions)
    return "\n".join(
        [
            headline(weight_decay, decisions),
            "",
            *aligned(rows),
            "",
            *aligned(sums, right=range(1, 5)),
        ]
    )


def headline(weight_decay: float, decisions: Sequence[Decision]) -> str:
    """The plan in one line."""
    decayed = [d for d in decisions if d.weight_decay > 0]
    return (
        f"weight decay {weight_decay:g} on {len(decayed)} of {len(decisions)} tensors, "
        f"{_count(sum(d.numel for d in decayed))} of {_count(sum(d.numel for d in decisions))} elements"
    )


def plan_rows(decisions: Sequence[Decision]) -> list[Row]:
    """A heading, and a row for each run of decisions that differ only in the numbers of their names."""
    ordered = sorted(decisions, key=lambda d: not d.guess)
    rows: list[Row] = [("parameter", "shape", "role", "λ", "reason")]
    rows += [
        (name, _shape(d), str(d.role), f"{d.weight_decay:g}", _reason(d))
        for name, d in fold(ordered)
    ]
    return rows


def diff_table(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> str:
    """What two plans decide differently, as a table."""
    numel = sum(known.numel for pair in pairs.values() if (known := pair[0] or pair[1]))
    tensors = "1 tensor" if len(pairs) == 1 else f"{len(pairs)} tensors"
    elements = "1 element" if numel == 1 else f"{_count(numel)} elements"
    verb = "is" if len(pairs) == 1 else "are"
    head = f"{tensors} with {elements} {verb} decided differently"
    return "\n".join([head, "", *aligned(diff_rows(pairs))]) if pairs else head


def diff_rows(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> list[Row]:
    """As `plan_rows`, with what each of two plans decides."""

    def both(name: str) -> tuple[str, ...]:
        one, other = pairs[name]
        return _λ(one), _λ(other), _why(one), _why(other)

    known = [one or other for one, other in pairs.values()]
    rows: list[Row] = [("parameter", "shape", "λ", "λ of other", "reason", "reason of other")]
    for label, d in fold(
        [d for d in known if d], lambda d: tuple(NUMBER.sub("#", cell) for cell in both(d.name))
    ):
        rows.append((label, _shape(d), *both(d.name)))
    return rows


def fold(
    decisions: Sequence[Decision], also: Callable[[Decision], object] = lambda decision: None
) -> list[tuple[str, Decision]]:
    """Join decisions that differ only in the numbers of their names, and are alike in what `also` gives.

    Returns:
        (label, first decision) for each run, such as ``layers.0-11.attn.qkv.weight ×12``.
    """
    return fold_by(
        decisions,
        lambda d: (d.shape, d.role, d.weight_decay, NUMBER.sub("#", d.reason), d.guess, also(d)),
    )


def totals(decisions: Sequence[Decision]) -> list[Row]:
    """A heading, a row for each role, and one for all."""
    rows: list[Row] = [("role", "tensors", "decayed", "elements", "decayed")]
    for role in (*dict.fromkeys(d.role for d in decisions), None):
        mine = [d for d in decisions if role is None or d.role == role]
        on = [d for d in mine if d.weight_decay > 0]
        elements = _count(sum(d.numel for d in mine)), _count(sum(d.numel for d in on))
        rows.append((str(role or "all"), str(len(mine)), str(len(on)), *elements))
    return rows


def _shape(decision: Decision) -> str:
    return "×".join(map(str, decision.shape)) or ("scalar" if decision.numel else "lazy")


def _reason(decision: Decision) -> str:
    return f"guess: {decision.reason}" if decision.guess else decision.reason


def _count(number: int) -> str:
    return f"{number:,}"


def _λ(decision: Decision | None) -> str:
    return "absent" if decision is None else f"{decision.weight_decay:g}"


def _why(decision: Decision | None) -> str:
    return "" if decision is None else decision.reason
