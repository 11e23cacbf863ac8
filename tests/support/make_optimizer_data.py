"""Remake wdhook/_commands/optimizers.tsv, from which `wdhook optimizers` answers.

The source is docs/optimizers.md.

python tests/support/make_optimizer_data.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "optimizers.md"
DATA = ROOT / "wdhook" / "_commands" / "optimizers.tsv"

_TABLE = re.compile(
    r"^### (?P<package>\S+) (?P<version>\S+)\n\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE
)


def cells(line: str) -> list[str]:
    """The cells of one line of a table, without the marks of code."""
    return [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")]


def data(page: str) -> str:
    """The tables of the page as one: package and version come first, then the columns of the page.

    Raises:
        ValueError: the tables of two packages have other columns.
    """
    lines: list[str] = []
    for table in _TABLE.finditer(page):
        head, _, *rows = table["rows"].splitlines()
        columns = "\t".join(["package", "version", *cells(head)])
        if lines and lines[0] != columns:
            raise ValueError(f"the columns of {table['package']} are not those of the first table")
        if not lines:
            lines.append(columns)
        for row in rows:
            lines.append("\t".join([table["package"], table["version"], *cells(row)]))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the data."""
    DATA.write_text(data(PAGE.read_text()))


if __name__ == "__main__":
    main()
