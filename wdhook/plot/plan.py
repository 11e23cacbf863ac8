"""The picture of a plan: parts of the model from left to right, roles from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._base.errors import ArgumentError
from .._plan.decision import Decision
from .._plan.plan import Plan
from .._plan.table import headline
from .columns import MOST, Part, parts
from .figures import figure_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
_GREY = "#555555"
_LONGEST = 30  # characters of a label; its end tells more than its beginning

# Inches.
_WIDTH, _LEFT, _RIGHT = 6.0, 0.88, 1.12
_TOP, _KEY, _ROW, _GAP = 0.36, 0.34, 0.25, 0.08
_LINE = 0.16  # of the heading, below the first
_SQUARE = 0.55  # side of the largest square, where there is room
_DOT = 0.035  # side of the smallest
_CHARACTER = 0.052  # of a label, 7 points high
_BOLD = 0.068  # of the heading, 8 points high


def plan(plan: Mapping[str, Decision], *, ax: Axes | None = None) -> Figure:
    """Draw the decayed and the exempt elements, by role and by place in the model.

    The area of a square is the number of elements that a part of the model has in a role. All
    squares have one scale, except those that would be too small to be seen: they are dots of one
    size. Full squares are decayed, empty ones exempt; where a part has both, the full share of the
    square is the decayed share of the elements.

    Args:
        plan: a `Plan`, or any mapping from name to `Decision` in the order of the model.
        ax: axes to draw in, for a figure of your own: about six inches wide, and at least three
            high. None makes a figure.

    Returns:
        The figure of `ax`; or a new one, six inches wide, that belongs to no window and to no
        global list: save it with ``figure.savefig(path)``.

    Raises:
        ArgumentError: the plan has no parameters.
    """
    decisions = list(plan.values())
    if not decisions:
        raise ArgumentError(
            "`plan` has no parameters to draw.\n  Give the plan of a model: wdhook.plan(model, λ)"
        )
    λ = plan.weight_decay if isinstance(plan, Plan) else max(d.weight_decay for d in decisions)
    if ax is None:
        layout = _laid_out(decisions, λ, _WIDTH)
        figure = new_figure(_WIDTH, layout.height, constrained=False)
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    else:
        layout = _laid_out(decisions, λ, ax.bbox.width / figure_of(ax).dpi)
        ax.set_aspect("equal", adjustable="box", anchor="N")
    ax.set(xlim=(0, layout.width), ylim=(layout.height, 0))  # in inches, from the upper left corner
    ax.axis("off")
    _draw(ax, layout)
    return figure_of(ax)


# -- layout ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Places and sizes, in inches from the upper left corner."""

    width: float
    heading: list[str]
    columns: list[Part]
    roles: list[str]
    unit: float  # width of a column
    scale: float  # inches per √element
    sides: dict[tuple[int, int], float]  # (column, row) → side of the square
    heights: list[float]  # of the rows
    of_scale: int  # elements of the square in the key

    @property
    def top(self) -> float:
        """Where the first row begins."""
        return _TOP + _LINE * (len(self.heading) - 1)

    @property
    def bottom(self) -> float:
        """Where the last row ends, and the labels of the columns begin."""
        return self.top + sum(self.heights)

    @property
    def key(self) -> float:
        """Height of the key."""
        return max(_KEY, self.scale * math.sqrt(self.of_scale) + 2 * _GAP)

    @property
    def height(self) -> float:
        """Height of the picture."""
        longest = max(len(_tail(part.label)) for part in self.columns)
        return self.bottom + 0.12 + _CHARACTER * longest + self.key

    def x(self, column: int) -> float:
        """Middle of a column."""
        return _LEFT + self.unit * (column + 0.5)

    def y(self, row: int) -> float:
        """Middle of a row."""
        return self.top + sum(self.heights[:row]) + self.heights[row] / 2

    def row(self, role: str) -> list[Decision]:
        """Decisions of a role, in the whole model."""
        return [d for part in self.columns for d in part.decisions if d.role == role]

    def cell(self, column: int, row: int) -> list[Decision]:
        """Decisions of a column and a row."""
        return [d for d in self.columns[column].decisions if d.role == self.roles[row]]

    def drawn(self) -> Iterator[tuple[int, int]]:
        """Yield (column, row) of each cell with parameters."""
        yield from self.sides


def _laid_out(decisions: Sequence[Decision], λ: float, width: float) -> _Layout:
    room = width - _LEFT - _RIGHT
    columns = parts(decisions, max(3, int(MOST * room / (_WIDTH - _LEFT - _RIGHT))))
    present = {d.role for d in decisions}
    roles = [role for role in _COLOURS if role in present]
    elements: dict[tuple[int, int], int] = {}
    for i, part in enumerate(columns):
        for j, role in enumerate(roles):
            cell = [d for d in part.decisions if d.role == role]
            if cell:
                elements[i, j] = _numel(cell)
    largest = max(elements.values()) or 1
    unit = min(room / len(columns), _SQUARE + _GAP)
    scale = (unit - _GAP / 2) / math.sqrt(largest)
    sides = {place: max(scale * math.sqrt(n), _DOT) for place, n in elements.items()}
    heights = []
    for j in range(len(roles)):
        tallest = max(side for (_, row), side in sides.items() if row == j)
        heights.append(max(_ROW, _GAP + tallest))
    return _Layout(
        width=width,
        heading=_lines(headline(λ, decisions), int((width - 0.2) / _BOLD)),
        columns=columns,
        roles=roles,
        unit=unit,
        scale=scale,
        sides=sides,
        heights=heights,
        of_scale=_round_number(largest),
    )


