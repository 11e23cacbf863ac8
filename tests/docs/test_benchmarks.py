"""docs/performance.md has the measured numbers, and variants are measured side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print tables")

from benchmarks import accelerator
from benchmarks.low_precision import kept
from benchmarks.page import filled
from benchmarks.ratios import Case, Work, cases, compared
from benchmarks.timing import Times, Variant, side_by_side

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()
REPORT = json.loads((ROOT / "docs" / "figures" / "performance.json").read_text())


def test_the_page_has_the_numbers_of_the_report() -> None:
    """Made by `python -m benchmarks`; a changed number would be found."""
    assert filled(PAGE, REPORT) == PAGE
    changed = json.loads(json.dumps(REPORT))
    changed["totals"][0]["value"] *= 2
    assert filled(PAGE, changed) != PAGE
    with pytest.raises(KeyError, match="prices"):
        filled("<!-- table: prices -->\n<!-- end -->", REPORT)


def test_the_report_has_every_case() -> None:
    """What is measured today is what was published."""
    measured = list(dict.fromkeys(case.what for case in cases()))
    for rows in REPORT["threads"].values():
        found = dict.fromkeys(row["what"].removesuffix(", above no hook") for row in rows)
        assert list(found) == measured


def test_the_ratio_above_a_pass_without_hooks() -> None:
    """Two hooks whose passes differ by a tenth of all, and by half of what is above no hook."""
    times = {"bare": 1.2, "ours": 1.3, "none": 1.0}

    def work(device: torch.device, quick: bool) -> Work:
        return Work({name: Variant(lambda: None) for name in times}, [], [])

    case = Case("hook", "bare", work, without="none", at_most_above=0.8)
    results = list(compared(case, {name: Times((t, t, t)) for name, t in times.items()}))
    above = results[-1]
    assert [r.variant for r in results] == ["ours", "none", "ours"]
    assert (above.what, above.at_most) == ("hook, above no hook", 0.8)
    assert above.ratio == pytest.approx(0.3 / 0.2)
    assert above.microseconds == pytest.approx(0.3e6)


def test_the_table_of_low_precision() -> None:
    """Two cells of docs/amp.md, measured again: the one that is taken, and the one that loses
    all."""
    page = (ROOT / "docs" / "amp.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| bfloat16 | uniform"))
    cells = [cell.strip(" *") for cell in row.split("|")]
    assert cells[6] == str(kept(torch.bfloat16, 4, 1e-4, 6_000, "uniform"))
    assert cells[3] == str(kept(torch.bfloat16, 0, 1e-4, 6_000, "uniform")).replace("-0.0", "0.0")


def test_variants_take_turns() -> None:
    """Each run begins with another variant, and what comes before a run is not part of it."""
    heard: list[str] = []

    def variant(name: str) -> Variant:
        return Variant(lambda: heard.append(name), lambda: heard.append(f"before {name}"))

    times = side_by_side({"a": variant("a"), "b": variant("b")}, 2, torch.device("cpu"))
    assert heard[-8:] == ["before a", "a", "before b", "b", "before b", "b", "before a", "a"]
    assert [len(t.seconds) for t in times.values()] == [2, 2]


def test_quartiles() -> None:
    """The lower quartile, and the distance of the quartiles relative to it."""
    times = Times(tuple(float(n) for n in (9, 1, 5, 3, 7)))
    assert times.lower == 3.0
    assert times.spread == pytest.approx(7 / 3 - 1)


@pytest.mark.parametrize("optimizer", ["SGD, foreach", "AdamW, fused, bfloat16 parameters"])
def test_the_script_for_accelerators_is_in_working_order(optimizer: str) -> None:
    """Tiny networks on the CPU, where an operation takes the place of a launch."""
    device = torch.device("cpu")
    ways = ["own decay", *accelerator.OPTIMIZERS[optimizer][1]]
    for network in accelerator.LARGE_NETWORKS:
        rows = list(accelerator.measure(network, optimizer, device, quick=True, runs=1))
        assert [row.way for row in rows] == ways
        assert (rows[0].ratio, rows[0].launches) == (1.0, 0)
        # One call in place of one for each tensor; a foreach SGD needs two for its own decay.
        assert all(row.launches < 5 for row in rows if "rounded" not in row.way)


def test_the_script_for_accelerators_needs_torch_alone() -> None:
    """The other benchmarks print tables by rich, and bars by tqdm."""
    program = "import sys; sys.modules.update(rich=None, tqdm=None); import benchmarks.{}"
    run = [sys.executable, "-c", program.format("accelerator")]
    subprocess.run(run, cwd=ROOT, check=True)
    failed = subprocess.run([*run[:2], program.format("__main__")], cwd=ROOT, stderr=-1)
    assert b"rich" in failed.stderr
