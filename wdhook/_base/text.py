"""Rows of text: folds names that differ in numbers alone, and aligns columns. Near words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Protocol, TypeVar

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a path component: the 3 of "layers.3.fc"
Row = tuple[str, ...]
Index = tuple[tuple[int, int], ...]  # one (first, last) for each number of a name


class Named(Protocol):
    """An object with the name of a parameter."""

    @property
    def name(self) -> str:
        """Full name in the model."""


T = TypeVar("T", bound=Named)


def fold_by(items: Sequence[T], alike: Callable[[T], object]) -> list[tuple[str, T]]:
    """Join neighbours with equal results of `alike`, and with names that differ in numbers."""
    groups: dict[tuple[object, ...], list[tuple[Index, T]]] = {}
    for item in items:
        index = tuple((int(n), int(n)) for n in NUMBER.findall(item.name))
        groups.setdefault((NUMBER.sub("#", item.name), alike(item)), []).append((index, item))
    place = {id(item): i for i, item in enumerate(items)}
    runs = [run for members in groups.values() for run in _joined(members, len(members[0][0]))]
    return [
        (_label(item.name, index), item)
        for index, item in sorted(runs, key=lambda run: place[id(run[1])])
    ]


def _joined(members: list[tuple[Index, T]], depth: int) -> list[tuple[Index, T]]:
    """Join neighbours along one number at a time, the innermost first."""
    for at in reversed(range(depth)):
        runs: dict[Index, list[tuple[Index, T]]] = {}
        for index, d in members:
            run = runs.setdefault(index[:at] + index[at + 1 :], [])
            if run and run[-1][0][at][1] + 1 == index[at][0]:
                (low, _), first = run[-1][0][at], run[-1][1]
                run[-1] = ((*index[:at], (low, index[at][1]), *index[at + 1 :]), first)
            else:
                run.append((index, d))
        members = [member for run in runs.values() for member in run]
    return members


def _label(name: str, index: Index) -> str:
    parts = iter(index)
    text = NUMBER.sub(
        lambda _: "{}-{}".format(*part) if (part := next(parts))[0] != part[1] else str(part[0]),
        name,
    )
    times = 1
    for low, high in index:
        times *= high - low + 1
    return f"{text} ×{times}" if times > 1 else text


def aligned(rows: Sequence[Row], right: Iterable[int] = ()) -> list[str]:
    """Rows as lines of text, with a rule below the heading. Columns in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = set(right)
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def short(number: float, digits: int = 6) -> str:
    """A number as people type it: 5e-5, and not 5e-05."""
    return re.sub(r"e([-+])0+", r"e\1", f"{number:.{digits}g}")


def or_not_given(value: object) -> str:
    """An argument as text, and None in words."""
    return "not given" if value is None else repr(value)


def near(text: str, known: Iterable[str]) -> list[str]:
    """Up to three known words that resemble a text, the nearest first. Case does not count."""
    words: dict[str, str] = {}
    for word in known:
        words.setdefault(word.lower(), word)
    return [words[word] for word in get_close_matches(text.lower(), words, n=3)]


def did_you_mean(text: object, known: Iterable[str], quoted: bool = False) -> str:
    """A question to append to an error, or nothing where no known word is near.

    Args:
        text: as the user gave it; what is no string resembles nothing.
        known: the words that have a meaning.
        quoted: write words as Python does, and not as a shell.
    """
    found = near(text, known) if isinstance(text, str) else []
    if quoted:
        found = [repr(word) for word in found]
    return f". Did you mean {' or '.join(found)}?" if found else ""