def _lines(heading: str, characters: int) -> list[str]:
    """Break the heading after its first comma, if too long for one line."""
    if len(heading) <= characters:
        return [heading]
    first, _, second = heading.partition(", ")
    return [f"{first},", second]


def _round_number(largest: int) -> int:
    """Find the largest of 1, 2, 5, 10, 20, ... up to `largest`."""
    power: int = 10 ** int(math.log10(largest))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= max(largest, power))


def _numel(decisions: Sequence[Decision]) -> int:
    return sum(d.numel for d in decisions)


# -- drawing ---------------------------------------------------------------------------------------


def _draw(ax: Any, layout: _Layout) -> None:
    for i, line in enumerate(layout.heading):
        ax.text(0.1, 0.17 + _LINE * i, line, fontsize=8, va="center", weight="bold")
    right = _LEFT + layout.unit * len(layout.columns)
    for j, role in enumerate(layout.roles):
        _draw_row(ax, role, layout.row(role), layout.y(j), right)
    for i, j in layout.drawn():
        cell = layout.cell(i, j)
        decayed = [d for d in cell if d.weight_decay > 0]
        share = _numel(decayed) / (_numel(cell) or 1)
        colour = _COLOURS[layout.roles[j]]
        _draw_square(ax, layout.x(i), layout.y(j), layout.sides[i, j], share, colour)
    below = {"y": layout.bottom + 0.05, "fontsize": 7, "va": "top"}
    for i, part in enumerate(layout.columns):
        ax.text(layout.x(i), s=_tail(part.label), rotation=90, ha="center", **below)
    ax.text(_LEFT - 0.1, s="order in\nthe model →", ha="right", color=_GREY, **below)
    _draw_key(ax, layout)


def _draw_row(ax: Any, role: str, decisions: Sequence[Decision], y: float, right: float) -> None:
    ax.plot([_LEFT, right], [y, y], color="#E2E2E2", linewidth=0.6, zorder=1)
    ax.text(_LEFT - 0.1, y, role, fontsize=8, ha="right", va="center", color=_COLOURS[role])
    tensors = "1 tensor" if len(decisions) == 1 else f"{len(decisions)} tensors"
    ax.text(right + 0.08, y, f"{tensors}, {_short(_numel(decisions))}", fontsize=7, va="center")


def _draw_square(ax: Any, x: float, y: float, side: float, share: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, bottom = x - side / 2, y - side / 2, y + side / 2
    outline: dict[str, Any] = {
        "facecolor": "white",
        "edgecolor": colour,
        "linewidth": 0.7,
        "zorder": 2,
    }
    ax.add_patch(Rectangle((left, top), side, side, **outline))
    full: dict[str, Any] = {"facecolor": colour, "linewidth": 0, "zorder": 3}
    ax.add_patch(Rectangle((left, bottom), side, -side * share, **full))


def _draw_key(ax: Any, layout: _Layout) -> None:
    """Explain full and empty squares, and the areas, by dashed squares."""
    y = layout.height - layout.key / 2
    text = {"fontsize": 7, "va": "center", "color": _GREY}
    x = 0.1
    for share, word in ((1.0, "decayed"), (0.0, "exempt")):
        _draw_square(ax, x + 0.05, y, 0.1, share, _GREY)
        ax.text(x + 0.16, y, word, **text)
        x += 0.32 + _CHARACTER * len(word)
    x += 0.1
    ax.text(x, y, "area:", **text)
    x += 0.08 + _CHARACTER * len("area:")
    sizes = [(max(layout.scale * math.sqrt(layout.of_scale), _DOT), layout.of_scale, "elements")]
    smallest = int((_DOT / layout.scale) ** 2)
    if smallest > 1:
        sizes.append((_DOT, smallest, "or less"))
    for side, elements, words in sizes:
        _draw_size(ax, x, y, side)
        label = f"{_short(elements)} {words}"
        ax.text(x + side + 0.06, y, label, **text)
        x += side + 0.24 + _CHARACTER * len(label)


def _draw_size(ax: Any, x: float, y: float, side: float) -> None:
    """Draw a dashed square: no square of the picture is dashed."""
    half = side / 2
    xs, ys = [x, x + side, x + side, x, x], [y - half, y - half, y + half, y + half, y - half]
    dashes = (0, (2, 1.5)) if side > 2 * _DOT else "solid"  # a dot is too small for dashes
    ax.plot(xs, ys, color=_GREY, linewidth=0.7, linestyle=dashes)


def _tail(label: str) -> str:
    return label if len(label) <= _LONGEST else f"…{label[1 - _LONGEST :]}"


def _short(number: int) -> str:
    """12_345_678 as "12.3 M"."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{float(f'{number / 10**power:.3g}'):g} {letter}"
    return str(number)
