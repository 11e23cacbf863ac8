"""Formats plans as tables; rows that differ only in layer numbers are folded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .._base.terminal import paragraph, table
from .._base.text import NUMBER, Row, fold_by
from .decision import Decision


def plan_table(weight_decay: float, decisions: Sequence[Decision]) -> str:
    """Format decisions as a table: guesses first, then model order, and totals by role.

    Folded to the width of the terminal where stdout is one.
    """
    lines = [*paragraph(headline(weight_decay, decisions)), "", *table(plan_rows(decisions)), ""]
    lines += table(totals(decisions), right=range(1, 5))
    return "\n".join(lines)


def plan_html(weight_decay: float, decisions: Sequence[Decision]) -> str:
    """Format decisions as HTML for notebooks, with the content of `plan_table`."""
    from .._base.markup import html_paragraph, html_table  # needs html, which few need

    parts = [html_paragraph(headline(weight_decay, decisions))]
    parts += [html_table(plan_rows(decisions)), html_table(totals(decisions))]
    return "\n".join(parts)


@dataclass(slots=True)
class _Sums:
    """Sums over decisions. Frozen parameters are not counted as decayed."""

    tensors: int = 0
    elements: int = 0
    decayed: int = 0
    decayed_elements: int = 0
    frozen: int = 0
    guesses: int = 0

    def add(self, decision: Decision) -> None:
        self.tensors += 1
        self.elements += decision.numel
        self.guesses += decision.guess
        if not decision.weight_decay > 0:
            return
        if not decision.trainable:
            self.frozen += 1
            return
        self.decayed += 1
        self.decayed_elements += decision.numel


def _sums(decisions: Iterable[Decision]) -> _Sums:
    found = _Sums()
    for decision in decisions:
        found.add(decision)
    return found


def headline(
    weight_decay: float, decisions: Sequence[Decision], settled_by: str = "an audit or inputs="
) -> str:
    """The plan in one line, with the numbers of frozen parameters and of guesses.

    Args:
        weight_decay: λ.
        decisions: of the plan.
        settled_by: the argument or option that settles guesses.
    """
    found = _sums(decisions)
    line = (
        f"weight decay {weight_decay:g} on {found.decayed} of {found.tensors} tensors, "
        f"{found.decayed_elements:,} of {found.elements:,} elements"
    )
    if found.frozen:
        line += f"; {found.frozen} more {'is' if found.frozen == 1 else 'are'} frozen"
    if found.guesses:
        line += f"; {_about_guesses(found.guesses, decisions, settled_by)}"
    return line


def _about_guesses(guesses: int, decisions: Sequence[Decision], settled_by: str) -> str:
    """The number of guesses and the way to settle them."""
    count, them = (f"{guesses} guesses", "them") if guesses > 1 else ("1 guess", "it")
    if any(d.reason.startswith("traced: ") for d in decisions):
        return f"{count} that the example inputs do not settle"
    return f"{count}: {settled_by} settles {them}"


def plan_rows(decisions: Sequence[Decision]) -> list[Row]:
    """A heading, and a row for each run of decisions whose names differ in numbers alone."""
    ordered = sorted(decisions, key=lambda d: not d.guess)
    rows: list[Row] = [("parameter", "shape", "role", "λ", "reason")]
    rows += [
        (name, _shape(d), str(d.role), f"{d.weight_decay:g}", _reason(d))
        for name, d in fold(ordered)
    ]
    return rows


def diff_table(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> str:
    """Format the differences between two plans as a table."""
    head = diff_headline(pairs)
    if not pairs:
        return head
    return "\n".join([head, "", *table(diff_rows(pairs))])


def diff_html(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> str:
    """Format the differences between two plans as HTML for notebooks."""
    from .._base.markup import html_paragraph, html_table

    head = html_paragraph(diff_headline(pairs))
    return f"{head}\n{html_table(diff_rows(pairs))}" if pairs else head


def diff_headline(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> str:
    """The number of differences in one line."""
    numel = 0
    for one, other in pairs.values():
        known = one or other
        numel += known.numel if known is not None else 0
    tensors = "1 tensor" if len(pairs) == 1 else f"{len(pairs)} tensors"
    elements = "1 element" if numel == 1 else f"{_count(numel)} elements"
    verb = "gets" if len(pairs) == 1 else "get"
    return f"{tensors} with {elements} {verb} a different λ"


def diff_rows(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> list[Row]:
    """A heading and rows as in `plan_rows`, with the decisions of both plans."""

    def both(name: str) -> tuple[str, ...]:
        one, other = pairs[name]
        return _λ(one), _λ(other), _why(one), _why(other)

    def without_numbers(decision: Decision) -> tuple[str, ...]:
        return tuple(NUMBER.sub("#", cell) for cell in both(decision.name))

    known = []
    for one, other in pairs.values():
        decision = one or other
        if decision is not None:
            known.append(decision)
    rows: list[Row] = [("parameter", "shape", "λ", "λ of other", "reason", "reason of other")]
    for label, d in fold(known, without_numbers):
        rows.append((label, _shape(d), *both(d.name)))
    return rows


def fold(
    decisions: Sequence[Decision], also: Callable[[Decision], object] = lambda decision: None
) -> list[tuple[str, Decision]]:
    """Join decisions that differ only in the numbers of their names, and agree in `also`.

    Returns:
        (label, first decision) for each run, such as ``layers.0-11.attn.qkv.weight ×12``.
    """

    def alike(d: Decision) -> object:
        said = NUMBER.sub("#", _reason(d))
        return d.shape, d.role, d.weight_decay, said, also(d)

    return fold_by(decisions, alike)


def totals(decisions: Sequence[Decision]) -> list[Row]:
    """A heading, a row for each role in order of appearance, and a row for all."""
    by_role: dict[str, _Sums] = {}
    for decision in decisions:
        by_role.setdefault(str(decision.role), _Sums()).add(decision)
    by_role["all"] = _sums(decisions)
    rows: list[Row] = [("role", "tensors", "decayed", "elements", "decayed")]
    for role, found in by_role.items():
        counts = found.tensors, found.decayed, found.elements, found.decayed_elements
        rows.append((role, str(counts[0]), str(counts[1]), _count(counts[2]), _count(counts[3])))
    return rows


def _shape(decision: Decision) -> str:
    return "×".join(map(str, decision.shape)) or ("scalar" if decision.numel else "lazy")


def _reason(decision: Decision) -> str:
    """The reason, with the facts that change its meaning: a guess, further names, frozen."""
    reason = f"guess: {decision.reason}" if decision.guess else decision.reason
    if decision.aliases:
        reason += f"; tied to {', '.join(decision.aliases)}"
    if decision.toward:
        reason += f"; toward {decision.target}"
    if decision.weight_decay > 0 and not decision.trainable:
        reason += "; frozen"
    return reason


def _count(number: int) -> str:
    return f"{number:,}"


def _λ(decision: Decision | None) -> str:
    return "absent" if decision is None else f"{decision.weight_decay:g}"


def _why(decision: Decision | None) -> str:
    return "" if decision is None else decision.reason
