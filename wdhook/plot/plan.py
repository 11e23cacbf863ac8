"""The picture of a plan: the model's parts from left to right, roles from top to bottom, an area for each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from .._base.errors import ArgumentError
from .._plan.decision import Decision
from .._plan.plan import Plan
from .._plan.table import headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito 2008: colour-blind readers can tell them apart; and each role has a row of its own.
_COLOURS = {
    "weight": "#0072B2",
    "embedding": "#009E73",
    "bias": "#D55E00",
    "norm": "#CC79A7",
    "scale": "#E69F00",
    "position": "#56B4E9",
    "other": "#555555",
}
_LONGEST = 30  # characters of a label; its end tells more than its beginning
_MOST = 20  # columns: as many as six inches hold with labels that can be read

# Inches.
_WIDTH, _LEFT, _RIGHT = 6.0, 0.88, 1.12
_TOP, _KEY, _ROW, _GAP = 0.36, 0.34, 0.25, 0.08
_SQUARE = 0.55  # side of the largest square, where there is room
_DOT = 0.035  # side of the smallest
_CHARACTER = 0.052  # of a label, 7 points high


class Part(NamedTuple):
    """A column: neighbours in the model, and what they are called."""

    label: str
    decisions: list[Decision]


def plan(plan: Mapping[str, Decision]) -> Figure:
    """Draw what is decayed, by depth and role.

    A square's area is the number of elements that a part of the model has in a role. All are drawn to one scale, but
    for those that would be too small to be seen: they are dots of one size. Full squares are decayed, empty ones
    exempt; where a part has both, the full share of the square is the decayed share of the elements.

    Args:
        plan: a `Plan`, or any mapping from name to `Decision` in the order of the model.

    Returns:
        A figure, six inches wide, that belongs to no window and to no global list: save it with
        ``figure.savefig(path)``.

    Raises:
        ArgumentError: the plan has no parameters.
    """
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: it would choose a backend for the whole process

    decisions = list(plan.values())
    if not decisions:
        raise ArgumentError(
            "`plan` has no parameters to draw.\n  Give the plan of a model: wdhook.plan(model, λ)"
        )
    columns = parts(decisions)
    roles = [role for role in _COLOURS if any(d.role == role for d in decisions)]
    largest = max(_numel(cell) for _, _, cell in _cells(columns, roles)) or 1
    unit = min((_WIDTH - _LEFT - _RIGHT) / len(columns), _SQUARE + _GAP)
    scale = (unit - _GAP / 2) / math.sqrt(largest)  # inches per √element

    sides = {
        (i, j): max(scale * math.sqrt(_numel(cell)), _DOT) for i, j, cell in _cells(columns, roles)
    }
    heights = [
        max(_ROW, _GAP + max(side for (_, k), side in sides.items() if k == j))
        for j in range(len(roles))
    ]
    below = 0.12 + _CHARACTER * max(len(_tail(part.label)) for part in columns)
    of_scale = 10 ** int(math.log10(largest))  # elements of the square in the key
    key = max(_KEY, scale * math.sqrt(of_scale) + 2 * _GAP)
    height = _TOP + sum(heights) + below + key
    figure = Figure(figsize=(_WIDTH, height), dpi=200)
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # in inches, from the upper left corner
    ax.set(xlim=(0, _WIDTH), ylim=(height, 0))
    ax.axis("off")

    λ = plan.weight_decay if isinstance(plan, Plan) else max(d.weight_decay for d in decisions)
    ax.text(0.1, 0.17, headline(λ, decisions), fontsize=8, va="center", weight="bold")
    middles = [_TOP + sum(heights[:j]) + heights[j] / 2 for j in range(len(roles))]
    for role, y in zip(roles, middles, strict=True):
        _draw_row(
            ax, role, [d for d in decisions if d.role == role], y, _LEFT + unit * len(columns)
        )
    for i, j, cell in _cells(columns, roles):
        share = _numel([d for d in cell if d.weight_decay > 0]) / (_numel(cell) or 1)
        _draw_square(
            ax, _LEFT + unit * (i + 0.5), middles[j], sides[i, j], share, _COLOURS[roles[j]]
        )
    bottom = _TOP + sum(heights)
    for i, part in enumerate(columns):
        x = _LEFT + unit * (i + 0.5)
        ax.text(x, bottom + 0.05, _tail(part.label), fontsize=7, rotation=90, ha="center", va="top")
    ax.text(
        _LEFT - 0.1, bottom + 0.05, "depth →", fontsize=7, ha="right", va="top", color="#555555"
    )
    _draw_key(ax, height - key / 2, scale, of_scale)
    return figure


def _cells(
    columns: Sequence[Part], roles: Sequence[str]
) -> Iterator[tuple[int, int, list[Decision]]]:
    """(column, row, decisions) where there are some."""
    for i, part in enumerate(columns):
        for j, role in enumerate(roles):
            if cell := [d for d in part.decisions if d.role == role]:
                yield i, j, cell


def _numel(decisions: Sequence[Decision]) -> int:
    return sum(d.numel for d in decisions)


# -- drawing ----------------------------------------------------------------------------------------------------


def _draw_row(ax: Any, role: str, decisions: Sequence[Decision], y: float, right: float) -> None:
    ax.plot([_LEFT, right], [y, y], color="#E2E2E2", linewidth=0.6, zorder=1)
    ax.text(_LEFT - 0.1, y, role, fontsize=8, ha="right", va="center", color=_COLOURS[role])
    tensors = f"{len(decisions)} tensor{'s' * (len(decisions) != 1)}"
    ax.text(right + 0.08, y, f"{tensors}, {_short(_numel(decisions))}", fontsize=7, va="center")


def _draw_square(ax: Any, x: float, y: float, side: float, share: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    corner = x - side / 2, y - side / 2
    ax.add_patch(
        Rectangle(corner, side, side, facecolor="white", edgecolor=colour, linewidth=0.7, zorder=2)
    )
    ax.add_patch(
        Rectangle(
            (x - side / 2, y + side / 2),
            side,
            -side * share,
            facecolor=colour,
            linewidth=0,
            zorder=3,
        )
    )


def _draw_key(ax: Any, y: float, scale: float, of_scale: int) -> None:
    grey = "#555555"
    smallest = int((_DOT / scale) ** 2)
    side = max(scale * math.sqrt(of_scale), _DOT)
    entries: list[tuple[float, float, str]] = [(0.1, 1.0, "decayed"), (0.1, 0.0, "exempt")]
    entries += [(side, 0.0, f"{_short(of_scale)} elements")]
    if smallest > 1:
        entries += [(_DOT, 0.0, f"{_short(smallest)} or less")]
    x = _LEFT
    for size, share, text in entries:
        _draw_square(ax, x + size / 2, y, size, share, grey)
        ax.text(x + size + 0.06, y, text, fontsize=7, va="center", color=grey)
        x += size + 0.24 + _CHARACTER * len(text)


def _tail(label: str) -> str:
    return label if len(label) <= _LONGEST else f"…{label[1 - _LONGEST :]}"


def _short(number: int) -> str:
    """12_345_678 as "12.3 M"."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{float(f'{number / 10**power:.3g}'):g} {letter}"
    return str(number)


