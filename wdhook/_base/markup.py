"""Tables and sentences as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .text import Row


def html_table(rows: Sequence[Row]) -> str:
    """Format rows as a table; the first is the heading."""
    lines = [_html_row("th", rows[0])]
    lines += [_html_row("td", row) for row in rows[1:]]
    return f"<table>{''.join(lines)}</table>"


def html_paragraph(text: str) -> str:
    """Format a sentence."""
    return f"<p>{escape(text)}</p>"


def _html_row(tag: str, row: Row) -> str:
    cells = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
    return f"<tr>{cells}</tr>"
