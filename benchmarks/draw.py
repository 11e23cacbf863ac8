"""Draws how the cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Paul Tol's bright scheme, which colour-blind readers can tell apart; the reference is grey.
STYLES = {
    "bare hook": ("0.5", "--", "o"),
    "at backward": ("#4477AA", "-", "o"),
    "foreach call, coupled": ("0.5", ":", "s"),
    "coupled at step": ("#EE6677", "-", "s"),
    "foreach call, decoupled": ("0.5", ":", "^"),
    "decoupled at step": ("#228833", "-", "^"),
}


def draw(points: list[dict[str, Any]], axes: Sequence[Any]) -> None:
    """Draw time against the number of tensors, and against their size, into two axes."""
    for axis, along in zip(axes, ("parameters", "elements"), strict=True):
        for variant, (color, line, marker) in STYLES.items():
            mine = [p for p in points if p["along"] == along and p["variant"] == variant]
            sizes, times = [p["size"] for p in mine], [1000 * p["seconds"] for p in mine]
            axis.loglog(
                sizes,
                times,
                color=color,
                linestyle=line,
                marker=marker,
                markersize=4,
                label=variant,
            )
        axis.set_xlabel("tensors of 16×16" if along == "parameters" else "elements, in 8 tensors")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure = axes[0].figure
    columns = 3 if figure.get_figwidth() > 5 else 2
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
