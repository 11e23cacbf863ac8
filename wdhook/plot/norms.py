"""The picture of a training under weight decay: norms over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from .._base.errors import ArgumentError
from .figures import figure_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Mapping[str, Mapping[str, Sequence[float]]]

# Colours that colour-blind readers can tell apart (Okabe & Ito 2008, Tol); dashes and widths
# differ too. The third is a broad band behind all others, the fourth lies on top with wide gaps:
# lines that coincide stay visible.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#AA3377", "linestyle": (0, (1, 1.2)), "linewidth": 2.2, "zorder": 3},
    {"color": "#D55E00", "linestyle": (0, (6, 1.5, 1, 1.5)), "linewidth": 1.8, "zorder": 4},
    {"color": "#8CCBF0", "linestyle": "solid", "linewidth": 6.0, "zorder": 2.5},
    {"color": "#000000", "linestyle": (0, (3, 4)), "linewidth": 1.8, "zorder": 5},
)
_ALONE = {"color": "#0072B2", "linewidth": 1.8}
_IN_A_ROW = 3  # panels


class _Line(NamedTuple):
    """The values of a quantity in a training."""

    x: Sequence[float]
    y: Sequence[float]


class _Training(NamedTuple):
    """A training: a line for each panel."""

    lines: dict[str, _Line]
    of_snapshots: bool
    λs: list[float]  # at the snapshots


def norms(
    history: History | Sequence[Any] | Mapping[str, Sequence[Any]],
    *,
    xlabel: str | None = None,
    ylabel: str = "L2 norm",
    title: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw norms over training: a panel for each quantity, a line for each training.

    Args:
        history: label of the line → title of the panel → values at 0, 1, 2, ... `xlabel`. Or a list
            of snapshots, of `WeightDecay.snapshot` or their ``to_dict()``, whose groups are the
            panels; or label of the line → such a list.
        xlabel: of every panel; None is ``"step"`` for snapshots, else ``"epoch"``.
        ylabel: of the first panel; the scales differ from panel to panel, and each begins at zero.
        title: of the figure; None says the λ of the snapshots.
        ax: axes to draw in, for a figure of your own: one for each panel. Such a figure gets only a
            `title` that is given. None makes a figure.

    Returns:
        The figure of `ax`; or a new one, six inches wide, that belongs to no window and to no
        global list: save it with ``figure.savefig(path)``.

    Raises:
        ArgumentError: there is nothing to draw, or another number of axes than of panels.
    """
    trainings = _trainings(history)
    panels = _names(trainings)
    if ax is None:
        title = title or _heading(trainings)
        figure, axes = _panels(len(panels), title)
    else:
        axes = _checked(ax, panels)
        figure = figure_of(axes[0])
    named = any(trainings)
    own = ax is None
    if title and not (own and named):  # the layout would put a legend over it
        figure.suptitle(title, fontsize=9, weight="bold")
    for panel, name in zip(axes, panels, strict=True):
        _draw(panel, name, trainings)
        panel.set_xlabel(xlabel or _clock(trainings))
    _label(axes, ylabel)
    if named and own:
        heading = {"title": title, "title_fontproperties": {"size": 9, "weight": "bold"}}
        place = {"loc": "outside upper center", "ncols": 2}
        _legend(figure, axes, list(trainings), **heading, **place)
    elif named:
        _legend(axes[0], axes, list(trainings))
    return figure


# -- data ------------------------------------------------------------------------------------------


def _trainings(history: Any) -> dict[str, _Training]:
    """Read a history: label of the line → training."""
    if not isinstance(history, Mapping):
        return {"": _training(history)}
    return {label: _training(one) for label, one in history.items()}


def _names(trainings: Mapping[str, _Training]) -> list[str]:
    """Collect the titles of the panels, in the order of the trainings."""
    names: dict[str, None] = {}
    for training in trainings.values():
        names.update(dict.fromkeys(training.lines))
    if not names:
        raise ArgumentError(
            "`history` has no values to draw.\n  Give snapshots: [decay.snapshot(), ...]"
        )
    return list(names)


