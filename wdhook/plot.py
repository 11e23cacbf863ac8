"""Pictures of a training under weight decay; they need matplotlib (``pip install 'wdhook[demo]'``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

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


def norms(history: History, *, xlabel: str = "epoch", ylabel: str = "L2 norm") -> Figure:
    """Draw norms over training: a panel for each quantity, a line for each training.

    Args:
        history: label of the line → title of the panel → values at 0, 1, 2, ... `xlabel`.
        xlabel: of every panel.
        ylabel: of the first panel; the scales differ from panel to panel, and each begins at zero.

    Returns:
        A figure, six inches wide, that belongs to no window and to no global list: save it with
        ``figure.savefig(path)``.
    """
    from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the whole process

    panels = list(dict.fromkeys(title for values in history.values() for title in values))
    figure = Figure(figsize=(6.0, 3.2), dpi=200, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, title in zip(axes, panels, strict=True):
        _draw(ax, title, history)
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9, handlelength=3.6)
    return figure


def _draw(ax: Any, title: str, history: History) -> None:
    for (label, values), style in zip(history.items(), cycle(_STYLES)):
        ax.plot(values[title], label=label, **style)
    ax.set_title(title, fontsize=10)
    ax.margins(x=0.04)
    ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
    ax.yaxis.get_major_locator().set_params(steps=[1, 2, 4, 5, 10])
