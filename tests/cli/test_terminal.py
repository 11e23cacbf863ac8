"""What is printed fits the terminal, and is whole for a pipe: plans, audits, messages."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import wdhook
from wdhook import cli
from wdhook._base.terminal import fitted, fold_name, folded_lines, paragraph, table_lines
from wdhook._base.text import near, short


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)})


def letters(text: str) -> list[str]:
    """The letters and digits of a text, wherever its lines are broken."""
    return sorted(c for c in text if c.isalnum())


def printed(monkeypatch: pytest.MonkeyPatch, thing: object, columns: int) -> str:
    """The text of a thing while stdout is a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        return str(thing)


def things() -> list[object]:
    plan = wdhook.plan(model(), 0.5)
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 8)
    return [plan, plan.diff(wdhook.plan(model(), 0.25)), wdhook.audit(attention, x, x, x)]


@pytest.mark.parametrize("index", range(3), ids=["plan", "diff", "audit"])
def test_what_is_printed_folds_in_a_terminal_alone(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is wider than the terminal and no letter is lost; a pipe gets whole rows."""
    thing = things()[index]
    whole = str(thing)
    monkeypatch.setenv("COLUMNS", "72")
    assert str(thing) == whole
    assert max(map(len, whole.splitlines())) > 72
    narrow = printed(monkeypatch, thing, 72)
    assert max(map(len, narrow.splitlines())) <= 72
    assert letters(narrow) == letters(whole)
    assert printed(monkeypatch, thing, 200).splitlines() == whole.splitlines()


def test_a_check_folds_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`print(decay)` in 60 columns has the words of the one long line."""
    linear = nn.Linear(3, 2)
    with wdhook.attach(linear, 0.5) as decay:
        linear(torch.ones(1, 3)).sum().backward()
        torch.optim.SGD(linear.parameters(), lr=0.1).step()
        whole = str(decay)
        narrow = printed(monkeypatch, decay, 60)
    assert "\n" not in whole
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == whole.split()


def test_a_closed_or_missing_stdout_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has a text also in a service without streams."""
    plan = wdhook.plan(model(), 0.5)
    whole = str(plan)
    closed = Terminal()
    closed.close()
    for stdout in (None, closed, object()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            text = str(plan)
        assert text == whole


ROWS = [
    ("parameter", "reason"),
    ("encoder.layers.0.self_attn.weight", "one two three four"),
    ("head", "five"),
]


def test_the_table_has_the_fewest_lines() -> None:
    """Names fold only where that saves lines: a sentence that wraps anyway leaves them room."""
    name, reason = fitted(ROWS, 46)
    assert (name, reason) == (33, 11)  # two lines of words, and the name stays whole
    lines = table_lines(ROWS, [])
    assert [len(row) for row in lines] == [1, 1, 1, 1]
    narrow = fitted(ROWS, 30)
    assert sum(narrow) + 2 <= 30
    heights = []
    for width in range(19, 27):  # every other division has as many lines or more
        texts = fold_name(ROWS[1][0], width)
        heights.append(len(texts))
    assert len(fold_name(ROWS[1][0], narrow[0])) == min(heights)


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("layers.0.fc.weight", 18, ["layers.0.fc.weight"]),
        ("layers.0-11.self_attn.weight ×12", 18, ["layers.0-11", "  .self_attn", "  .weight ×12"]),
        ("pytorch_optimizer", 16, ["pytorch_", "  optimizer"]),
        ("a" * 20, 8, ["a" * 8, "  " + "a" * 6, "  " + "a" * 6]),
    ],
)
def test_names_fold_at_dots(name: str, width: int, lines: list[str]) -> None:
    """A name is broken before a dot; a component that is too wide after ``_``, or anywhere."""
    assert fold_name(name, width) == lines


def test_messages_fold_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line keeps its indentation, and goes on two spaces deeper; a pipe gets it whole."""
    text = "one two three\n  four five six\n\nseven"
    monkeypatch.setenv("COLUMNS", "10")
    assert folded_lines(text, Terminal()) == [
        "one two",
        "  three",
        "  four",
        "    five",
        "    six",
        "",
        "seven",
    ]
    assert folded_lines(text, io.StringIO()) == text.split("\n")
    assert paragraph("a" * 300, "  ", stream=io.StringIO()) == ["  " + "a" * 300]


def test_an_error_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in an override: few names, near ones first, in 80 columns; a file gets it whole."""
    call = ["inspect", "torch.nn:Transformer", "--kwargs", "d_model=4, nhead=2, batch_first=True"]
    said = {}
    monkeypatch.setenv("COLUMNS", "80")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main([*call, "--override", "encodr.*=0"]) == 2
        said[type(stream)] = stream.getvalue()
    assert max(map(len, said[Terminal].splitlines())) <= 80
    assert letters(said[Terminal]) == letters(said[io.StringIO])
    assert "Did you mean 'encoder.*'" in said[io.StringIO]
    assert "more\n" in said[io.StringIO]
    assert len(said[io.StringIO]) < 900


@pytest.mark.parametrize(
    ("text", "known", "found"),
    [
        ("decopled", ["coupled", "decoupled"], ["decoupled", "coupled"]),
        ("STEP", ["backward", "step"], ["step"]),
        ("input", ["plot", "only"], []),
    ],
)
def test_near_words(text: str, known: list[str], found: list[str]) -> None:
    """The nearest first; capitals do not count; nothing is better than a word that is far."""
    assert near(text, known) == found


@pytest.mark.parametrize(
    ("number", "text"), [(5e-5, "5e-5"), (1e-10, "1e-10"), (0.05, "0.05"), (1e20, "1e+20")]
)
def test_numbers_as_people_type_them(number: float, text: str) -> None:
    """No zero that pads an exponent."""
    assert short(number) == text
