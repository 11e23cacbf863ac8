"""Fits tables and paragraphs to the terminal that reads stdout.

A pipe or a file gets whole lines: the same bytes on every machine.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import zip_longest
from textwrap import wrap
from typing import TextIO

from .text import Row, aligned

_WIDEST = 120  # of a paragraph; longer lines are hard to read
_NARROWEST = 12  # of a column whose words have to be broken
_BETWEEN = 2  # spaces between columns


def is_terminal(stream: TextIO | None = None) -> bool:
    """A person reads the stream, and not a program. None is stdout, which may be closed."""
    stream = sys.stdout if stream is None else stream
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and not getattr(stream, "closed", False) and bool(isatty())


def paragraph(
    text: str, indent: str = "", later: str | None = None, stream: TextIO | None = None
) -> list[str]:
    """Wrap text to 120 characters or to a narrower terminal; outside a terminal it stays one line.

    Args:
        text: without line breaks.
        indent: before the first line.
        later: before all lines but the first; None is `indent`.
        stream: the reader of the text; None is stdout.
    """
    if not is_terminal(stream):
        return [indent + text]
    return wrap(
        text,
        min(_WIDEST, _columns()),
        initial_indent=indent,
        subsequent_indent=indent if later is None else later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def folded_lines(text: str, stream: TextIO | None = None) -> list[str]:
    """Fold each line of a message as a paragraph, with later lines deeper by two spaces."""
    found = []
    for line in text.splitlines():
        words = line.lstrip()
        indent = line[: len(line) - len(words)]
        found += paragraph(words, indent, f"{indent}  ", stream) or [""]
    return found


def table(rows: Sequence[Row], right: Iterable[int] = ()) -> list[str]:
    """Format rows for stdout: folded in a terminal, else one line for each.

    Args:
        rows: the first is the heading.
        right: columns that are flush right.
    """
    if not is_terminal():
        return aligned(rows, right)
    heading, rule, *others = table_lines(rows, right)
    lines = [*heading, *rule]
    for row in others:
        lines += row
    return lines


def table_lines(rows: Sequence[Row], right: Iterable[int] = ()) -> list[list[str]]:
    """Format rows for a terminal: the lines of the heading, of the rule below, of each row."""
    widths = fitted(rows, _columns())
    flush = set(right)
    rule = ("  ".join("-" * width for width in widths)).rstrip()
    heading, *others = [_lines(row, widths, flush) for row in rows]
    return [heading, [rule], *others]


def fitted(rows: Sequence[Row], width: int) -> list[int]:
    """Choose widths of columns for a table of `width` characters, as far as possible.

    Names (the first column, folded at dots) and sentences (columns with a space in a cell) become
    narrower, down to their longest piece, such that the table has the fewest lines; of equally
    short tables the one with the widest names is taken. Pieces are broken only where that is not
    enough.
    """
    columns = list(zip(*rows, strict=True))
    full = [max(map(len, column)) for column in columns]
    widest = full[0]
    narrowest = min(widest, max(_longest(columns[0], r"\.") + 3, _NARROWEST))  # a dot, two spaces
    choices = []
    for name in range(widest, narrowest - 1, -1):
        widths = _with_prose([name, *full[1:]], columns, width)
        if _total(widths) <= width:
            choices.append(widths)
    if choices:
        return min(choices, key=lambda widths: sum(_height(row, widths) for row in rows))
    return _broken([narrowest, *full[1:]], columns, width)


def _with_prose(widths: list[int], columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """Narrow columns of sentences to their longest word, the last column first."""
    for i in reversed(_prose(columns)):
        surplus = _total(widths) - width
        if surplus > 0:
            widths[i] = min(widths[i], max(widths[i] - surplus, _longest(columns[i], " |(?<=_)")))
    return widths


def _broken(widths: list[int], columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """Narrow columns further, where words and parts of names have to be broken."""
    widths = _with_prose(widths, columns, width)
    for i in [*reversed(_prose(columns)), 0]:
        surplus = _total(widths) - width
        if surplus > 0:
            widths[i] = min(widths[i], max(widths[i] - surplus, _NARROWEST))
    return widths


def _prose(columns: Sequence[Sequence[str]]) -> list[int]:
    return [i for i in range(1, len(columns)) if " " in "|".join(columns[i])]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * (len(widths) - 1)


def _height(row: Row, widths: Sequence[int]) -> int:
    """The number of lines of a row."""
    heights = [len(fold_name(row[0], widths[0]))]
    heights += [len(_fold_words(*cell)) for cell in zip(row[1:], widths[1:], strict=True)]
    return max(heights)


def _longest(column: Sequence[str], separator: str) -> int:
    """Characters of the longest piece of a column."""
    return max(len(piece) for cell in column for piece in re.split(separator, cell))


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _lines(row: Row, widths: Sequence[int], right: set[int]) -> list[str]:
    """Break a row into lines, each cell within its column."""
    cells = [fold_name(row[0], widths[0])]
    cells += [list(_fold_words(*cell)) for cell in zip(row[1:], widths[1:], strict=True)]
    lines = []
    for texts in zip_longest(*cells, fillvalue=""):
        parts = []
        for i, (text, width) in enumerate(zip(texts, widths, strict=True)):
            parts.append(text.rjust(width) if i in right else text.ljust(width))
        lines.append((" " * _BETWEEN).join(parts).rstrip())
    return lines


@lru_cache(maxsize=4096)
def _fold_words(text: str, width: int) -> tuple[str, ...]:
    """A sentence as lines of at most `width` characters; a word too long breaks after ``_``."""
    lines, line = [], ""
    for word in text.split(" "):
        pieces = [word] if len(word) <= width else re.split("(?<=_)", word)
        pieces[0] = f" {pieces[0]}" if line else pieces[0]
        for piece in pieces:
            if line and len(line) + len(piece) > width:
                lines.append(line)
                line = piece.lstrip()
            else:
                line += piece
            while len(line) > width:
                lines.append(line[:width])
                line = line[width:]
    return (*lines, line)


def fold_name(name: str, width: int) -> list[str]:
    """A dotted name as lines of at most `width` characters, broken before dots where possible.

    A part that is too wide is broken after ``_``.

    All lines but the first are indented by two, so that the next name is seen to begin.
    """
    pieces: list[str] = []
    for part in re.split(r"(?=\.)", name):
        pieces += [part] if len(part) <= width - 2 else re.split("(?<=_)", part)
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
