"""Objects that the process holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any


def living(kind: type[Any]) -> Iterator[Any]:
    """Every object of a class that the process holds. Slow; objects of other classes are asked
    nothing."""
    for thing in gc.get_objects():
        if issubclass(type(thing), kind):
            yield thing
