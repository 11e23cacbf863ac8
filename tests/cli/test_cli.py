"""The command line: help, bad usage, missing packages. What the demo does is tested in
test_demo.py."""

from __future__ import annotations

import configparser
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
from wdhook._commands.shared import counted

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
        assert re.search(rf"^    {name}\s+\w", out, re.MULTILINE), name
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


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids="-".join)
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_fits_the_terminal(
    columns: int,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No line but calls to copy is wider than the terminal, and no word is lost at any width."""
    said = {}
    for width in (columns, 300):
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        said[width] = capsys.readouterr().out
    text = said[columns].partition("\n\n")[2]  # the usage is argparse's
    for line in text.splitlines():
        assert len(line) <= columns or line.startswith("  python -m wdhook "), line
    assert sorted(text.split()) == sorted(said[300].partition("\n\n")[2].split())


def test_the_demo_has_the_documented_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` without options: seed 0, 16 epochs, demo.png here."""
    got: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run", lambda arguments: got.update(vars(arguments)) or 0)
    assert cli.main(["demo"]) == 0
    assert (got["seed"], got["epochs"], got["out"]) == (0, 16, Path("demo.png"))


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ([], "{inspect,audit,doctor,optimizers,demo} ..."),
        ([], "examples:"),
        (["--nothing"], "required: <command>"),
        (["sing"], "invalid choice: 'sing'"),
        (["sing"], "(choose from inspect, audit, doctor, optimizers, demo)"),
        (["inpsect", "torch.nn:Linear"], "Did you mean inspect?"),
        (["inspect", "torch.nn:Linear", "--wieght-decay=1"], "Did you mean --weight-decay?"),
        (["demo", "--colour"], "unrecognized arguments: --colour\n"),
        (["demo", "--input", "1"], "--input is an option of: inspect, audit, doctor\n"),
        (["inspect", "torch.nn:Linear", "--mode", "step"], "--mode is an option of: doctor\n"),
        (["demo", "--seed", "-1"], "whole number from 0"),
        (["demo", "--seed", "1.5"], "whole number from 0"),
        (["demo", "--seed", "99999999999"], "to 4294967295, got '99999999999'"),
        (["demo", "--epochs", "0"], "whole number from 1"),
        (["demo", "--out", "norms.bmp"], "of a .png, .svg or .pdf file, got 'norms.bmp'"),
        (["demo", "--out", "no/such/folder/a.png"], "cannot be written"),
        (["inspect"], "required: TARGET"),
        (["inspect", "torch.nn:Linear", "--weight-decay", "-1"], "number ≥ 0, got '-1'"),
        (["inspect", "torch.nn:Linear", "--weight-decay", "nan"], "number ≥ 0, got 'nan'"),
        (["inspect", "torch.nn:Linear", "--override", "bias"], "must be SELECTOR=λ, got 'bias'"),
        (["inspect", "torch.nn:Linear", "--override", "bias=no"], "number ≥ 0, got 'no'"),
        (["inspect", "torch.nn:Linear", "--recipe", "keras"], "invalid choice: 'keras'"),
        (["inspect", "torch.nn:Linear", "--recipe", "tim"], "Did you mean timm?"),
        (["inspect", "torch.nn:Linear", "--only", "all"], "invalid choice: 'all'"),
        (["inspect", "torch.nn:Linear", "--depth", "0"], "whole number from 1, got '0'"),
        (["inspect", "torch.nn:Linear", "--depth", "1", "--diff", "timm"], "not allowed with"),
        (["inspect", "torch.nn:Linear", "--plot", "plan"], "of a .png, .svg or .pdf file"),
        (["doctor", "train.py:make", "--mode", "l2"], "invalid choice: 'l2'"),
        (["doctor", "train.py:make", "--mode", "decopled"], "Did you mean decoupled or coupled?"),
    ],
)
def test_bad_usage_exits_with_two(
    arguments: list[str], piece: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments that have no meaning end with status 2 and a message that says which, before any
    work."""
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
    """Without the extra's packages the demo ends with status 2, their names and the command that
    installs them."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo", "--epochs", "1"]) == cli.BAD_USAGE
    streams = capsys.readouterr()
    assert f"not installed: {', '.join(absent)}\n" in streams.err
    packages = " ".join(absent).replace("sklearn", "scikit-learn")
    assert f"pip install {packages}\n" in streams.err
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


def test_the_program_is_called_what_it_was_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console script shows `wdhook` in its help, the module `python -m wdhook`."""
    for name, program in (("/bin/wdhook", "wdhook"), ("wdhook/__main__.py", "python -m wdhook")):
        monkeypatch.setattr(sys, "argv", [name])
        for arguments in (["--help"], ["inspect", "--help"]):
            with pytest.raises(SystemExit):
                cli.main(arguments)
            out = capsys.readouterr().out
            assert out.startswith(f"usage: {program} ")
            assert re.search(rf"^  {program} inspect ", out, re.MULTILINE)


def test_the_console_script_is_the_command_line() -> None:
    """setup.cfg makes `wdhook` of the function that `python -m wdhook` calls."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"].split("\n")
    assert [line for line in scripts if line] == ["wdhook = wdhook.cli:main"]


def test_ctrl_c_ends_a_command_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupt is no traceback, and no other error is taken for one."""

    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\npython -m wdhook demo: interrupted\n"

    def broken(arguments: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(demo, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 tensors"), (1, "1 tensor"), (2, "2 tensors"), (1200, "1,200 tensors")],
)
def test_numbers_are_grammar(number: int, text: str) -> None:
    """One is singular, zero and all others are plural."""
    assert counted(number, "tensor") == text


def test_nobody_reads_on() -> None:
    """A pipe that is closed, as by `head`, ends the command without a traceback."""
    call = f"{shlex.quote(sys.executable)} -W ignore -m wdhook inspect torch.nn:Transformer"
    run = subprocess.run(
        ["bash", "-c", f"{call} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=60
    )
    assert run.returncode in (0, 141)  # 0 where all was written before the pipe was closed
    assert run.stderr == b""


def test_a_terminal_without_λ_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose encoding lacks a letter gets a question mark, and is strict again after."""
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
