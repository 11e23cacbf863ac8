"""Selectors: how a user names the parameters whose λ differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from .._base.errors import ArgumentError, SelectorError
from .._base.validate import check_factor
from .._roles.classifier import Role

Predicate = Callable[[str, nn.Module, nn.Parameter], bool]
Selector = Role | str | type | Predicate
Overrides = Mapping[Any, float | bool]
"""Selector → λ. (`Mapping` is invariant in its keys, hence `Any`; see `Selector`.)"""


class Candidate(NamedTuple):
    """One name of one parameter, as selectors see it."""

    name: str
    alias: str  # differs from `name` for the second name of a tied parameter
    bare: str  # `alias` without what wrappers put before it
    role: Role
    module: nn.Module
    parameter: nn.Parameter


def apply_overrides(
    candidates: Sequence[Candidate], overrides: Overrides, weight_decay: float, strict: bool
) -> Iterator[tuple[str, float | None, str]]:
    """Yield (parameter name, λ or None for "as given", reason) in order: the last one wins.

    Args:
        strict: whether a selector has to match something; not so in a model that changed since.

    Raises:
        ArgumentError: a selector or its λ has no meaning.
        SelectorError: a selector matches nothing.
    """
    if not isinstance(overrides, Mapping):
        raise ArgumentError(
            f"`overrides` must be a mapping from a selector to a λ.\n  got: {type(overrides).__name__}\n"
            '  For example overrides={"bias": 0.0, "head.*": True}'
        )
    for selector, given in overrides.items():
        matches, label = _matcher(selector)
        λ = (
            None
            if given is True
            else check_factor(0.0 if given is False else given, f"overrides[{label}]")
        )
        names = dict.fromkeys(c.name for c in candidates if matches(c))
        if strict and not names:
            raise SelectorError(_nothing_matches(label, candidates))
        yield from ((name, λ, f"override {label}") for name in names)


def _matcher(selector: Any) -> tuple[Callable[[Candidate], bool], str]:
    """The test that a selector stands for, and how to call it in a message."""
    if isinstance(selector, str):
        text = str(selector)
        role = text if text in {str(r) for r in Role} else None
        return (
            lambda c: c.role == role or fnmatchcase(c.alias, text) or fnmatchcase(c.bare, text),
            repr(text),
        )
    if isinstance(selector, type):
        if not issubclass(selector, nn.Module):
            raise ArgumentError(
                f"A class in `overrides` must be a torch.nn.Module.\n  got: {selector.__name__}"
            )
        return (lambda c: isinstance(c.module, selector)), selector.__name__
    if callable(selector):
        label = getattr(selector, "__name__", type(selector).__name__)
        return (lambda c: bool(selector(c.alias, c.module, c.parameter))), label
    raise ArgumentError(
        "A selector in `overrides` must be a role, a glob on the parameter name, a module class or a "
        f"predicate f(name, module, parameter).\n  got: {selector!r}"
    )


def _nothing_matches(label: str, candidates: Sequence[Candidate]) -> str:
    roles = sorted({str(c.role) for c in candidates})
    classes = sorted({type(c.module).__name__ for c in candidates})
    names = [c.bare for c in candidates]
    shown = (
        names
        if len(names) <= 30
        else [*names[:15], f"... {len(names) - 30} more ...", *names[-15:]]
    )
    return (
        f"A selector in `overrides` matches nothing.\n  selector: {label}\n"
        f"  roles there are: {', '.join(roles)}\n  classes there are: {', '.join(classes)}\n"
        f"  names there are: {', '.join(shown)}\n"
        "  A glob must match the whole name: write '*.bias', not 'bias.'"
    )
