"""Tables and paragraphs, fitted to the terminal and coloured there.

A pipe or a file gets the whole text, without colour: the same bytes on every machine.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from textwrap import wrap

from .._base.text import Row, aligned

GREEN, RED, YELLOW, CYAN, FAINT, BOLD = "32", "31", "33", "36", "2", "1"  # ANSI's SGR codes

_WIDEST = 120  # of a paragraph; longer lines are hard to read
_NARROWEST = 12  # of a column whose words have to be broken
_BETWEEN = 2  # spaces between columns


def on_terminal() -> bool:
    """A person reads stdout, not a program."""
    return sys.stdout.isatty()


def in_colour() -> bool:
    """Decide on colours: stdout is a terminal with colours, and NO_COLOR is not set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if os.name == "nt" and "WT_SESSION" not in os.environ:  # older consoles print the codes
        return False
    return on_terminal()


def painted(text: str, *codes: str | None) -> str:
    """Put text between ANSI codes, if the terminal has colours."""
    wanted = ";".join(code for code in codes if code)
    if not wanted or not in_colour():
        return text
    return f"\x1b[{wanted}m{text}\x1b[0m"


def paragraph(text: str, indent: str = "", later: str | None = None) -> list[str]:
    """Wrap text to 120 characters, or to a narrower terminal.

    Args:
        later: before all lines but the first; None is `indent`.
    """
    width = min(_WIDEST, _columns()) if on_terminal() else _WIDEST
    return wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent if later is None else later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_table(
    rows: Sequence[Row],
    right: Iterable[int] = (),
    strong: Sequence[bool] = (),
    colours: Sequence[str] = (),
) -> None:
    """Print a table.

    Args:
        rows: the first is the heading.
        right: columns that are flush right.
        strong: for each row after the heading, whether to print it in bold.
        colours: for each row after the heading, its ANSI code, or nothing.
    """
    if not on_terminal():
        print(*aligned(rows, right), sep="\n")
        return
    widths = fitted(rows, _columns())
    flush = set(right)
    heading = _lines(rows[0], widths, flush)
    print(*heading, sep="\n")
    print("  ".join("-" * width for width in widths))
    for row, is_strong, colour in zip_longest(rows[1:], strong, colours):
        bold = BOLD if is_strong else ""
        for line in _lines(row, widths, flush):
            print(painted(line, bold, colour))


def fitted(rows: Sequence[Row], width: int) -> list[int]:
    """Choose widths of columns for a table of `width` characters, as far as possible.

    Columns of sentences become narrower first, the last of them before the others, down to their
    longest word; then the first column, which holds names, to the longest part between dots. Words
    and parts are broken only where that is not enough.

    Args:
        rows: cells; a column is one of sentences where a cell has a space.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    prose = [i for i in range(1, len(columns)) if " " in "|".join(columns[i])]
    stages = [(i, _longest(columns[i], " ")) for i in reversed(prose)]
    stages.append((0, max(_longest(columns[0], ".") + 3, _NARROWEST)))  # a dot and two spaces
    stages += [(i, _NARROWEST) for i in reversed(prose)]
    stages.append((0, _NARROWEST))
    for i, lowest in stages:
        surplus = sum(widths) + _BETWEEN * (len(widths) - 1) - width
        if surplus > 0:
            widths[i] = min(widths[i], max(widths[i] - surplus, lowest))
    return widths


def _longest(column: Sequence[str], separator: str) -> int:
    """Characters of the longest piece of a column."""
    return max(map(len, separator.join(column).split(separator)))


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _lines(row: Row, widths: Sequence[int], right: set[int]) -> list[str]:
    """Break a row into lines, each cell within its column."""
    name, *others = zip(row, widths, strict=True)
    cells = [fold_name(*name)]
    cells += [wrap(cell, width) or [""] for cell, width in others]
    lines = []
    for texts in zip_longest(*cells, fillvalue=""):
        parts = []
        for i, (text, width) in enumerate(zip(texts, widths, strict=True)):
            parts.append(text.rjust(width) if i in right else text.ljust(width))
        lines.append((" " * _BETWEEN).join(parts).rstrip())
    return lines


def fold_name(name: str, width: int) -> list[str]:
    """A dotted name as lines of at most `width` characters, broken before dots where possible.

    All lines but the first are indented by two, so that the next name is seen to begin.
    """
    pieces = [f".{piece}" if i else piece for i, piece in enumerate(name.split("."))]
    lines, line = [], ""
    for piece in pieces:
        if line.strip() and len(line) + len(piece) > width:
            lines.append(line)
            line = "  "
        line += piece
        while len(line) > width:  # one component is wider than the column
            lines.append(line[:width])
            line = "  " + line[width:]
    return [*lines, line]
