"""The picture of an audit: how much the scale of each parameter matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._audit.operations import Use

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .._audit.finding import Finding
    from .._audit.report import Audit

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


def audit(audit: Audit) -> Figure:
    """Draw how much the scale of each parameter matters, in the order of the model.

    Each mark is a parameter, at its sensitivity √n·abs⟨w, g⟩/(‖w‖·‖g‖): about 1 where weight
    decay regularizes, below the threshold where it acts on the step size alone. Parameters
    without a gradient are not drawn; those whose use contradicts the plan have a ring.

    Args:
        audit: of `wdhook.audit`, not of a model on the meta device.

    Returns:
        A figure, six inches wide, that belongs to no window and to no global list: save it with
        ``figure.savefig(path)``.
    """
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: it would choose a backend for the whole process

    figure = Figure(figsize=(6.0, 3.2), dpi=200, layout="constrained")
    ax: Any = figure.subplots()
    drawn = [(i, f) for i, f in enumerate(audit.values()) if f.sensitivity is not None]
    for label, (color, marker, uses) in _STYLES.items():
        _marks(ax, label, [(i, f) for i, f in drawn if f.use in uses], color=color, marker=marker)
    wrong = [(i, f) for i, f in drawn if f.agrees is False]
    if wrong:
        ax.scatter(
            *_places(wrong),
            s=70,
            marker="o",
            facecolors="none",
            edgecolors="black",
            label="contradicts the plan",
        )
    if audit.threshold is not None:
        ax.axhline(audit.threshold, color="#555555", linewidth=0.8, linestyle=(0, (4, 2)))
        ax.axhspan(_LOWEST / 3, audit.threshold, color="#EEEEEE", zorder=0)
        ax.text(
            0.99,
            audit.threshold / 2,
            "decay acts on the step size alone",
            transform=ax.get_yaxis_transform(),
            ha="right",
            va="top",
            fontsize=8,
            color="#333333",
        )
    ax.set_yscale("log")
    ax.set_ylim(_LOWEST / 3, max([10.0, *(2 * (f.sensitivity or 0) for _, f in drawn)]))
    ax.set_xlim(-0.5, max(len(audit), 1) - 0.5)
    ax.set_xlabel("parameter, in the order of the model")
    ax.set_ylabel("how much its scale matters")
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    if drawn:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _marks(
    ax: Any, label: str, found: list[tuple[int, Finding]], *, color: str, marker: str
) -> None:
    if found:
        style = (
            {"color": color} if label in _FILLED else {"facecolors": "none", "edgecolors": color}
        )
        ax.scatter(*_places(found), s=16, marker=marker, linewidths=1.0, label=label, **style)


def _places(found: list[tuple[int, Finding]]) -> tuple[list[int], list[float]]:
    return [i for i, _ in found], [max(f.sensitivity or 0.0, _LOWEST) for _, f in found]
