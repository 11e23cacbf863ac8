"""The picture of an audit: how much the scale of each parameter matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._audit.finding import Finding
from .._audit.operations import Use
from .._audit.table import headlines
from .._base.text import fold_by
from .figures import figure_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .._audit.report import Audit

Place = tuple[int, Finding]
"""The number of a parameter in the order of the model, and its finding."""

# Okabe & Ito's colours, which colour-blind readers can tell apart; the markers differ too. Uses
# that are decayed are filled, the others are not.
_STYLES: dict[str, tuple[str, str, frozenset[Use]]] = {
    "contraction": ("#0072B2", "o", frozenset({Use.CONTRACTION})),
    "lookup": ("#D55E00", "s", frozenset({Use.LOOKUP})),
    "norm, multiplication, slope": (
        "#009E73",
        "^",
        frozenset({Use.NORM, Use.MULTIPLICATION, Use.SLOPE, Use.CONSTANT}),
    ),
    "addition, token": ("#CC79A7", "D", frozenset({Use.ADDITION, Use.TOKEN})),
    "not known": ("#555555", "x", frozenset({Use.OTHER, Use.OPAQUE, Use.UNUSED})),
}
_FILLED = ("contraction", "lookup", "not known")
_LOWEST = 1e-17  # rounding alone: what is below is drawn here
_NAMED = 6  # names in a picture
_RARE = 0.25  # the largest share of the decayed parameters that counts as outliers


def audit(audit: Audit, *, ax: Axes | None = None) -> Figure:
    """Draw how much the scale of each parameter matters, in the order of the model.

    Each mark is a parameter, at its sensitivity √n·abs⟨w, g⟩/(‖w‖·‖g‖): about 1 where weight
    decay regularizes, below the threshold where it acts on the step size alone. Parameters
    without a gradient are not drawn. Those whose use contradicts the plan have a ring and their
    name; the other outliers, which are the few on one side of the threshold, have their name.

    Args:
        audit: of `wdhook.audit`, not of a model on the meta device.
        ax: axes to draw in, for a figure of your own. None makes a figure.

    Returns:
        The figure of `ax`; or a new one, six inches wide, that belongs to no window and to no
        global list: save it with ``figure.savefig(path)``.
    """
    own = ax is None
    axes: Any = new_figure(6.0, 3.4).subplots() if ax is None else ax
    drawn = [(i, f) for i, f in enumerate(audit.values()) if f.sensitivity is not None]
    _draw_marks(axes, drawn)
    _draw_threshold(axes, audit.threshold)
    _draw_names(axes, drawn, len(audit))
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST / 3, max([10.0, *(2 * (f.sensitivity or 0) for _, f in drawn)]))
    axes.set_xlim(-0.5, max(len(audit), 1) - 0.5)
    axes.set_xlabel("parameter, in the order of the model")
    axes.set_ylabel("how much its scale matters")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure = figure_of(axes)
    if own:
        _draw_legend(figure, headlines(audit)[0], bool(drawn))
    elif drawn:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_legend(figure: Any, title: str, named: bool) -> None:
    """Put the title, and the legend below it, above the axes of a figure of ours."""
    font = {"size": 9, "weight": "bold"}
    if named:
        place = {"loc": "outside upper center", "ncols": 3, "frameon": False, "fontsize": 8}
        figure.legend(title=title, title_fontproperties=font, **place)
    else:
        figure.suptitle(title, fontsize=9, weight="bold")


def _draw_threshold(ax: Any, threshold: float | None) -> None:
    if threshold is None:
        return
    ax.axhline(threshold, color="#555555", linewidth=0.8, linestyle=(0, (4, 2)))
    ax.axhspan(_LOWEST / 3, threshold, color="#EEEEEE", zorder=0)
    ax.text(
        0.99,
        threshold / 2,
        "decay acts on the step size alone",
        transform=ax.get_yaxis_transform(),
        ha="right",
        va="top",
        fontsize=8,
        color="#333333",
    )


def _draw_marks(ax: Any, drawn: list[Place]) -> None:
    for label, (color, marker, uses) in _STYLES.items():
        _marks(ax, label, [(i, f) for i, f in drawn if f.use in uses], color=color, marker=marker)
    wrong = [(i, f) for i, f in drawn if f.agrees is False]
    if wrong:
        style = {"s": 70, "marker": "o", "facecolors": "none", "edgecolors": "black"}
        ax.scatter(*_places(wrong), label="contradicts the plan", **style)


def _draw_names(ax: Any, drawn: list[Place], count: int) -> None:
    """Write the names of outliers beside their marks, towards the middle of the axes."""
    place = {id(f): i for i, f in drawn}
    for label, finding in outliers([f for _, f in drawn])[:_NAMED]:
        i = place[id(finding)]
        is_left = i < count / 2
        ax.annotate(
            label,
            (i, max(finding.sensitivity or 0.0, _LOWEST)),
            xytext=(9 if is_left else -9, -9),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="top",
            fontsize=7,
            color="#333333",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#333333", "shrinkB": 3},
        )


def outliers(findings: list[Finding]) -> list[tuple[str, Finding]]:
    """Find what contradicts the plan, and what lies alone on its side of the threshold.

    Returns:
        (label, first finding) of neighbours that differ in the numbers of their names.
    """
    wrong = [f for f in findings if f.agrees is False]
    decayed = [f for f in findings if f.should_decay and f.agrees is not False]
    free = [f for f in decayed if f.invariant]
    bound = [f for f in decayed if not f.invariant]
    few = min(free, bound, key=len)
    rare = few if len(few) <= len(decayed) * _RARE else []
    return [*fold_by(wrong, lambda f: f.use), *fold_by(rare, lambda f: f.use)]


def _marks(ax: Any, label: str, found: list[Place], *, color: str, marker: str) -> None:
    if found:
        style = (
            {"color": color} if label in _FILLED else {"facecolors": "none", "edgecolors": color}
        )
        ax.scatter(*_places(found), s=16, marker=marker, linewidths=1.0, label=label, **style)


def _places(found: list[Place]) -> tuple[list[int], list[float]]:
    return [i for i, _ in found], [max(f.sensitivity or 0.0, _LOWEST) for _, f in found]
