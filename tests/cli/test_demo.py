"""The demo: what it prints, what it compares, and that it leaves no trace in the process."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import wdhook
from wdhook import cli, plot
from wdhook._commands import digits as _demo
from wdhook._commands.digits_timing import meaning, paired_ratio

ROW = re.compile(
    r"^ *(\([a-d]\)) .*?  +(\d+\.\d+)% +(\d+\.\d+) +(\d+\.\d+) +(1|–|\d+\.\d+ \(.*\)) *$",
    re.MULTILINE,
)
PNG = b"\x89PNG\r\n\x1a\n"


class Ran(NamedTuple):
    """A run of the command: exit status, what it printed, the picture."""

    status: int
    out: str
    err: str
    png: bytes

    def rows(self) -> dict[str, tuple[float, ...]]:
        """Arm → accuracy, norm of weights, norm of gammas."""
        return {arm: tuple(map(float, numbers)) for arm, *numbers, _ in ROW.findall(self.out)}

    def without_times(self) -> str:
        rows = ROW.sub(lambda row: row[0][: row.start(5) - row.start()].rstrip(), self.out)
        return re.sub(r"(?m)^  \(d\) and \(c\): .*(\n  tiny; .*)?$", "", rows)


def run(folder: Path, epochs: int = 2, seed: int = 0) -> Ran:
    out, err, png = StringIO(), StringIO(), folder / "norms.png"
    # The name of the picture is printed too.
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        status = cli.main(["demo", "--epochs", str(epochs), "--seed", str(seed), "--out", png.name])
    return Ran(status, out.getvalue(), err.getvalue(), png.read_bytes())


def snapshot() -> dict[str, Any]:
    """The state of the process that a function has no business to change."""
    import matplotlib as mpl

    return {
        "threads": torch.get_num_threads(),
        "random numbers": torch.random.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "step hooks": (
            len(torch_optimizer._global_optimizer_pre_hooks),
            len(torch_optimizer._global_optimizer_post_hooks),
        ),
        "matplotlib": {key: mpl.rcParams._get(key) for key in mpl.rcParams},
    }


class Short(NamedTuple):
    """A short run, and the state of the process around it."""

    ran: Ran
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Short:
    before = snapshot()
    ran = run(tmp_path_factory.mktemp("demo"))
    return Short(ran, before, snapshot())


def test_ends_well_and_says_so(short: Short) -> None:
    """Exit status 0 and one sentence on what was found equal: each loss, every parameter and
    buffer."""
    assert short.ran.status == 0
    assert "are equal to the last bit" in short.ran.out
    assert "each of 30 steps, and all 38 parameters and buffers" in short.ran.out


def test_the_table_has_four_rows(short: Short) -> None:
    """Accuracy and norms of four trainings; the last two are equal, the others are not."""
    rows = short.ran.rows()
    assert list(rows) == ["(a)", "(b)", "(c)", "(d)"]
    assert rows["(c)"] == rows["(d)"]
    assert len({weights for _, weights, _ in rows.values()}) == 3


def test_decay_of_everything_shrinks_the_gammas(short: Short) -> None:
    """The optimizer's decay on everything takes the BatchNorm gammas along; wdhook does not."""
    rows = short.ran.rows()
    assert rows["(b)"][2] < rows["(a)"][2]
    assert rows["(b)"][2] < rows["(d)"][2]


def test_prints_the_plan(short: Short) -> None:
    """The plan of the very model is shown."""
    assert str(wdhook.plan(_demo._model(0), _demo.WEIGHT_DECAY)) in short.ran.out


def test_writes_a_png(short: Short) -> None:
    """The picture is a PNG of some size, and its name is printed."""
    assert short.ran.png.startswith(PNG)
    assert len(short.ran.png) > 10_000
    assert "norms.png" in short.ran.out


def test_bars_go_to_stderr(short: Short) -> None:
    """A progress bar for each training and for the timing, none in what is printed."""
    for arm in _demo.ARMS:
        assert re.search(rf"{re.escape(arm.name)} +: 100%.* 2/2 ", short.ran.err), arm.name
    assert "time per step" in short.ran.err
    assert "100%|" not in short.ran.out


def test_same_seed_same_output(short: Short, tmp_path: Path) -> None:
    """A second run with the same seed prints the same, times apart, and draws the same picture."""
    again = run(tmp_path)
    assert again.without_times() == short.ran.without_times()
    assert again.png == short.ran.png


def test_other_seed_other_output(short: Short, tmp_path: Path) -> None:
    """Twin: the seed reaches the weights, so that the comparison above can fail; the promise holds
    here too."""
    other = run(tmp_path, seed=1)
    assert other.status == 0
    assert other.without_times() != short.ran.without_times()


def test_leaves_the_process_as_it_was(short: Short) -> None:
    """Threads, random numbers, flags, process-wide hooks and matplotlib's settings stay."""
    assert short.after == short.before


LAYER = nn.Linear(2, 2)  # kept alive: hooks go with their model


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (lambda: torch.rand(1), "random numbers"),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "threads"),
        (lambda: wdhook.attach(LAYER, 0.1), "step hooks"),
    ],
    ids=["random numbers", "threads", "step hooks"],
)
def test_leaves_the_process_as_it_was_can_fail(change: Callable[[], Any], noticed: str) -> None:
    """Twin: a change of the process would be seen."""
    before = snapshot()
    with torch.random.fork_rng(devices=[]):
        result = change()
        after = snapshot()
    if isinstance(result, wdhook.WeightDecay):
        result.remove()
    torch.set_num_threads(before["threads"])
    assert {key for key in before if before[key] != after[key]} == {noticed}


