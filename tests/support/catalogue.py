"""What it takes to construct and to drive an optimizer; the packages, by their own registries."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

from catalogue_loops import LR, Group, Loop, mixed, plain
from torch import nn
from torch.optim import Optimizer

Build = Callable[[nn.Module, list[Group]], Any]
"""Model and param groups → optimizer. The first group holds the weights, which are decayed."""


@dataclass(frozen=True)
class Case:
    """One optimizer of a package, and how to use it."""

    package: str
    name: str
    build: Build
    loop: Loop = plain
    model: Callable[[], nn.Module] = mixed
    surroundings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    lr: Callable[[Group], Any] = lambda group: group["lr"]
    """What decoupled decay is multiplied with, written by hand."""
    groups: Callable[[Any], list[Group]] = lambda optimizer: optimizer.param_groups
    attach: Callable[[Any, str], dict[str, Any]] = lambda optimizer, mode: {}
    """Further arguments of `attach`, for an optimizer and a mode."""
    cannot: str = ""
    """Why it cannot be run here."""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.package}: {self.name}"


@dataclass(frozen=True)
class Package:
    """A package with optimizers: the module to look for, and the cases."""

    name: str
    module: str
    cases: Callable[[], list[Case]] = field(repr=False)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """Without the local part, which says for what device it was built."""
        return metadata.version(self.name).split("+")[0]


def by_signature(
    kind: Any, weight: Group | None = None, rest: Group | None = None, **given: Any
) -> Build:
    """Construct `kind` with our lr, without decay (where it has such arguments), and with `given`.

    Args:
        kind: a class, or a function that makes an optimizer.
        weight, rest: further entries of the two param groups.
    """
    names = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"lr": LR} if "lr" in names else {}
    if "weight_decay" in names:
        arguments["weight_decay"] = 0.0
    arguments.update(given)

    def build(model: nn.Module, groups: list[Group]) -> Any:
        more = (weight or {}, rest or {})
        return kind(
            [{**group, **extra} for group, extra in zip(groups, more, strict=False)],
            **copy.copy(arguments),
        )

    return build


def optimizers_in(module: ModuleType, *homes: str) -> dict[str, type]:
    """name → class of the optimizers that a module exports and its package (or `homes`) defines."""
    at_home = {module.__name__.split(".")[0], *homes}
    return {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, Optimizer)
        and kind.__module__.split(".")[0] in at_home
    }


def each(names: str, how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same for several names."""
    return dict.fromkeys(names.split(), how)


_FIELDS = {"build", "loop", "model", "surroundings", "lr_of", "groups", "attach", "cannot", "note"}


def listed(package: str, kinds: dict[str, type], special: dict[str, dict[str, Any]]) -> list[Case]:
    """A case for every class: with the fields and arguments in `special`, else by its signature.

    A key of `special` may be a class and a variant of it: "Adam decoupled".
    """
    unknown = {name for name in special if name.split()[0] not in kinds}
    if unknown:
        raise LookupError(f"{package} has no {sorted(unknown)}")
    cases = []
    for name in sorted({*kinds, *special}, key=str.lower):
        how = special.get(name, {})
        fields = {key: value for key, value in how.items() if key in _FIELDS}
        arguments = {key: value for key, value in how.items() if key not in _FIELDS}
        if "lr_of" in fields:
            fields["lr"] = fields.pop("lr_of")
        fields.setdefault(
            "build",
            by_signature(kinds[name.split()[0]], **arguments) if "build" not in fields else None,
        )
        cases.append(Case(package, name, **fields))
    return cases


@functools.cache
def packages() -> dict[str, Package]:
    """Every package of the catalogue, installed or not."""
    modules = ("frameworks", "heavyball", "pytorch_optimizer", "small", "timm")
    found = [p for name in modules for p in importlib.import_module(f"catalogue_{name}").PACKAGES]
    return {
        package.name: package
        for package in sorted(found, key=lambda p: (p.name != "torch", p.name))
    }


@functools.cache
def cases_of(name: str) -> tuple[Case, ...]:
    """The cases of a package that is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages warn of what they import
        return tuple(packages()[name].cases())
