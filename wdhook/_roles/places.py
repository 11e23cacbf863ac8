"""Walks a model: every module and every place that holds a parameter, tied ones under each name.

Modules are told apart by identity, so a module class without a hash is walked like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class Place(NamedTuple):
    """A place in a model that holds a parameter."""

    name: str
    path: str
    local: str
    parameter: torch.Tensor
    repeated: bool
    """True where the module was met before, under another path."""


def walk(model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """Visit modules depth first, in the order of ``named_modules``.

    Returns:
        (path, module, repeated) for each path. A module that is used in two places is listed
        under both paths; `repeated` is True for the later one. A module that contains itself is
        not entered again.
    """
    visits: list[tuple[str, nn.Module, bool]] = []
    _enter("", model, visits, set(), set())
    return visits


def _enter(
    path: str,
    module: nn.Module,
    visits: list[tuple[str, nn.Module, bool]],
    seen: set[int],
    around: set[int],
) -> None:
    """Append a module and all in it to `visits`; `around` has the identities of its parents."""
    key = id(module)
    visits.append((path, module, key in seen))
    seen.add(key)
    children = module._modules
    if not len(children):
        return
    around.add(key)
    prefix = f"{path}." if path else ""
    for name, child in children.items():
        if child is not None and id(child) not in around:
            _enter(prefix + name, child, visits, seen, around)
    around.discard(key)


def places(visits: list[tuple[str, nn.Module, bool]]) -> Iterator[Place]:
    """Yield every place that holds a parameter, in the order of the walk."""
    for path, module, repeated in visits:
        prefix = f"{path}." if path else ""
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(prefix + local, path, local, parameter, repeated)


def named_parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """List the pairs of ``model.named_parameters()``, also where torch's own walk needs a hash."""
    try:
        return list(model.named_parameters())
    except TypeError:  # a module class with __eq__ and without __hash__
        first: dict[int, tuple[str, torch.Tensor]] = {}
        for place in places(walk(model)):
            first.setdefault(id(place.parameter), (place.name, place.parameter))
        return list(first.values())
