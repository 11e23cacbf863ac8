"""The habits of the house: slow tests, the parts of `.ci/run`, the templates, one version."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from selection import SLOW_ROOMS, TESTS, heading, is_slow, skips, slow_ones

import wdhook

ROOT = TESTS.parent
RUN = (ROOT / ".ci" / "run").read_text()
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
PARTS = set(re.findall(r"^part_(\w+)\(\)", RUN, re.MULTILINE))


# -- slow tests ------------------------------------------------------------------------------------


def test_slow_tests_are_known_by_room_and_by_fixture() -> None:
    """Every slow room exists; a process group makes a test slow anywhere; others are not."""
    for room in SLOW_ROOMS:
        assert (TESTS / room).is_dir()
        assert is_slow(TESTS / room / "test_x.py", ())
    assert is_slow(TESTS / "optimizers" / "test_x.py", ("two",))
    assert not is_slow(TESTS / "optimizers" / "test_x.py", ("tmp_path",))
    assert not is_slow(ROOT / "docs" / "compile.md", ())


def collected(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    path = "tests/distributed/test_ddp.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, *arguments, path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.slow
def test_a_slow_file_by_its_path() -> None:
    """Its tests are left out with the command that runs them, and that command selects them."""
    without, within = collected(), collected("-m", "")
    assert "::test_" not in without
    assert "python -m pytest -m '' tests/distributed/test_ddp.py" in without
    assert "tests/distributed/test_ddp.py::test_every_loop" in within
    assert "left out" not in within


def test_a_run_says_what_it_leaves_out() -> None:
    """One line for absent packages, one for other reasons, one for slow tests; none for nothing."""
    reasons = [
        "could not import 'timm.optim': No module named 'timm'",
        "Skipped: needs transformers",
        "lion_pytorch is not installed",
        "Skipped: the Trainer needs accelerate",
        "a CUDA graph needs a CUDA device",
        "a CUDA graph needs a CUDA device",
    ]
    assert list(skips(reasons)) == [
        "skipped: 4 tests of packages that are not installed "
        "(accelerate, lion-pytorch, timm, transformers); `.ci/run others` has most of them",
        "skipped: 2 (a CUDA graph needs a CUDA device)",
    ]
    assert list(skips([])) == []
    assert slow_ones(3, ["tests/x.py"]) == (
        "left out: 3 slow tests, which `.ci/run slow` runs, or `python -m pytest -m '' tests/x.py`"
    )
    assert "slow" in heading("not slow")
    assert len({heading("not slow"), heading(""), heading("slow")}) == 3


# -- the parts of .ci/run --------------------------------------------------------------------------


def parts_of_the_workflow(text: str) -> set[str]:
    lists = re.findall(r"^ +part: \[(.*)\]", text, re.MULTILINE)
    return {part for row in lists for part in row.split(", ")}


def test_the_workflow_calls_every_part() -> None:
    """The hosted workflow and `.ci/run` have the same parts, and CONTRIBUTING explains each."""
    assert parts_of_the_workflow(WORKFLOW) == PARTS
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert set(rows) == PARTS
    assert ".ci/run ${{ matrix.part }}" in WORKFLOW


def test_the_parts_are_read() -> None:
    """Twin of the test above: parts are found, and one that is missing would be seen."""
    assert {"lint", "fast", "slow", "others", "docs", "demo", "wheel", "oldest"} <= PARTS
    assert parts_of_the_workflow(WORKFLOW.replace("lint, ", "")) == PARTS - {"lint"}


def test_an_unknown_part_is_an_error() -> None:
    """It ends with status 2 and the names of the parts, before any part runs."""
    command = ["bash", str(ROOT / ".ci" / "run"), "lint", "unknown"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown" in done.stderr
    assert set(re.findall(r"\w+", done.stderr)) >= PARTS


def full_run(folder: Path, **bodies: str) -> subprocess.CompletedProcess[str]:
    """A full run of a copy of `.ci/run`, in which the parts do what `bodies` says, or nothing."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "summary.py", folder / ".ci")
    stubs = [f"part_{part}() {{ {bodies.get(part, 'echo well')}; }}\n" for part in sorted(PARTS)]
    start = "if (($# == 0)); then"
    assert RUN.count(start) == 1
    run = folder / ".ci" / "run"
    run.write_text(RUN.replace(start, "".join(stubs) + start))
    return subprocess.run(["bash", str(run)], capture_output=True, text=True, check=False)


