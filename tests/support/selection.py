"""Which tests are slow, and the few lines that say what a run of the tests left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SLOW_ROOMS = {"compile", "distributed", "frameworks"}
PROCESS_GROUPS = {"two", "four"}  # fixtures
FAST = "not slow"  # the selection of setup.cfg

ABSENT = re.compile(
    r"could not import '(?P<module>\w+)"
    r"|(the \w+ )?needs (?P<package>[\w-]+)$"
    r"|(?P<distribution>[\w-]+) is not installed$"
)


def is_slow(path: Path, fixtures: Iterable[str]) -> bool:
    """Whether a test is slow by its room, or by the process groups that it asks for."""
    if not PROCESS_GROUPS.isdisjoint(fixtures):
        return True
    return path.is_relative_to(TESTS) and path.relative_to(TESTS).parts[0] in SLOW_ROOMS


def heading(selection: str) -> str:
    """The line at the start of a run: the tests that it selects, and what runs all of them."""
    if selection == FAST:
        selected = "all but the slow tests, one to two minutes on an idle core"
    elif selection:
        selected = f"the tests of -m {selection!r}"
    else:
        selected = "all tests, the slow ones too"
    return f"wdhook: {selected}; .ci/run runs everything"


def slow_ones(deselected: int, arguments: Sequence[str]) -> str:
    """The line about slow tests that were deselected, with the command that runs them."""
    command = " ".join(["python -m pytest -m ''", *arguments])
    return f"left out: {deselected} slow tests, which `.ci/run slow` runs, or `{command}`"


def skips(reasons: Iterable[str]) -> Iterator[str]:
    """One line for all absent packages together, and one for all other reasons of a skip."""
    packages: set[str] = set()
    absent = 0
    others: Counter[str] = Counter()
    for reason in reasons:
        reason = reason.removeprefix("Skipped: ")
        found = ABSENT.match(reason)
        if found is None:
            others[reason] += 1
            continue
        absent += 1
        name = found["module"] or found["package"] or found["distribution"]
        packages.add(name.lower().replace("_", "-"))
    if absent:
        yield (
            f"skipped: {absent} tests of packages that are not installed "
            f"({', '.join(sorted(packages))}); `.ci/run others` has most of them"
        )
    if others:
        counts = (f"{count} ({reason})" for reason, count in others.most_common())
        yield f"skipped: {', '.join(counts)}"
