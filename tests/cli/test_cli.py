"""The command line: help, bad usage, missing packages; test_demo.py tests the demo itself."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wdhook import __version__, cli
from wdhook._commands import demo

PACKAGES = ("matplotlib", "rich", "sklearn", "tqdm")


COMMANDS = [module.__name__.rpartition(".")[2] for module in cli._COMMANDS]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` exits with 0, names every command and shows how to call it."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert {"inspect", "doctor", "demo"} <= set(COMMANDS)
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w", out, re.MULTILINE), name
    assert "examples:" in out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids="-".join)
def test_every_example_of_the_help_is_understood(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of examples in a help text is a call that parses."""
    for module in cli._COMMANDS:
        monkeypatch.setattr(module, "run", lambda arguments: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    examples = re.findall(
        r"^  python -m wdhook (.+?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE
    )
    assert len(examples) >= 2
    for example in examples:
        if "--help" not in example:
            assert cli.main(shlex.split(example.partition(" | ")[0])) == 0, example


def test_the_demo_has_the_documented_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` without options: seed 0, 16 epochs, demo.png here."""
    got: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run", lambda arguments: got.update(vars(arguments)) or 0)
    assert cli.main(["demo"]) == 0
    assert (got["seed"], got["epochs"], got["out"]) == (0, 16, Path("demo.png"))


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ([], "required: <command>"),
        ([], "{inspect,audit,doctor,demo} ..."),
        (["sing"], "invalid choice: 'sing'"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
        (["demo", "--seed", "-1"], "whole number from 0"),
        (["demo", "--seed", "1.5"], "whole number from 0"),
        (["demo", "--seed", "99999999999"], "to 4294967295, got '99999999999'"),
        (["demo", "--epochs", "0"], "whole number from 1"),
        (["demo", "--out", "norms.pdf"], "name of a .png file, got 'norms.pdf'"),
        (["demo", "--out", "no/such/folder/a.png"], "cannot be written"),
        (["inspect"], "required: TARGET"),
        (["inspect", "torch.nn:Linear", "--weight-decay", "-1"], "number ≥ 0, got '-1'"),
        (["inspect", "torch.nn:Linear", "--weight-decay", "nan"], "number ≥ 0, got 'nan'"),
        (["inspect", "torch.nn:Linear", "--override", "bias"], "must be SELECTOR=λ, got 'bias'"),
        (["inspect", "torch.nn:Linear", "--override", "bias=no"], "number ≥ 0, got 'no'"),
        (["inspect", "torch.nn:Linear", "--recipe", "keras"], "invalid choice: 'keras'"),
        (["inspect", "torch.nn:Linear", "--only", "all"], "invalid choice: 'all'"),
        (["doctor", "train.py:make", "--mode", "l2"], "invalid choice: 'l2'"),
    ],
)
def test_bad_usage_exits_with_two(
    arguments: list[str], piece: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments without a meaning: status 2 and a message with their names, before any work."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.BAD_USAGE
    streams = capsys.readouterr()
    assert piece in streams.err
    assert not streams.out


@pytest.mark.parametrize("absent", [*((name,) for name in PACKAGES), PACKAGES], ids="+".join)
def test_missing_packages_are_named(
    absent: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra's packages the demo ends with status 2, their names and the pip command."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo", "--epochs", "1"]) == cli.BAD_USAGE
    streams = capsys.readouterr()
    assert f"not installed: {', '.join(absent)}\n" in streams.err
    assert "pip install 'wdhook[demo]'" in streams.err
    assert not streams.out


IMPORT = "import sys, torch; before = set(sys.modules); {}; print(*set(sys.modules) - before)"


def _newly_imported(statement: str) -> set[str]:
    # In a process of its own, and after torch, which may bring tqdm along.
    call = [sys.executable, "-c", IMPORT.format(statement)]
    output = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60).stdout
    return {name.partition(".")[0] for name in output.split()}


def test_import_needs_torch_alone() -> None:
    """`import wdhook`, its command line, demo and plot import none of the extra's packages."""
    assert not _newly_imported(
        "import wdhook, wdhook.cli, wdhook._commands.digits, wdhook.plot"
    ) & set(PACKAGES)


def test_import_needs_torch_alone_can_fail() -> None:
    """Twin: a package that is imported would be seen."""
    assert "rich" in _newly_imported("import wdhook, rich.console")


def test_module_can_be_run() -> None:
    """`python -m wdhook` reaches the command line and hands its exit status on."""
    call = [sys.executable, "-m", "wdhook"]
    version = subprocess.run(
        [*call, "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert version.stdout == f"wdhook {__version__}\n"
    assert (
        subprocess.run([*call, "sing"], capture_output=True, timeout=60).returncode == cli.BAD_USAGE
    )


def test_nobody_reads_on() -> None:
    """A pipe that is closed, as by `head`, ends the command without a traceback."""
    call = f"{shlex.quote(sys.executable)} -W ignore -m wdhook inspect torch.nn:Transformer"
    run = subprocess.run(
        ["bash", "-c", f"{call} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=60
    )
    assert run.returncode in (0, 141)  # 0 where all was written before the pipe was closed
    assert run.stderr == b""


def test_a_terminal_without_λ_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that cannot encode a letter gets a question mark, and is strict afterwards."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with pytest.raises(UnicodeEncodeError):
        stream.write("λ")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(demo, "run", lambda arguments: print("λ = 1 ×") or 0)
    assert cli.main(["demo"]) == 0
    stream.flush()
    assert raw.getvalue() == b"? = 1 ?\n"
    assert stream.errors == "strict"
