"""`python docs/figures/draw.py`: remakes the drawings of the pages.

The ones of the science show the numbers of science.json; the plan needs torchvision.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import wdhook
import wdhook.plot

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
# Written into the SVG as variables, so that one file serves both colour schemes.
INK, FAINT, PAPER = "#010101", "#020202", "#fefefe"
# Colour in the drawing → (name of the variable, on light paper, on dark paper).
SCHEME = {
    INK: ("ink", "#1f2328", "#e3e6ea"),
    FAINT: ("faint", "#c9ced6", "#4a4f57"),
    PAPER: ("paper", "#ffffff", "#131416"),
    # The colours of wdhook.plot.plan.
    "#ffffff": ("white", "#ffffff", "#131416"),
    "#e2e2e2": ("line", "#e2e2e2", "#34383e"),
    "#555555": ("grey", "#555555", "#a4abb3"),
    "#0072b2": ("weight", "#0072b2", "#4aa8e0"),
    "#d55e00": ("bias", "#d55e00", "#f08a3c"),
}
# Readable on both papers, and told apart by colour-blind readers (Okabe & Ito 2008); shapes and
# dashes differ too.
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


WIDE, NARROW = 7.2, 3.9  # inches: of a page, and of a telephone
NARROW_FOLDER = HERE.parent / "_static" / "figures"


def main() -> None:
    """Draw all, for pages and for telephones."""
    numbers = json.loads((HERE / "science.json").read_text())
    for width, folder in ((WIDE, HERE), (NARROW, NARROW_FOLDER)):
        save(timeline(width), folder / "timeline.svg")
        save(equilibrium(numbers["equilibrium"], width), folder / "equilibrium.svg")
        save(roles(numbers["roles"], width), folder / "roles.svg")
        points = json.loads((HERE / "growth.json").read_text())
        save(growth(points, width), folder / "growth.svg")
        if find_spec("torchvision") is not None:
            save(plan(width), folder / "plan.svg")


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that follows the reader's colour scheme."""
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text()
    light, dark = [], []
    for color, (name, on_light, on_dark) in SCHEME.items():
        if color in text:
            text = text.replace(color, f"var(--{name})")
            light.append(f"--{name}:{on_light}")
            dark.append(f"--{name}:{on_dark}")
    style = f"svg{{{';'.join(light)}}}@media(prefers-color-scheme:dark){{svg{{{';'.join(dark)}}}}}"
    lines = text.replace("<defs>", f"<style>{style}</style>\n <defs>", 1).splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def is_narrow(width: float) -> bool:
    """A telephone: panels stand below each other."""
    return width < 5


# -- the plan of a model ---------------------------------------------------------------------------


def plan(width: float) -> Figure:
    """The plan of a ResNet-50, as `wdhook.plot.plan` draws it."""
    import torch
    from torchvision.models import resnet50

    with torch.device("meta"):
        decided = wdhook.plan(resnet50(), 1e-4)
    if not is_narrow(width):
        return wdhook.plot.plan(decided)
    figure = Figure(figsize=(width, 2.4))
    return wdhook.plot.plan(decided, ax=figure.add_axes((0, 0, 1, 1)))


# -- the timeline of a step ------------------------------------------------------------------------

STAGES = ["forward", "backward", "unscale", "clip", "step\nbegins", "update", "step\nends"]
LANES = [
    (
        'coupled\nat="backward"',
        BLUE,
        {1: "hook on each p\ng += S·λ·p", 4: "fallback for p\nwhose hook\ndid not run"},
        (1, 6),
    ),
    ('coupled\nat="step"', ORANGE, {4: "g += λ·p"}, (4, 6)),
    ('decoupled\nat="step"', GREEN, {4: "p *= 1 − lr·λ"}, (4, 6)),
]
SPAN = "from the end of one step to the end of the next; in between, each p is decayed once"


def timeline(width: float) -> Figure:
    """One optimizer step; a lane for each way of decaying. On telephones time runs downwards."""
    return _timeline_down(width) if is_narrow(width) else _timeline_right(width)


