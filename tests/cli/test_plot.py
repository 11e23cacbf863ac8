"""Pictures: what is drawn is what the data say. How they look was looked at; here their parts are
measured."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wdhook
from wdhook import plot
from wdhook.plot.plan import _DOT, parts

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402


def blocks(count: int, width: int = 8) -> nn.Module:
    """A model of many equal blocks between a first and a last layer."""
    model = nn.Module()
    model.stem = nn.Linear(4, width)
    model.layers = nn.ModuleList(
        nn.ModuleDict({"fc": nn.Linear(width, width), "norm": nn.LayerNorm(width)})
        for _ in range(count)
    )
    model.head = nn.Linear(width, 2)
    return model


def squares(figure: Any) -> Iterator[tuple[float, float, float, Any]]:
    """(x, y, side, full share) of each square of the picture, without those of the key."""
    outlines = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_linewidth()]
    fills = [
        p for p in figure.axes[0].patches if isinstance(p, Rectangle) and not p.get_linewidth()
    ]
    for outline, fill in zip(outlines, fills, strict=True):
        if outline.get_edgecolor() != matplotlib.colors.to_rgba("#555555"):
            middle = (
                outline.get_x() + outline.get_width() / 2,
                outline.get_y() + outline.get_height() / 2,
            )
            yield (*middle, outline.get_width(), abs(fill.get_height()) / outline.get_height())


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream)
    return stream.getvalue()


# -- plans -----------------------------------------------------------------------------------------


def test_the_area_is_the_number_of_elements() -> None:
    """Squares that are larger than a dot have areas that stand to each other as the elements do;
    the rest are dots."""
    plan = wdhook.plan(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 10), nn.Linear(10, 2)), 0.1)
    drawn = sorted(squares(plot.plan(plan)))
    weights = [(side, share) for x, y, side, share in drawn if y == min(y for _, y, _, _ in drawn)]
    largest = weights[0][0]
    # The side is a root of a product of floats; sums of positions of a few inches leave 1e-15.
    for (side, share), numel in zip(weights, (1600, 400, 20), strict=True):
        assert side == pytest.approx(largest * math.sqrt(numel / 1600), abs=1e-12)
        assert share == pytest.approx(1.0, abs=1e-12)
    tiny = wdhook.plan(nn.Sequential(nn.Linear(4000, 4000), nn.LayerNorm(4)), 0.1)
    assert sorted(side for _, _, side, _ in squares(plot.plan(tiny)))[0] == pytest.approx(
        _DOT, abs=1e-12
    )


def test_full_is_decayed_and_empty_is_exempt() -> None:
    """A square is as full as the decayed share of its elements."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    shares = lambda plan: sorted(share for _, _, _, share in squares(plot.plan(plan)))  # noqa: E731
    assert shares(wdhook.plan(model, 0.1)) == pytest.approx([0, 0, 1, 1], abs=1e-12)
    # Thirty layers are fifteen columns of two, and of the first column one half is exempt.
    many = wdhook.plan(
        nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(30))),
        0.1,
        overrides={"0.*": 0.0},
    )
    assert sorted(share for *_, share in squares(plot.plan(many))) == pytest.approx(
        [0.5, *[1] * 14], abs=1e-12
    )


def test_columns_follow_the_model() -> None:
    """Each block is a column, in the order of the model; too many blocks are joined, and every
    parameter is in one."""
    few = parts(list(wdhook.plan(blocks(5), 0.1).values()))
    assert [part.label for part in few] == [
        "stem",
        *(f"layers.{i}.{k}" for i in range(5) for k in ("fc", "norm")),
        "head",
    ]
    some = parts(list(wdhook.plan(blocks(12), 0.1).values()))
    assert [part.label for part in some] == ["stem", *(f"layers.{i}" for i in range(12)), "head"]
    for count in (1, 12, 32, 200):
        plan = wdhook.plan(blocks(count), 0.1)
        columns = parts(list(plan.values()))
        assert len(columns) <= 20, count
        assert [d.name for part in columns for d in part.decisions] == list(plan), count
    assert "layers.0-1" in {
        part.label for part in parts(list(wdhook.plan(blocks(32), 0.1).values()))
    }


def test_names_without_numbers_are_joined_too() -> None:
    """A model with a thousand parameters of its own, and none in blocks, has no more columns than
    others."""
    flat = nn.ParameterDict(
        {f"p{chr(97 + i % 26)}{i // 26 * 'x'}": nn.Parameter(torch.ones(2, 2)) for i in range(300)}
    )
    plan = wdhook.plan(flat, 0.1)
    columns = parts(list(plan.values()))
    assert len(columns) <= 20
    assert [d.name for part in columns for d in part.decisions] == list(plan)


