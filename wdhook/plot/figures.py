"""New figures, without pyplot, and the figure of given axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, *, constrained: bool = True) -> Figure:
    """Make a figure of so many inches that belongs to no window and to no global list.

    pyplot would keep a reference, and choose a backend for the whole process.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=200, layout="constrained" if constrained else None)


def figure_of(ax: Any) -> Figure:
    """Find the whole figure of axes, also for axes in a subfigure."""
    figure: Figure = ax.figure.canvas.figure
    return figure
