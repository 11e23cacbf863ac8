"""Pictures of a training under weight decay; they need matplotlib (``pip install 'wdhook[demo]'``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from .._base.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Mapping[str, Mapping[str, Sequence[float]]]

# Colours that colour-blind readers can tell apart (Okabe & Ito 2008, Tol); dashes and widths differ too. The third is
# a broad band behind all others, the fourth lies on top with wide gaps: lines that coincide stay visible.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#AA3377", "linestyle": (0, (1, 1.2)), "linewidth": 2.2, "zorder": 3},
    {"color": "#D55E00", "linestyle": (0, (6, 1.5, 1, 1.5)), "linewidth": 1.8, "zorder": 4},
    {"color": "#8CCBF0", "linestyle": "solid", "linewidth": 6.0, "zorder": 2.5},
    {"color": "#000000", "linestyle": (0, (3, 4)), "linewidth": 1.8, "zorder": 5},
)
_ALONE = {"color": "#0072B2", "linewidth": 1.8}
_IN_A_ROW = 3  # panels


class _Line(NamedTuple):
    """The values of one quantity in one training."""

    x: Sequence[float]
    y: Sequence[float]


def norms(
    history: History | Sequence[Any] | Mapping[str, Sequence[Any]],
    *,
    xlabel: str | None = None,
    ylabel: str = "L2 norm",
) -> Figure:
    """Draw norms over training: a panel for each quantity, a line for each training.

    Args:
        history: label of the line → title of the panel → values at 0, 1, 2, ... `xlabel`. Or a list of snapshots, of
            `WeightDecay.snapshot` or what their ``to_dict()`` gives, whose groups are the panels; or label of the
            line → such a list.
        xlabel: of every panel; None is ``"step"`` for snapshots, else ``"epoch"``.
        ylabel: of the first panel; the scales differ from panel to panel, and each begins at zero.

    Returns:
        A figure, six inches wide, that belongs to no window and to no global list: save it with
        ``figure.savefig(path)``.

    Raises:
        ArgumentError: there is nothing to draw.
    """
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: it would choose a backend for the whole process

    trainings = dict(history) if isinstance(history, Mapping) else {"": history}
    of_snapshots = any(not isinstance(training, Mapping) for training in trainings.values())
    lines = {label: _lines(training) for label, training in trainings.items()}
    panels = list(dict.fromkeys(title for known in lines.values() for title in known))
    if not panels:
        raise ArgumentError(
            "`history` has no values to draw.\n  Give snapshots: [decay.snapshot(), ...]"
        )
    columns = 2 if len(panels) == 4 else min(len(panels), _IN_A_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(6.0, 3.2 if rows == 1 else 0.5 + 1.9 * rows), dpi=200, layout="constrained"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, title in zip(axes, panels, strict=False):
        _draw(ax, title, lines)
        ax.set_xlabel(xlabel or ("step" if of_snapshots else "epoch"))
    for ax in axes[::columns]:
        ax.set_ylabel(ylabel)
    figure.align_ylabels(axes)
    if any(lines):
        named = {
            label: line
            for ax in axes
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        order = [label for label in lines if label in named]
        figure.legend(
            [named[label] for label in order], order,
            loc="outside upper center", ncols=2, frameon=False, fontsize=9, handlelength=3.6,
        )  # fmt: skip
    return figure


def _lines(training: Any) -> dict[str, _Line]:
    """Title of the panel → its line, for either kind of training."""
    if isinstance(training, Mapping):
        return {title: _Line(range(len(values)), values) for title, values in training.items()}
    snapshots = [s if isinstance(s, Mapping) else s.to_dict() for s in training]
    groups = dict.fromkeys(name for snapshot in snapshots for name in snapshot["groups"])
    return {
        name: _Line(
            [s["step"] for s in snapshots if name in s["groups"]],
            [s["groups"][name]["norm"] for s in snapshots if name in s["groups"]],
        )
        for name in groups
    }


def _draw(ax: Any, title: str, lines: Mapping[str, Mapping[str, _Line]]) -> None:
    for (label, known), style in zip(lines.items(), cycle(_STYLES)):
        if title in known:
            marker = (
                "o" if len(known[title].x) == 1 else None
            )  # a line of one point could not be seen
            ax.plot(
                *known[title], label=label, marker=marker, **(style if len(lines) > 1 else _ALONE)
            )
    ax.set_title(title, fontsize=10)
    ax.margins(x=0.04)
    if not ax.dataLim.width:
        ax.set_xlim(ax.dataLim.xmin - 1, ax.dataLim.xmax + 1)
    ax.set_ylim(0, 1.08 * ax.dataLim.ymax or 1)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
    ax.yaxis.get_major_locator().set_params(steps=[1, 2, 4, 5, 10])
