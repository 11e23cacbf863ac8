"""Finds the tensors in nested values: containers, dataclasses, slots and plain objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, type)
"""Values that hold nothing else and cannot be changed."""
PLAIN_TYPES = frozenset(PLAIN)

_SEQUENCES = (list, tuple, set, frozenset, deque)
_ABSENT = object()


def slots_of(value: object) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for each slot of an object that is filled."""
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        for name in names:
            if name in ("__dict__", "__weakref__"):
                continue
            held = getattr(value, name, _ABSENT)
            if held is not _ABSENT:
                yield name, held


def fields_of(value: object) -> dict[str, Any]:
    """Return the attributes of an object, in `__dict__` or in slots."""
    return {**getattr(value, "__dict__", {}), **dict(slots_of(value))}


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, dataclasses and other plain objects, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (*PLAIN, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    for item in _items(value):
        yield from tensors_in(item, seen)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        return iter(list(value.values()))
    if isinstance(value, _SEQUENCES):
        return iter(list(value))
    return iter(fields_of(value).values())
