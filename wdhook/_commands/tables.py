"""Tables in the colours of the terminal, fitted to its width."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from .._base.terminal import is_terminal, table_lines
from .._base.text import Row, aligned

GREEN, RED, YELLOW, CYAN, FAINT, BOLD = "32", "31", "33", "36", "2", "1"  # ANSI's SGR codes


def in_colour() -> bool:
    """Decide on colours: stdout is a terminal with colours, and NO_COLOR is not set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if os.name == "nt" and "WT_SESSION" not in os.environ:  # older consoles print the codes
        return False
    return is_terminal()


def painted(text: str, *codes: str | None) -> str:
    """Put text between ANSI codes, if the terminal has colours."""
    wanted = ";".join(code for code in codes if code)
    if not wanted or not in_colour():
        return text
    return f"\x1b[{wanted}m{text}\x1b[0m"


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
    if not is_terminal():
        print(*aligned(rows, right), sep="\n")
        return
    heading, rule, *others = table_lines(rows, right)
    print(*heading, *rule, sep="\n")
    for lines, is_strong, colour in zip_longest(others, strong, colours):
        bold = BOLD if is_strong else ""
        for line in lines:
            print(painted(line, bold, colour))
