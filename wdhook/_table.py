"""Plans as text: a table a person can believe, also for 300 parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from ._decisions import Decision

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a path component that is a number: the 3 of "layers.3.fc"
Row = tuple[str, ...]
Index = tuple[tuple[int, int], ...]  # one (first, last) for each number of a name


class Named(Protocol):
    """What has the name of a parameter."""

    @property
    def name(self) -> str:
        """Full name in the model."""


T = TypeVar("T", bound=Named)


def plan_table(weight_decay: float, decisions: Sequence[Decision]) -> str:
    """The decisions as a table: guesses first, then model order, and totals by role."""
    rows, sums = plan_rows(decisions), totals(decisions)
    return "\n".join([headline(weight_decay, decisions), "", *aligned(rows), "", *aligned(sums, right=range(1, 5))])


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
    rows += [(name, _shape(d), str(d.role), f"{d.weight_decay:g}", _reason(d)) for name, d in fold(ordered)]
    return rows


def diff_table(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> str:
    """What two plans decide differently, as a table."""
    numel = sum(known.numel for pair in pairs.values() if (known := pair[0] or pair[1]))
    head = f"{len(pairs)} tensors with {_count(numel)} elements are decided differently"
    return "\n".join([head, "", *aligned(diff_rows(pairs))]) if pairs else head


def diff_rows(pairs: Mapping[str, tuple[Decision | None, Decision | None]]) -> list[Row]:
    """As `plan_rows`, with what each of two plans decides."""

    def both(name: str) -> tuple[str, ...]:
        one, other = pairs[name]
        return _λ(one), _λ(other), _why(one), _why(other)

    known = [one or other for one, other in pairs.values()]
    rows: list[Row] = [("parameter", "shape", "λ", "λ of other", "reason", "reason of other")]
    for label, d in fold([d for d in known if d], lambda d: tuple(_NUMBER.sub("#", cell) for cell in both(d.name))):
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
        lambda d: (d.shape, d.role, d.weight_decay, _NUMBER.sub("#", d.reason), d.guess, also(d)),
    )


def fold_by(items: Sequence[T], alike: Callable[[T], object]) -> list[tuple[str, T]]:
    """`fold` for whatever has a name: joins neighbours for which `alike` gives the same."""
    groups: dict[tuple[object, ...], list[tuple[Index, T]]] = {}
    for item in items:
        index = tuple((int(n), int(n)) for n in _NUMBER.findall(item.name))
        groups.setdefault((_NUMBER.sub("#", item.name), alike(item)), []).append((index, item))
    place = {id(item): i for i, item in enumerate(items)}
    runs = [run for members in groups.values() for run in _joined(members, len(members[0][0]))]
    return [(_label(item.name, index), item) for index, item in sorted(runs, key=lambda run: place[id(run[1])])]


def _joined(members: list[tuple[Index, T]], depth: int) -> list[tuple[Index, T]]:
    """Join neighbours along one number at a time, the innermost first."""
    for at in reversed(range(depth)):
        runs: dict[Index, list[tuple[Index, T]]] = {}
        for index, d in members:
            run = runs.setdefault(index[:at] + index[at + 1 :], [])
            if run and run[-1][0][at][1] + 1 == index[at][0]:
                (low, _), first = run[-1][0][at], run[-1][1]
                run[-1] = ((*index[:at], (low, index[at][1]), *index[at + 1 :]), first)
            else:
                run.append((index, d))
        members = [member for run in runs.values() for member in run]
    return members


def _label(name: str, index: Index) -> str:
    parts = iter(index)
    text = _NUMBER.sub(lambda _: "{}-{}".format(*part) if (part := next(parts))[0] != part[1] else str(part[0]), name)
    times = 1
    for low, high in index:
        times *= high - low + 1
    return f"{text} ×{times}" if times > 1 else text


def totals(decisions: Sequence[Decision]) -> list[Row]:
    """A heading, a row for each role, and one for all."""
    rows: list[Row] = [("role", "tensors", "decayed", "elements", "decayed")]
    for role in (*dict.fromkeys(d.role for d in decisions), None):
        mine = [d for d in decisions if role is None or d.role == role]
        on = [d for d in mine if d.weight_decay > 0]
        elements = _count(sum(d.numel for d in mine)), _count(sum(d.numel for d in on))
        rows.append((str(role or "all"), str(len(mine)), str(len(on)), *elements))
    return rows


def aligned(rows: Sequence[Row], right: Iterable[int] = ()) -> list[str]:
    """Rows as lines of text, with a rule below the heading; the columns in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = set(right)
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


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
