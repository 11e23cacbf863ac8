"""`wdhook optimizers`: the table of docs/optimizers.md, from packaged data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_optimizer_data import DATA, PAGE, data

from wdhook import cli


def optimizers(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert cli.main(["optimizers", *arguments]) == status
    streams = capsys.readouterr()
    return streams.err if status == cli.BAD_USAGE else streams.out


def rows(capsys: pytest.CaptureFixture[str], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(optimizers(capsys, name, "--json"))["optimizers"]
    return found


def test_the_packaged_data_are_those_of_the_page() -> None:
    """Remake them with `python tests/support/make_optimizer_data.py`."""
    assert DATA.read_text() == data(PAGE.read_text())


def test_tables_that_differ_are_seen() -> None:
    """The reader of the page takes each row, and refuses tables with other columns."""
    page = "### a 1.0\n\n| optimizer | x |\n|---|---|\n| A | `y` |\n"
    assert data(page) == "package\tversion\toptimizer\tx\na\t1.0\tA\ty\n"
    with pytest.raises(ValueError, match="the columns of b"):
        data(f"{page}\n### b 2\n\n| optimizer | z |\n|---|---|\n| B | y |\n")


def test_the_data_are_part_of_the_package() -> None:
    """A wheel brings them: setup.cfg names the file."""
    assert "_commands/optimizers.tsv" in (Path(__file__).parents[2] / "setup.cfg").read_text()


def test_case_is_ignored_and_variants_belong_to_their_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A name gives its rows in all packages, with the columns of the page."""
    found = rows(capsys, "nadam")
    assert {e["optimizer"] for e in found if e["package"] == "torch"} == {
        "NAdam",
        "NAdam decoupled",
    }
    assert {"package", "version", "optimizer", "its own decay", "adopt", "note"} <= set(found[0])
    assert all("adamw" not in e["optimizer"].lower() for e in found)


def test_a_package_gives_all_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a package is one too."""
    found = rows(capsys, "torch-optimizer")
    assert {e["package"] for e in found} == {"torch-optimizer"}
    assert len(found) > 20


def test_the_text_says_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    """A drop-in for the optimizer's own decay is named with its call."""
    out = optimizers(capsys, "SGDP")
    assert "torch-optimizer" in out
    assert 'wdhook.attach(model, λ, mode="decoupled", at="step") does the same' in out
    assert 'its own decay, coupled: wdhook.attach(model, λ, at="step")' in optimizers(
        capsys, "Yogi"
    )


def test_without_a_name_the_packages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each package with its version and the number of its optimizers."""
    out = optimizers(capsys)
    number = len(DATA.read_text().splitlines()) - 1
    assert f"{number} optimizers." in out
    assert "schedulefree" in out


def test_an_unknown_name_gets_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and a question."""
    err = optimizers(capsys, "ScheduelFree", status=2)
    assert "no optimizer and no package is called 'ScheduelFree'" in err
    assert "Did you mean " in err
    assert "doctor" in err
