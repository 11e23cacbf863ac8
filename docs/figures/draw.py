"""`python docs/figures/draw.py`: remake the drawings of the pages; their numbers: science.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
# Written into the SVG as variables, so that one file serves both colour schemes.
INK, FAINT, PAPER = "#010101", "#020202", "#fefefe"
SCHEMES = (
    "svg{--ink:#1f2328;--faint:#c9ced6;--paper:#ffffff}"
    "@media(prefers-color-scheme:dark){svg{--ink:#e3e6ea;--faint:#4a4f57;--paper:#131416}}"
)
# Readable on light and dark pages, and for colour-blind readers (Okabe & Ito 2008);
# shapes and dashes differ too.
BLUE, ORANGE, GREEN = "#3a8fd0", "#d9720b", "#10a37f"

matplotlib.rcParams.update(
    {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK
        ),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
        "grid.color": FAINT,
        "font.size": 9,
        "svg.hashsalt": "wdhook",  # the same file each time
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def main() -> None:
    """Draw all."""
    numbers = json.loads((HERE / "science.json").read_text())
    save(timeline(), "timeline.svg")
    save(equilibrium(numbers["equilibrium"]), "equilibrium.svg")
    save(roles(numbers["roles"]), "roles.svg")


def save(figure: Figure, name: str) -> None:
    """Write an SVG that follows the reader's colour scheme."""
    path = HERE / name
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text()
    for color, variable in ((INK, "ink"), (FAINT, "faint"), (PAPER, "paper")):
        text = text.replace(color, f"var(--{variable})")
    lines = text.replace("<defs>", f"<style>{SCHEMES}</style>\n <defs>", 1).splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")


# -- the timeline of a step ------------------------------------------------------------------------

STAGES = ["forward", "backward", "unscale", "clip", "step\nbegins", "update", "step\nends"]
LANES = [
    (
        'coupled\nat="backward"',
        BLUE,
        {1: "hook on each p\ng += S·λ·p", 4: "the net:\nwhat no hook\nhas reached"},
        (1, 6),
    ),
    ('coupled\nat="step"', ORANGE, {4: "g += λ·p"}, (4, 6)),
    ('decoupled\nat="step"', GREEN, {4: "p *= 1 − lr·λ"}, (4, 6)),
]


def timeline() -> Figure:
    """One optimizer step from left to right; a lane for each moment of decay."""
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-1.3, 6.65), ylim=(-3.75, 0.75))
    ax.axis("off")
    for x, stage in enumerate(STAGES):
        ax.text(x, 0.35, stage, ha="center", va="center", weight="bold")
        ax.plot([x, x], [0, -3.3], color=FAINT, linewidth=0.8, zorder=0)
    for row, (label, color, boxes, (start, end)) in enumerate(LANES):
        y = -0.6 - row
        ax.text(-1.25, y, label, va="center", family="monospace", fontsize=7.5)
        # From the decay to the end of the step every reader of the gradient (or the parameter)
        # sees the decay.
        ax.plot(
            [start, end],
            [y, y],
            color=color,
            linewidth=5,
            alpha=0.35,
            solid_capstyle="butt",
            zorder=1,
        )
        for x, words in boxes.items():
            style = {
                "boxstyle": "round,pad=0.35",
                "facecolor": PAPER,
                "edgecolor": color,
                "linewidth": 1.6,
            }
            ax.text(x, y, words, ha="center", va="center", fontsize=7.5, bbox=style, zorder=3)
    ax.annotate(
        "",
        (6.5, -3.45),
        (-0.3, -3.45),
        arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1},
    )
    ax.text(
        3.1,
        -3.68,
        "a window: from the end of one step to the end of the next; in it, each p is decayed once",
        ha="center",
        va="center",
        fontsize=8,
    )
    return figure


# -- the experiments -------------------------------------------------------------------------------


def equilibrium(runs: list[dict[str, Any]]) -> Figure:
    """Left: one layer from four starts, and without decay. Right: every layer and the theory."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    layer = "block1.conv1.weight"
    first = [run for run in runs if run["seed"] == 0]
    starts = [run for run in first if (run["lr"], run["weight_decay"]) == (0.1, 0.04)]
    for run in starts:
        norms = run["layers"][layer]["norms"]
        left.plot(
            range(0, 20 * len(norms), 20),
            norms,
            color=BLUE,
            label="λ = 0.04, four starts" if run is starts[0] else None,
        )
    free = next(run for run in first if not run["weight_decay"])["layers"][layer]["norms"]
    left.plot(range(0, 20 * len(free), 20), free, color=ORANGE, linestyle="--", label="no decay")
    left.axhline(
        starts[0]["layers"][layer]["predicted"], color=INK, linestyle=":", label="prediction"
    )
    left.set(xlabel="step", ylabel=f"‖w‖ of {layer.removesuffix('.weight')}", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    groups = [
        ("lr 0.1, λ 0.04", (0.1, 0.04, 0.0), BLUE, "o"),
        ("lr 0.1, λ 0.02", (0.1, 0.02, 0.0), ORANGE, "s"),
        ("lr 0.4, λ 0.005", (0.4, 0.005, 0.0), GREEN, "^"),
        ("lr 0.01, λ 0.02, momentum 0.9", (0.01, 0.02, 0.9), INK, "x"),
    ]
    for label, key, color, marker in groups:
        mine = [
            r
            for r in runs
            if (r["lr"], r["weight_decay"], r["momentum"]) == key and r["factor"] == 1
        ]
        points = [
            (layer["predicted"], layer["norm"]) for run in mine for layer in run["layers"].values()
        ]
        hollow = {} if marker == "x" else {"markerfacecolor": "none"}
        right.plot(
            *zip(*points, strict=True), marker, color=color, markersize=4, label=label, **hollow
        )
    _diagonal(right)
    right.set(xlabel="predicted ‖w‖", ylabel="measured ‖w‖")
    right.legend(frameon=False, fontsize=7.5)
    return figure


def _diagonal(ax: Axes) -> None:
    ax.axline((1, 1), slope=1, color=FAINT, zorder=0)
    ax.set_xlim(0, None)
    ax.set_ylim(0, None)


def roles(report: dict[str, Any]) -> Figure:
    """Held-out accuracy against decay of weights alone; 95 % intervals of paired differences."""
    arms = {name: arm for name, arm in report["arms"].items() if name != "weights"}
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    ax = figure.subplots()
    for y, arm in enumerate(reversed(arms.values())):
        ax.errorbar(
            100 * arm["difference"],
            y,
            xerr=100 * arm["interval"],
            fmt="o",
            color=BLUE,
            capsize=3,
            markersize=4,
        )
    ax.set_yticks(range(len(arms)), [f"decay on {name}" for name in reversed(arms)])
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_xlabel("points of accuracy against decay on weights (mean, 95 % interval)")
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    return figure


if __name__ == "__main__":
    main()
