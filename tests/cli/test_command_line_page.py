"""docs/command-line.md: what it shows is what the commands print."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wdhook import cli

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SESSIONS = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CALLS = [
    call for session in SESSIONS for call in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of the page, in a folder of their own."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def played(command: str) -> str:
    """What a line of a session prints; `echo "exit status $?"` may follow the command."""
    command, semicolon, _ = command.partition("; echo")
    program, _, arguments = command.partition("python -m wdhook ")
    assert not program
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main(shlex.split(arguments))
    return out.getvalue() + (f"exit status {status}\n" if semicolon else "")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.partition("\n")[0])
def test_the_page_shows_what_is_printed(call: str) -> None:
    """Each session of the page, letter by letter."""
    command, _, shown = call.partition("\n")
    assert played(command) == shown


def test_the_page_is_not_empty() -> None:
    """Twin: the sessions and files above are found."""
    assert set(FILES) == {"models.py", "train.py"}
    assert [call.split()[3] for call in CALLS] == [
        *["inspect"] * 4,
        *["doctor"] * 2,
        "optimizers",
    ]


@pytest.mark.usefixtures("files")
def test_what_differs_is_seen() -> None:
    """Twin: another λ is another output."""
    command, _, shown = CALLS[0].partition("\n")
    assert played(f"{command} --weight-decay 0.1") != shown


def test_every_call_of_the_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls in the shell blocks parse, for each command that this version has."""
    known = [module.__name__.rpartition(".")[2] for module in cli._COMMANDS]
    for module in cli._COMMANDS:
        monkeypatch.setattr(module, "run", lambda arguments: 0)
    calls = re.findall(r"^python -m wdhook (.*)$", PAGE, re.MULTILINE)
    assert len(calls) >= 5
    for call in calls:
        words = shlex.split(re.split(r"  +#| > ", call)[0], comments=True)
        if words[0] in known:
            assert cli.main(words) == 0