def test_a_full_run_in_which_all_is_well(tmp_path: Path) -> None:
    """Status 0, and every part has its line."""
    done = full_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS - {"newest"}:
        assert re.search(rf"^=== {part} +passed, \d+ s: well$", done.stdout, re.MULTILINE)
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize(
    ("part", "body"),
    [
        ("lint", "false; echo went on"),
        ("others", "echo first | grep second; echo went on"),
        ("wheel", "nothing=$(false); echo went on"),
        ("oldest", "trap true EXIT; exit 3"),
    ],
)
def test_a_full_run_in_which_a_part_fails(part: str, body: str, tmp_path: Path) -> None:
    """Status 1 and its name; its commands end at the first that fails, the other parts run."""
    done = full_run(tmp_path, **{part: body})
    assert done.returncode == 1
    assert f"FAILED: {part}\n" in done.stdout
    assert "went on" not in done.stdout
    assert done.stdout.count("passed, ") == len(PARTS) - 2  # without newest, and the one


# -- a full run's summary --------------------------------------------------------------------------

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="ran"/>
<testcase classname="a" name="{name}"><skipped type="pytest.skip" message="{why}"/></testcase>
</testsuite></testsuites>"""


def summary(folder: Path, results: str) -> tuple[int, str]:
    (folder / "results").write_text(results)
    for line in results.splitlines():
        (folder / f"{line.split()[0]}.log").write_text("")
    command = [sys.executable, str(ROOT / ".ci" / "summary.py"), str(folder), "fast", "slow"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_summary_of_a_full_run(tmp_path: Path) -> None:
    """Status 0 if every part passed, with seconds, and the tests that every part has skipped."""
    (tmp_path / "fast.xml").write_text(REPORT.format(name="never", why="needs CUDA"))
    (tmp_path / "slow.xml").write_text(REPORT.format(name="never", why="needs CUDA"))
    status, said = summary(tmp_path, "fast 0 7 5.0 1.4\nslow 0 12 9 1\n")
    assert status == 0
    assert re.search(r"fast +7 +6\nslow +12 +10\n", said)
    assert "1 tests ran in no part:\n    1  needs CUDA\n" in said
    whole = '<testcase classname="" name="a"><skipped message="collection skipped"/></testcase>'
    (tmp_path / "whole.xml").write_text(f"<testsuite>{whole}</testsuite>")
    assert "collection skipped" not in summary(tmp_path, "fast 0 7 5 1\nslow 0 12 9 1\n")[1]
    (tmp_path / "slow.xml").write_text(REPORT.format(name="ran", why="elsewhere"))
    (tmp_path / "fast.xml").write_text(
        REPORT.format(name="other", why="needs CUDA").replace('name="ran"', 'name="never"')
    )
    assert "1  needs CUDA" in summary(tmp_path, "fast 0 7 5 1\nslow 0 12 9 1\n")[1]


@pytest.mark.parametrize("results", ["fast 0 7 5 1\nslow 1 12 9 1\n", "fast 0 7 5 1\n"])
def test_a_part_that_failed_or_is_missing_fails_the_run(results: str, tmp_path: Path) -> None:
    """Status 1 with the name of the part, if it failed and if nothing is known of it."""
    status, said = summary(tmp_path, results)
    assert status == 1
    assert "FAILED: slow" in said


# -- files for people ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ISSUE_TEMPLATE/bug.md", "pull_request_template.md"])
def test_templates_ask_for_the_plan_and_the_report(name: str) -> None:
    """Reports of bugs and changes come with `print(decay.plan)` and the output of the doctor."""
    text = (ROOT / ".github" / name).read_text()
    assert "print(decay.plan)" in text
    assert "python -m wdhook doctor" in text


def test_the_version_stands_once() -> None:
    """A plain literal in wdhook/__init__.py, which setuptools reads without importing torch."""
    tree = ast.parse((ROOT / "wdhook" / "__init__.py").read_text())
    values = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert values == [wdhook.__version__]
    for name in ("setup.py", "CITATION.cff", "docs/conf.py"):
        assert wdhook.__version__ not in (ROOT / name).read_text()