# -- columns ----------------------------------------------------------------------------------------------------


def parts(decisions: Sequence[Decision]) -> list[Part]:
    """Neighbours in the model that are one column: as many columns as can be drawn.

    A column holds what lies below one path, as ``layers.0.blocks.1``; or, where these would be too many, below a few
    that follow each other, as ``layers.0-3``.
    """
    best: list[Part] = []
    for depth in range(1, 1 + max(1, *(d.name.count(".") for d in decisions))):
        runs = groupby(decisions, lambda d, depth=depth: _path(d.name, depth))  # type: ignore[misc]
        blocks = [Part(label, list(run)) for label, run in runs]
        found = next(
            (f for size in (1, 2, 3, 4, 6, 8, 12) if len(f := _joined(blocks, size)) <= _MOST), []
        )
        if len(found) > len(best):  # deeper paths that make no more columns are but longer labels
            best = found
    if best:
        return best
    step = math.ceil(len(decisions) / _MOST)
    return [
        Part(f"{d.name}, …", list(decisions[i : i + step]))
        for i, d in enumerate(decisions)
        if i % step == 0
    ]


def _path(name: str, depth: int) -> str:
    """The first `depth` components of what holds a parameter; its own name where nothing does."""
    return ".".join(name.split(".")[:-1][:depth]) or name


def _joined(blocks: Sequence[Part], size: int) -> list[Part]:
    """Blocks whose paths differ in the number at the end, `size` at a time: ``layers.0-3``."""
    columns = []
    for _, run in groupby(blocks, lambda part: re.sub(r"\d+$", "#", part.label)):
        series = list(run)
        numbered = series[0].label[-1].isdigit()
        for chunk in (series[i : i + size] for i in range(0, len(series), size if numbered else 1)):
            label = chunk[0].label
            if len(chunk) > 1:
                label += "-" + re.findall(r"\d+$", chunk[-1].label)[0]
            columns.append(Part(label, [d for part in chunk for d in part.decisions]))
    return columns