def _timeline_right(width: float) -> Figure:
    figure = Figure(figsize=(width, 3.3), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-1.3, 6.65), ylim=(-3.75, 0.75))
    ax.axis("off")
    for x, stage in enumerate(STAGES):
        ax.text(x, 0.35, stage, ha="center", va="center", weight="bold")
        ax.plot([x, x], [0, -3.3], color=FAINT, linewidth=0.8, zorder=0)
    for row, (label, color, boxes, (start, end)) in enumerate(LANES):
        y = -0.6 - row
        ax.text(-1.25, y, label, va="center", family="monospace", fontsize=7.5)
        _bar(ax, [start, end], [y, y], color)
        for x, words in boxes.items():
            _box(ax, x, y, words, color, 7.5)
    _arrow(ax, (-0.3, -3.45), (6.5, -3.45))
    ax.text(3.1, -3.68, SPAN, ha="center", va="center", fontsize=8)
    return figure


def _timeline_down(width: float) -> Figure:
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-1.05, 2.6), ylim=(-7.4, 0.9))
    ax.axis("off")
    for i, stage in enumerate(STAGES):
        ax.text(-1.0, -i, stage, va="center", weight="bold", fontsize=8)
        ax.plot([-0.35, 2.5], [-i, -i], color=FAINT, linewidth=0.8, zorder=0)
    for column, (label, color, boxes, (start, end)) in enumerate(LANES):
        x = 0.05 + column
        ax.text(x, 0.65, label, ha="center", va="center", family="monospace", fontsize=6.5)
        _bar(ax, [x, x], [-start, -end], color)
        for at, words in boxes.items():
            _box(ax, x, -at, words, color, 7)
    ax.text(0.75, -7.0, SPAN.replace("; ", ";\n"), ha="center", va="center", fontsize=7.5)
    return figure


def _bar(ax: Axes, xs: list[float], ys: list[float], color: str) -> None:
    """From the decay to the end of the step, every reader of the gradient sees it decayed."""
    style = {"linewidth": 5, "alpha": 0.35, "solid_capstyle": "butt", "zorder": 1}
    ax.plot(xs, ys, color=color, **style)


def _box(ax: Axes, x: float, y: float, words: str, color: str, size: float) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": PAPER, "edgecolor": color, "linewidth": 1.6}
    ax.text(x, y, words, ha="center", va="center", fontsize=size, bbox=style, zorder=3)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1})


# -- the experiments -------------------------------------------------------------------------------


def equilibrium(runs: list[dict[str, Any]], width: float) -> Figure:
    """One layer from four starts and without decay; and all layers, measured and predicted."""
    if is_narrow(width):
        figure = Figure(figsize=(width, 6.2), layout="constrained")
        left, right = figure.subplots(2, 1)
    else:
        figure = Figure(figsize=(width, 3.2), layout="constrained")
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


def growth(points: list[dict[str, Any]], width: float) -> Figure:
    """Time of a step against the number of tensors and of elements, by `python -m benchmarks`."""
    from benchmarks.draw import draw

    if is_narrow(width):
        figure = Figure(figsize=(width, 6.4), layout="constrained")
        draw(points, list(figure.subplots(2, 1)))
        figure.axes[1].set_ylabel("milliseconds")
    else:
        figure = Figure(figsize=(width, 3.8), layout="constrained")
        draw(points, list(figure.subplots(1, 2, sharey=True)))
    return figure


def roles(report: dict[str, Any], width: float) -> Figure:
    """Held-out accuracy against decaying the weights alone, with 95 % intervals, paired by seed."""
    arms = {name: arm for name, arm in report["arms"].items() if name != "weights"}
    figure = Figure(figsize=(width, 2.7 if is_narrow(width) else 2.5), layout="constrained")
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
    label = "points of accuracy against decay on weights (mean, 95 % interval)"
    if is_narrow(width):
        label = label.replace(" against", "\nagainst").replace(" (", "\n(")
    ax.set_xlabel(label)
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    return figure


if __name__ == "__main__":
    main()
