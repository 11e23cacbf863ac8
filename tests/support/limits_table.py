"""Remake the table of rules in docs/limits.md from the rules of the engine.

    python tests/support/limits_table.py

tests/docs/test_limits_page.py fails where the page is another one.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from wdhook._decay.rules.base import Rule  # noqa: E402
from wdhook._decay.rules.table import RULES  # noqa: E402

PAGE = ROOT / "docs" / "limits.md"
START = "<!-- the rules: made by tests/support/limits_table.py -->\n"
END = "<!-- the end of the rules -->\n"
HEAD = "| rule | situation | error or warning |\n|---|---|---|\n"


def row(rule: Rule) -> str:
    """One line of the table."""
    said = f"`{rule.says.__name__}`" if rule.is_error else "warning"
    return f"| `{rule.id}` | {rule.situation} | {said}: {rule.answer} |\n"


def table() -> str:
    """The table of all rules."""
    return HEAD + "".join(map(row, RULES))


def remade(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(remade(PAGE.read_text()))