def test_a_λ_that_is_slightly_off_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin of the equality: λ larger by 1e-5 of itself in (d) alone makes the exit status 1."""
    attach = wdhook.attach
    monkeypatch.setattr(wdhook, "attach", lambda model, λ: attach(model, λ * 1.00001))
    ran = run(tmp_path, epochs=1)
    assert ran.status == 1
    assert "DIFFER" in ran.err
    assert re.search(r"the loss of \d+ of 15 steps, first at step \d", ran.err)
    assert re.search(r"\d+ of 38 parameters and buffers, first stem.weight", ran.err)
    assert "equal to the last bit" not in ran.out
    assert ran.png.startswith(PNG)


# -- times -----------------------------------------------------------------------------------------


def test_a_ratio_is_of_times_in_the_same_round() -> None:
    """A machine that slows down changes both times of a round, and no ratio."""
    reference = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    ours = [1.25 * seconds for seconds in reference]
    assert paired_ratio(ours, reference) == (1.25, 1.25, 1.25)
    assert str(paired_ratio(ours, reference)) == "1.25 (1.25–1.25)"


@pytest.mark.parametrize(("rounds", "rank"), [(6, 0), (8, 0), (9, 1), (10, 1), (16, 3)])
def test_the_interval_is_that_of_the_sign_test(rounds: int, rank: int) -> None:
    """Order statistics from the tables of the sign test at 95 %: the (rank+1)-th from each end."""
    found = paired_ratio([float(i) for i in range(1, rounds + 1)], [1.0] * rounds)
    assert found is not None
    assert (found.low, found.high) == (rank + 1, rounds - rank)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([1.5] * 6, "about 1000 µs more in a step of 2.0 ms."),
        ([0.75] * 6, "about 500 µs less in a step of 2.0 ms."),
        ([0.5, 0.5, 0.5, 1.5, 1.5, 1.5], "no difference, as 1 lies in the interval."),
        ([1.5] * 5, ""),
    ],
)
def test_the_ratio_is_explained(factors: list[float], said: str) -> None:
    """Microseconds where the interval lies on one side of 1, and no claim where it does not."""
    times = {"(c) one": [0.002] * len(factors), "(d) two": [0.002 * f for f in factors]}
    text = meaning(times, "(d) two", "(c) one")
    assert said in text
    assert bool(said) == text.startswith("(d) and (c): ")


def test_few_rounds_have_no_interval(short: Short) -> None:
    """Five rounds cannot hold the median with 95 %, and two print a dash."""
    assert paired_ratio([1.0] * 5, [1.0] * 5) is None
    assert [time for *_, time in ROW.findall(short.ran.out)] == ["–", "–", "1", "–"]


def _run(losses: Tensor | None = None, **state: Tensor) -> _demo.Run:
    whole = {"weight": torch.zeros(2), "running_mean": torch.zeros(2), **state}
    return _demo.Run(whole, torch.zeros(3) if losses is None else losses, {}, 0.0)


TINY = torch.finfo(torch.float32).tiny


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (_run(torch.tensor([0.0, 0.0, TINY])), ["the loss of 1 of 3 steps, first at step 3"]),
        (_run(weight=torch.tensor([0.0, TINY])), ["1 of 2 parameters and buffers, first weight"]),
        (
            _run(running_mean=torch.tensor([TINY, 0.0])),
            ["1 of 2 parameters and buffers, first running_mean"],
        ),
        (_run(torch.full((3,), torch.nan)), ["the loss of 3 of 3 steps, first at step 1"]),
    ],
    ids=["a loss", "a weight", "a buffer", "not a number"],
)
def test_one_bit_is_a_difference(other: _demo.Run, words: list[str]) -> None:
    """One number that differs by the smallest amount, anywhere, is found and named; equal runs are
    equal."""
    assert _demo._differences(_run(), _run()) == []
    assert _demo._differences(_run(), other) == words
    assert _demo._differences(other, _run()) == words


def test_groups_by_hand_hold_every_parameter_once() -> None:
    """The reference leaves no parameter out and none in twice, and decays what has more than one
    dimension."""
    model = _demo._model(0)
    decayed, rest = (group["params"] for group in _demo._by_hand(model))
    assert sorted(map(id, [*decayed, *rest])) == sorted(map(id, model.parameters()))
    assert {p.dim() for p in decayed} == {2, 4}
    assert {p.dim() for p in rest} == {1}


def test_plot_shows_every_line_in_every_panel() -> None:
    """A panel for each quantity, a distinct style for each line, axes with labels that begin at
    zero."""
    history = {f"line {i}": {"one": [1.0, 2.0], "two": [3.0, 2.0 + i]} for i in range(4)}
    figure = plot.norms(history)
    assert [ax.get_title() for ax in figure.axes] == ["one", "two"]
    assert figure.get_size_inches()[0] == 6
    for ax in figure.axes:
        assert [line.get_label() for line in ax.lines] == list(history)
        assert len({(line.get_color(), line.get_linewidth()) for line in ax.lines}) == 4
        assert ax.get_ylim()[0] == 0
        assert ax.get_xlabel() == "epoch"
    assert figure.axes[0].get_ylabel() == "L2 norm"
