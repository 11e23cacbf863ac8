"""The columns of the picture of a plan: parts of a model, as many as can be drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from .._plan.decision import Decision

MOST = 20  # columns: as many as six inches hold with labels that can be read
_JOINED = (1, 2, 3, 4, 6, 8, 12)  # blocks in a column, the fewest that fit


class Part(NamedTuple):
    """A column: neighbours in the model, with a label."""

    label: str
    decisions: list[Decision]


def parts(decisions: Sequence[Decision], most: int = MOST) -> list[Part]:
    """Group neighbours in the model into columns: as many columns as can be drawn.

    A column holds the parameters below one path, as ``layers.0.blocks.1``; or, where these would be
    too many, below a few that follow each other, as ``layers.0-3``.

    Args:
        decisions: of a plan, in the order of the model.
        most: columns at most.
    """
    deepest = max(d.name.count(".") for d in decisions)
    best: list[Part] = []
    for depth in range(1, 1 + max(1, deepest)):
        found = _at(decisions, depth, most)
        if len(found) > len(best):  # deeper paths that make no more columns are but longer labels
            best = found
    if best:
        return best
    size = math.ceil(len(decisions) / most)
    columns = []
    for i in range(0, len(decisions), size):
        columns.append(Part(f"{decisions[i].name}, …", list(decisions[i : i + size])))
    return columns


def _at(decisions: Sequence[Decision], depth: int, most: int) -> list[Part]:
    """Make columns of the paths at a depth, or none if even joined blocks are too many."""
    blocks = []
    for label, run in groupby(decisions, lambda d: _path(d.name, depth)):
        blocks.append(Part(label, list(run)))
    for size in _JOINED:
        found = _joined(blocks, size)
        if len(found) <= most:
            return found
    return []


def _path(name: str, depth: int) -> str:
    """Cut the module path of a parameter at `depth`; a parameter of the model is its own path."""
    return ".".join(name.split(".")[:-1][:depth]) or name


def _joined(blocks: Sequence[Part], size: int) -> list[Part]:
    """Join blocks with consecutive numbers at the end, `size` at a time: ``layers.0-3``."""
    columns: list[Part] = []
    for _, run in groupby(blocks, lambda part: re.sub(r"\d+$", "#", part.label)):
        series = list(run)
        step = size if series[0].label[-1].isdigit() else 1
        for i in range(0, len(series), step):
            columns.append(_one(series[i : i + step]))
    return columns


def _one(blocks: Sequence[Part]) -> Part:
    label = blocks[0].label
    if len(blocks) > 1:
        label += "-" + re.findall(r"\d+$", blocks[-1].label)[0]
    decisions: list[Decision] = []
    for block in blocks:
        decisions += block.decisions
    return Part(label, decisions)
