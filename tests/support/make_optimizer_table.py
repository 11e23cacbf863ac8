"""Remake docs/optimizers.md from the installed optimizers, or check that it is current for them.

    python tests/support/make_optimizer_table.py [--check] [PACKAGE ...]

Rows of packages that are not installed (or not named) stay as they are. `--check` changes nothing:
it exits with 1 and shows the difference if a package is installed in the version of its table and
the rows are not what is found now.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import make_optimizer_data  # noqa: E402
import torch  # noqa: E402
from catalogue import Case, Package, cases_of, packages  # noqa: E402
from catalogue_verdict import MODES, verdict  # noqa: E402

PAGE = ROOT / "docs" / "optimizers.md"
START = "<!-- the tables: made by tests/support/make_optimizer_table.py -->"
HEAD = (
    "| optimizer | coupled, backward | coupled, step | decoupled, step | its own decay "
    "| `adopt` | note |\n"
)
RULE = "|---|---|---|---|---|---|---|\n"
SHORT = {"exact": "✓"}
LOST = 0.95  # of a shrinkage; updates that read the parameter take back less


def row(case: Case) -> str:
    """One line of a table."""
    if case.cannot:
        return f"| {case.name} | | | | | | not run: {case.cannot} |\n"
    found = verdict(case)
    modes = [
        SHORT.get(mode, mode.replace("refused: ", "`").replace("Error", "Error`"))
        for mode in found.modes
    ]
    adopt = SHORT.get(found.adopt, found.adopt)
    return f"| {case.name} | {' | '.join(modes)} | {found.own} | {adopt} | {note(case)} |\n"


def note(case: Case) -> str:
    keeps = verdict(case).keeps
    notes = [case.note] if case.note else []
    if keeps is not None and keeps < LOST and not verdict(case).modes[-1].startswith("refused"):
        notes.append(f"undoes {round(100 * (1 - keeps), -1):.0f} % of a shrinkage in the same step")
    return "; ".join(notes)


@functools.cache
def table(package: Package) -> str:
    """The section of a package that is installed."""
    torch.set_num_threads(1)
    rows = "".join(map(row, cases_of(package.name)))
    return f"### {package.name} {package.version}\n\n{HEAD}{RULE}{rows}"


def sections(page: str) -> tuple[str, dict[str, str]]:
    """The text before the tables, and the section of each package."""
    intro, _, tables = page.partition(START)
    found = re.findall(r"^### \S+ .*?(?=^### |\Z)", tables, flags=re.MULTILINE | re.DOTALL)
    return intro, {section.split()[1]: section.rstrip() + "\n" for section in found}


def is_same_version(package: Package, section: str) -> bool:
    return section.startswith(f"### {package.name} {package.version}\n")


def difference(package: Package, section: str) -> str:
    """What is not current in the section of a package."""
    lines = difflib.unified_diff(
        section.splitlines(), table(package).splitlines(), "docs", "here", lineterm="", n=0
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Make or check the tables of the packages that are named, or of all."""
    check = "--check" in arguments
    names = [a for a in arguments if a != "--check"] or list(packages())
    intro, known = sections(PAGE.read_text())
    stale = 0
    for package in (packages()[name] for name in names):
        if not package.installed:
            print(f"{package.name}: not installed, left as it is")
        elif not check:
            known[package.name] = table(package)
            print(f"{package.name}: {len(cases_of(package.name))} rows")
        elif not is_same_version(package, known.get(package.name, "")):
            print(f"{package.name}: {package.version} is here, another version in the table")
        else:
            found = difference(package, known[package.name])
            stale += bool(found)
            print(
                f"{package.name}: {'not current' if found else 'current'}",
                found,
                sep="\n" if found else "",
            )
    if not check:
        tables = "\n".join(known[name] for name in packages() if name in known)
        PAGE.write_text(f"{intro}{START}\n\n{tables}")
        make_optimizer_data.main()
    return 1 if stale else 0


assert len(MODES) == 3, "the head of the table names three"

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