def _clock(trainings: Mapping[str, _Training]) -> str:
    """The unit of the horizontal axis."""
    snapshots = any(training.of_snapshots for training in trainings.values())
    return "step" if snapshots else "epoch"


def _training(given: Any) -> _Training:
    """The lines of either kind of training."""
    if isinstance(given, Mapping):
        lines = {name: _Line(range(len(values)), values) for name, values in given.items()}
        return _Training(lines, False, [])
    snapshots = [one if isinstance(one, Mapping) else one.to_dict() for one in given]
    points: dict[str, list[tuple[float, float]]] = {}
    for snapshot in snapshots:
        for name, numbers in snapshot["groups"].items():
            points.setdefault(name, []).append((snapshot["step"], numbers["norm"]))
    lines = {}
    for name, pairs in points.items():
        lines[name] = _Line([x for x, _ in pairs], [y for _, y in pairs])
    λs = [snapshot["weight_decay"] for snapshot in snapshots if "weight_decay" in snapshot]
    return _Training(lines, True, λs)


def _heading(trainings: Mapping[str, _Training]) -> str | None:
    """Say the λ of all trainings, or nothing where it differs."""
    if len({tuple(training.λs[:1] + training.λs[-1:]) for training in trainings.values()}) != 1:
        return None
    λs = next(iter(trainings.values())).λs
    if not λs:
        return None
    if len(set(λs)) == 1:
        return f"λ = {λs[0]:g}"
    return f"λ from {λs[0]:g} to {λs[-1]:g}"


# -- drawing ---------------------------------------------------------------------------------------


def _panels(number: int, title: str | None) -> tuple[Figure, list[Axes]]:
    """A new figure with so many axes."""
    columns = 2 if number == 4 else min(number, _IN_A_ROW)
    rows = -(-number // columns)
    height = 3.2 if rows == 1 else 0.5 + 1.9 * rows
    figure = new_figure(6.0, height + (0.2 if title else 0))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[number:]:
        unused.set_axis_off()
    return figure, axes[:number]


def _checked(ax: Axes | Sequence[Axes], panels: Sequence[str]) -> list[Axes]:
    axes: list[Any] = list(ax.flat) if hasattr(ax, "flat") else _listed(ax)
    if len(axes) != len(panels):
        raise ArgumentError(
            "`ax` must be one axes for each panel.\n"
            f"  axes: {len(axes)}\n  panels: {len(panels)}: {', '.join(panels)}\n"
            f"  For example figure.subplots(1, {len(panels)})"
        )
    return axes


def _listed(ax: Any) -> list[Any]:
    return list(ax) if isinstance(ax, Sequence) else [ax]


def _label(axes: Sequence[Axes], ylabel: str) -> None:
    """Name the scale of the panels at the left edge, and align the names."""
    for panel in axes:
        place = panel.get_subplotspec()
        if place is None or place.is_first_col():
            panel.set_ylabel(ylabel)
    figure_of(axes[0]).align_ylabels(axes)


def _legend(where: Any, axes: Sequence[Axes], labels: Sequence[str], **place: Any) -> None:
    """Name each line once, in the order of the trainings."""
    lines: dict[str, Any] = {}
    for panel in axes:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines[label] = line
    order = [label for label in labels if label in lines]
    handles = [lines[label] for label in order]
    where.legend(handles, order, frameon=False, fontsize=9, handlelength=3.6, **place)


def _draw(ax: Any, name: str, trainings: Mapping[str, _Training]) -> None:
    for (label, training), style in zip(trainings.items(), cycle(_STYLES)):
        line = training.lines.get(name)
        if line is None:
            continue
        marker = "o" if len(line.x) == 1 else None  # a line of one point could not be seen
        ax.plot(*line, label=label, marker=marker, **(style if len(trainings) > 1 else _ALONE))
    ax.set_title(name, fontsize=10)
    ax.margins(x=0.04)
    if not ax.dataLim.width:
        ax.set_xlim(ax.dataLim.xmin - 1, ax.dataLim.xmax + 1)
    ax.set_ylim(0, 1.08 * ax.dataLim.ymax or 1)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
    ax.yaxis.get_major_locator().set_params(steps=[1, 2, 4, 5, 10])