@pytest.mark.parametrize("count", [1, 12, 60])
def test_everything_is_inside_the_picture(count: int) -> None:
    """No square and no text reaches over the edge, six inches wide; and no two squares overlap."""
    figure = plot.plan(wdhook.plan(blocks(count), 0.1))
    assert figure.get_figwidth() == 6.0
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for artist in (*figure.axes[0].texts, *figure.axes[0].patches):
        box = artist.get_window_extent()
        assert box.x0 >= 0, artist
        assert box.y0 >= 0, artist
        assert box.x1 <= width, artist
        assert box.y1 <= height, artist
    drawn = list(squares(figure))
    for i, (x, y, side, _) in enumerate(drawn):
        for u, v, other, _ in drawn[:i]:
            assert max(abs(x - u), abs(y - v)) >= (side + other) / 2


def test_the_text_says_how_much() -> None:
    """The heading is that of the table; each role has its totals; the key has a square to compare
    with."""
    plan = wdhook.plan(blocks(3), 0.1)
    found = texts(plot.plan(plan))
    assert found[0] == str(plan).partition("\n")[0]
    assert {"weight", "bias", "norm", "decayed", "exempt", "50 elements"} <= set(found)
    weights = [d for d in plan.values() if d.role == "weight"]
    assert f"{len(weights)} tensors, {sum(d.numel for d in weights)}" in found


def test_a_plan_without_parameters() -> None:
    """There is nothing to draw, and that is said."""
    with pytest.raises(wdhook.ArgumentError, match="`plan` has no parameters to draw"):
        plot.plan(wdhook.plan(nn.ReLU(), 0.1))


def test_lazy_and_scalar_parameters() -> None:
    """Parameters without a size yet are dots, and a part of a plan is drawn like a whole one."""
    plan = wdhook.plan(nn.Sequential(nn.LazyLinear(3), nn.PReLU()), 0.1)
    assert png(plot.plan(plan)).startswith(b"\x89PNG")
    assert png(plot.plan(plan.exempt)).startswith(b"\x89PNG")
    assert png(plot.plan(dict(plan))).startswith(b"\x89PNG")


# -- norms -----------------------------------------------------------------------------------------


class Snapshot:
    """What `WeightDecay.snapshot` returns, as far as a picture needs it."""

    def __init__(self, step: int, **norms: float) -> None:
        self.step = step
        self._norms = norms

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "groups": {name: {"norm": value} for name, value in self._norms.items()},
        }


def drawn(figure: Any) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Title of the panel → label of the line → its points."""
    return {
        ax.get_title(): {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in ax.get_lines()
        }
        for ax in figure.axes
        if ax.get_title()
    }


def test_histories_are_drawn_by_training() -> None:
    """Values at 0, 1, 2 ...: a panel for each quantity, a line for each training."""
    figure = plot.norms(
        {"(a)": {"w": [3.0, 2.0], "γ": [1.0, 1.0]}, "(b)": {"w": [3.0, 1.0], "γ": [1.0, 0.5]}}
    )
    assert drawn(figure) == {
        "w": {"(a)": ([0, 1], [3.0, 2.0]), "(b)": ([0, 1], [3.0, 1.0])},
        "γ": {"(a)": ([0, 1], [1.0, 1.0]), "(b)": ([0, 1], [1.0, 0.5])},
    }
    assert {ax.get_xlabel() for ax in figure.axes} == {"epoch"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["(a)", "(b)"]


def test_snapshots_are_drawn_by_group() -> None:
    """A list of snapshots or of their dicts: a panel for each group, at the steps of each."""
    snapshots = [Snapshot(0, weight=4.0, bias=1.0), Snapshot(50, weight=2.0, bias=1.5)]
    figure = plot.norms(snapshots)
    points = {title: list(lines.values()) for title, lines in drawn(figure).items()}
    assert points == {"weight": [([0, 50], [4.0, 2.0])], "bias": [([0, 50], [1.0, 1.5])]}
    assert {ax.get_xlabel() for ax in figure.axes} == {"step"}
    assert not figure.legends
    assert png(figure) == png(plot.norms([s.to_dict() for s in snapshots]))


def test_a_group_that_comes_later_has_a_line_from_there() -> None:
    """An adapter that was added in training begins where it was added; a training without it is in
    the legend."""
    one = [
        Snapshot(0, weight=4.0),
        Snapshot(10, weight=3.0, scale=1.0),
        Snapshot(20, weight=2.0, scale=2.0),
    ]
    figure = plot.norms(
        {"with": one, "without": [Snapshot(0, weight=4.0), Snapshot(20, weight=5.0)]}
    )
    assert drawn(figure)["scale"] == {"with": ([10, 20], [1.0, 2.0])}
    assert drawn(figure)["weight"]["without"] == ([0, 20], [4.0, 5.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["with", "without"]


def test_snapshots_of_a_training() -> None:
    """What a handle gives is what is drawn: the norm of the weights, measured here by torch."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshots, measured = [], []
    with wdhook.attach(model, 0.1) as decay:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            snapshots.append(decay.snapshot(by="role"))
            measured.append(model.weight.detach().double().norm().item())
    ((steps, norms),) = drawn(plot.norms(snapshots))["weight"].values()
    assert steps == [1, 2, 3]
    # A norm of six float32: its sum of squares has a relative error of at most 6·2⁻²⁴ ≈ 4e-7.
    assert norms == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("count", range(1, 8))
