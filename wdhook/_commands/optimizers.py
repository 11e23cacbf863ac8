"""``wdhook optimizers``: looks an optimizer up in the table of docs/optimizers.md."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

from .._base.terminal import paragraph
from .._base.text import Row, did_you_mean
from .shared import Commands, UsageError, add_command, counted
from .tables import FAINT, print_table

_DESCRIPTION = """\
Look an optimizer up: is wdhook's decay exact with it, and what does its own weight_decay do? Each
row was found by running it, five steps of a small model, with wdhook.attach and with the decay
written by hand. Without a name the packages are listed. docs/optimizers.md has the whole table, and
the meaning of each word.

exit status: 0; 2 when no optimizer has that name.
"""

_EXAMPLES = """\
examples:
  python -m wdhook optimizers Lion
  python -m wdhook optimizers schedulefree      all of a package
  python -m wdhook optimizers AdamW --json | jq '.optimizers[] | select(.package == "torch")'
"""

# What does the same as the optimizer's own decay.
_DROP_IN = {
    "coupled": 'wdhook.attach(model, λ, at="step")',
    "decoupled": 'wdhook.attach(model, λ, mode="decoupled", at="step")',
}
_NOTHING = "none"

Entry = dict[str, str]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the parser of the command."""
    parser = add_command(
        commands,
        run,
        name="optimizers",
        summary="look up what was measured with an optimizer",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="of an optimizer or of a package; case is ignored"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, a list of the rows")


def run(arguments: argparse.Namespace) -> int:
    """Print the rows of an optimizer, or the packages.

    Raises:
        UsageError: no optimizer and no package has that name.
    """
    known = entries()
    if arguments.name is not None:
        known = found(known, arguments.name)
    if arguments.json:
        print(json.dumps({"schema": "wdhook.optimizers/1", "optimizers": known}))
    elif arguments.name is None:
        _print_packages(known)
    else:
        _print_entries(known)
    return 0


def entries() -> list[Entry]:
    """The rows of the table, each a mapping from column to cell."""
    text = files("wdhook").joinpath("_commands/optimizers.tsv").read_text(encoding="utf-8")
    head, *rows = text.splitlines()
    columns = head.split("\t")
    return [dict(zip(columns, row.split("\t"), strict=True)) for row in rows]


def found(known: Sequence[Entry], name: str) -> list[Entry]:
    """Find entries by the name of an optimizer or a package, or by a part of the name.

    Raises:
        UsageError: there is none.
    """
    wanted = name.lower()
    equal = [e for e in known if wanted in _names(e)]
    if equal:
        return equal
    within = [e for e in known if wanted in e["optimizer"].lower()]
    if within:
        return within
    names = dict.fromkeys(e["optimizer"] for e in known)
    packages = dict.fromkeys(e["package"] for e in known)
    raise UsageError(
        f"no optimizer and no package is called {name!r}{did_you_mean(name, [*names, *packages])}\n"
        f"  packages: {', '.join(packages)}\n"
        "  Any torch.optim.Optimizer works; the doctor tries yours: "
        "python -m wdhook doctor train.py:make"
    )


def _names(entry: Entry) -> set[str]:
    """Names of this entry, in lower case: "nadam" is also "NAdam decoupled"."""
    optimizer = entry["optimizer"].lower()
    return {optimizer, optimizer.split(" ")[0], entry["package"].lower()}


def _print_packages(known: Sequence[Entry]) -> None:
    rows: list[Row] = [("package", "version", "optimizers")]
    for (package, version), number in Counter((e["package"], e["version"]) for e in known).items():
        rows.append((package, version, str(number)))
    print_table(rows, right=[2])
    print(f"\n{counted(len(known), 'optimizer')}. Look one up by its name.")


_CELLS = {
    "✓": "the same parameters, to the last bit, as with the decay written by hand.",
    "asks": "wdhook.adopt(model, optimizer) needs mode=, as it does not know the formula.",
}


def _print_entries(known: Sequence[Entry]) -> None:
    columns = [c for c in known[0] if c != "version" and any(e[c] for e in known)]
    rows: list[Row] = [tuple(columns)]
    colours = []
    for entry in known:
        rows.append(tuple(entry[column] for column in columns))
        not_run = entry["note"].startswith("not run")
        colours.append(FAINT if not_run else "")
    print_table(rows, colours=colours)
    print()
    _print_meanings(known)


def _print_meanings(known: Sequence[Entry]) -> None:
    """Explain the words in the rows of a table."""
    cells: set[str] = set()
    for entry in known:
        cells.update(entry.values())
    for cell, meaning in _CELLS.items():
        if cell in cells:
            print(*paragraph(f"{cell}: {meaning}", later="  "), sep="\n")
    for own in dict.fromkeys(e["its own decay"] for e in known if e["its own decay"]):
        print(*paragraph(_meaning(own), later="  "), sep="\n")


def _meaning(own: str) -> str:
    """Explain a kind of own decay, with the call of wdhook for it."""
    if own == _NOTHING:
        return "its own decay, none: the optimizer has no weight_decay that acts."
    kind = own.partition(",")[0]
    if kind in _DROP_IN:
        return f"its own decay, {own}: {_DROP_IN[kind]} does the same with the same λ."
    return (
        f"its own decay, {own}: λ means something else there. wdhook decays by its own formulas; "
        "see docs/modes.md."
    )
