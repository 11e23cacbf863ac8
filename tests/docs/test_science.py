"""docs/science.md: its numbers are those of the experiment, the experiment runs, and its formulas
hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import wdhook

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "science.md").read_text()
NUMBERS = json.loads((ROOT / "docs" / "figures" / "science.json").read_text())


def rows(after: str) -> list[list[str]]:
    """The cells of the first table after a text, without its heading."""
    table = re.search(r"^\|.*?\n(?=\n)", PAGE[PAGE.index(after) :], re.MULTILINE | re.DOTALL)
    assert table
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]
    ]


def spread(values: list[float]) -> list[str]:
    """Least, median and most, as the page rounds them."""
    return [f"{value:.3f}" for value in (min(values), median(values), max(values))]


def equilibrium_rows(report: list[dict[str, Any]]) -> list[list[str]]:
    """The table of the equilibrium, from the numbers."""
    found = []
    for lr, λ, momentum in (
        (0.1, 0.04, 0.0),
        (0.1, 0.02, 0.0),
        (0.4, 0.005, 0.0),
        (0.01, 0.02, 0.9),
    ):
        key = {"lr": lr, "weight_decay": λ, "momentum": momentum, "factor": 1.0}
        runs = [run for run in report if all(run[name] == value for name, value in key.items())]
        layers = [layer for run in runs for layer in run["layers"].values()]
        angle = runs[0]["predicted_angle"]
        norms = spread([layer["norm"] / layer["predicted"] for layer in layers])
        angles = spread([layer["angle"] / angle for layer in layers])
        found.append([f"{lr:g}", f"{λ:g}", f"{momentum:g}", *norms, f"{angle:.4f}", *angles])
    return found


def role_rows(arms: dict[str, Any]) -> list[list[str]]:
    """The table of the roles, from the numbers."""
    found = []
    for name, arm in arms.items():
        difference = f"{100 * arm['difference']:.2f}".replace("-", "−")
        cells = ["", ""] if name == "weights" else [difference, f"± {100 * arm['interval']:.2f}"]
        found.append([name, f"{100 * arm['mean']:.2f} %", *cells])
    return found


def test_the_numbers_of_the_page_are_those_that_were_measured() -> None:
    """Every table of the page is the file that the experiment wrote."""
    assert rows("Ratios of measured to predicted") == equilibrium_rows(NUMBERS["equilibrium"])
    assert rows("held-out accuracy on 797 digits") == role_rows(NUMBERS["roles"]["arms"])
    growth, same, other = (
        NUMBERS["equivalence"][name] for name in ("growth", "same", "no_schedule")
    )
    label = f"no decay, lr grows {growth:.2f}-fold"
    assert rows("relative to the largest\nlogit") == [
        [label, f"{same['logits']:.1e}", f"{same['weights']:.2f}"],
        ["no decay, lr constant", f"{other['logits']:.2f}", f"{other['weights']:.2f}"],
    ]


def test_the_conclusions_follow_from_the_numbers() -> None:
    """What the page says in bold: only decaying nothing differs from decaying the weights, and it
    is worse."""
    arms = {name: arm for name, arm in NUMBERS["roles"]["arms"].items() if name != "weights"}
    assert [name for name, arm in arms.items() if abs(arm["difference"]) > arm["interval"]] == [
        "nothing"
    ]
    assert arms["nothing"]["difference"] < 0
    assert (
        NUMBERS["equivalence"]["same"]["logits"]
        < 1e-12
        < 0.1
        < NUMBERS["equivalence"]["no_schedule"]["logits"]
    )


@pytest.mark.parametrize("λ", [0.0, 0.3])
def test_pythagoras(λ: float) -> None:
    """‖w′‖² = (1 − lr·λ)²·‖w‖² + lr²·‖g‖² for a weight that a normalization follows, and not for
    one without."""
    torch.manual_seed(0)
    x, lr = torch.randn(16, 4, dtype=torch.float64), 0.5
    for normalized in (True, False):
        linear = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
        loss = linear(x)
        if normalized:
            loss = torch.nn.functional.batch_norm(loss, None, None, training=True, eps=1e-30)
        with wdhook.attach(linear, λ or 1.0, at="step") as decay:
            decay.weight_decay = λ
            (loss - torch.ones(3, dtype=torch.float64)).pow(4).mean().backward()
            before, pull = linear.weight.norm().item(), linear.weight.grad.norm().item()
            torch.optim.SGD(linear.parameters(), lr=lr).step()
        expected = (1 - lr * λ) ** 2 * before**2 + lr**2 * pull**2
        # float64: some hundred roundings of 1e-16 each.
        assert (abs(linear.weight.norm().item() ** 2 / expected - 1) < 1e-13) is normalized


def test_the_experiment_runs(tmp_path: Path) -> None:
    """The page's command works, and writes what the page is made from."""
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    out = tmp_path / "science.json"
    command = [sys.executable, "-m", "benchmarks.science", "--quick", "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report = json.loads(out.read_text())
    assert report.keys() == NUMBERS.keys()
    assert report["roles"]["arms"].keys() == NUMBERS["roles"]["arms"].keys()
    assert (
        report["equivalence"]["same"]["logits"]
        < 1e-12
        < report["equivalence"]["no_schedule"]["logits"]
    )
    assert "python -m benchmarks.science --json docs/figures/science.json" in PAGE