def test_any_number_of_panels(count: int) -> None:
    """One to seven quantities fit into six inches; none is left out, and each begins at zero."""
    groups = {f"role{i}": float(i + 1) for i in range(count)}
    figure = plot.norms([Snapshot(step, **groups) for step in (0, 10)])
    assert list(drawn(figure)) == list(groups)
    assert figure.get_figwidth() == 6.0
    assert all(ax.get_ylim()[0] == 0 < ax.get_ylim()[1] for ax in figure.axes if ax.get_title())
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("nothing", [{}, [], {"a": {}}, {"a": []}])
def test_nothing_to_draw(nothing: Any) -> None:
    """An empty history is an error that says what to give."""
    with pytest.raises(wdhook.ArgumentError, match="`history` has no values to draw"):
        plot.norms(nothing)


def test_the_title_says_λ() -> None:
    """That of snapshots, where all trainings have the same; a title that is given replaces it."""
    constant = [{"step": i, "weight_decay": 0.1, "groups": {"w": {"norm": 1.0}}} for i in range(2)]
    rising = [dict(s, weight_decay=λ) for s, λ in zip(constant, (0.04, 0.4), strict=True)]
    heading = lambda figure: figure.get_suptitle()  # noqa: E731
    assert heading(plot.norms(constant)) == "λ = 0.1"
    assert heading(plot.norms(rising)) == "λ from 0.04 to 0.4"
    assert heading(plot.norms(constant, title="mine")) == "mine"
    named = plot.norms({"a": constant, "b": constant})
    assert named.legends[0].get_title().get_text() == "λ = 0.1"
    assert plot.norms({"a": constant, "b": rising}).legends[0].get_title().get_text() == ""


# -- axes of the caller ----------------------------------------------------------------------------


def test_a_plan_is_drawn_into_given_axes() -> None:
    """`ax=` draws there and returns its figure; a narrow place has fewer columns, in the same
    model."""
    figure = Figure(figsize=(8, 7))
    above, below = figure.subplots(2, 1)
    decided = wdhook.plan(blocks(12), 0.1)
    assert plot.plan(decided, ax=above) is figure
    assert not below.texts
    narrow = Figure(figsize=(4, 4))
    plot.plan(decided, ax=narrow.add_axes((0, 0, 1, 1)))
    assert 0 < len(list(squares(narrow))) < len(list(squares(figure)))
    narrow.canvas.draw()
    for artist in (*narrow.axes[0].texts, *narrow.axes[0].patches):
        box = artist.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= narrow.bbox.width, artist


def test_norms_are_drawn_into_given_axes() -> None:
    """`ax=` is one axes for each panel; a wrong number is an error that says how many there are."""
    figure = Figure()
    axes = figure.subplots(1, 2)
    snapshots = [Snapshot(step, weight=1.0, bias=2.0) for step in (0, 10)]
    assert plot.norms(snapshots, ax=axes) is figure
    assert [ax.get_title() for ax in axes] == ["weight", "bias"]
    assert figure.get_suptitle() == ""
    alone = Figure()
    assert plot.norms([Snapshot(0, weight=1.0)], ax=alone.subplots()) is alone
    with pytest.raises(wdhook.ArgumentError, match="panels: 2: weight, bias"):
        plot.norms(snapshots, ax=axes[:1])


def test_the_sizes_of_the_key_are_no_squares_of_the_plan() -> None:
    """Sizes are dashed lines, fills are squares: an empty square means exempt, and nothing else."""
    figure = plot.plan(wdhook.plan(blocks(3), 0.1))
    grey = matplotlib.colors.to_rgba("#555555")
    outlines = [
        p for p in figure.axes[0].patches if p.get_linewidth() and p.get_edgecolor() == grey
    ]
    assert len(outlines) == 2  # decayed and exempt
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1


# -- both ------------------------------------------------------------------------------------------


def test_no_trace_in_the_process(tmp_path: Path) -> None:
    """Neither picture touches pyplot or the settings of matplotlib; the same data give the same
    bytes."""
    import sys

    before = {key: matplotlib.rcParams._get(key) for key in matplotlib.rcParams}
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plan = wdhook.plan(blocks(3), 0.1)
    assert png(plot.plan(plan)) == png(plot.plan(plan))
    assert png(plot.norms([Snapshot(1, weight=1.0)])) == png(plot.norms([Snapshot(1, weight=1.0)]))
    assert png(plot.plan(plan)) != png(plot.plan(wdhook.plan(blocks(4), 0.1)))
    assert {key: matplotlib.rcParams._get(key) for key in matplotlib.rcParams} == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
