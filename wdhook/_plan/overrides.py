"""Selectors: how a user names the parameters whose λ differs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from .._base.errors import ArgumentError, SelectorError
from .._base.text import near
from .._base.validate import check_factor
from .._roles.torch_types import shown_class
from .._roles.vocabulary import Role

Predicate = Callable[[str, nn.Module, nn.Parameter], bool]
Selector = Role | str | type | nn.Module | Predicate
Overrides = Mapping[Any, float | bool]
"""Selector → λ. (`Mapping` is invariant in its keys, hence `Any`; see `Selector`.)"""

_ROLES = frozenset(str(role) for role in Role)


class Candidate(NamedTuple):
    """One name of one parameter, as selectors see it."""

    name: str
    alias: str  # differs from `name` for a further name of a tied parameter
    bare: str  # `alias` without the prefixes of wrappers
    role: Role
    module: nn.Module
    parameter: nn.Parameter


Test = Callable[[Candidate], bool]


def apply_overrides(
    candidates: Sequence[Candidate], overrides: Overrides, weight_decay: float, strict: bool
) -> Iterator[tuple[str, float | None, str]]:
    """Yield (parameter name, λ or None for "as given", reason) in order: the last one wins.

    Args:
        candidates: every name of every parameter.
        overrides: see `wdhook.plan`.
        weight_decay: λ as given.
        strict: True where a selector that matches nothing is an error.

    Raises:
        ArgumentError: a selector or its λ has no meaning.
        SelectorError: a selector matches nothing.
    """
    if not isinstance(overrides, Mapping):
        raise ArgumentError(
            "`overrides` must be a mapping from a selector to a λ.\n"
            f"  got: {type(overrides).__name__}\n"
            '  For example overrides={"bias": 0.0, "head.*": True}'
        )
    for selector, given in overrides.items():
        names, label = selected(selector, candidates, "overrides", strict)
        λ = _absolute(given, label)
        for name in names:
            yield name, λ, f"override {label}"


def weakly(rules: Any) -> Callable[[], Any]:
    """The rules as they are now, for later: a mapping is copied, and its selectors do not keep
    modules of the model alive."""
    if not isinstance(rules, Mapping):
        return lambda: rules
    pairs = [
        (weakref.ref(selector) if isinstance(selector, nn.Module) else partial(_same, selector), of)
        for selector, of in rules.items()
    ]

    def living() -> dict[Any, Any]:
        found = ((get(), of) for get, of in pairs)
        return {selector: of for selector, of in found if selector is not None}

    return living


def _same(selector: Any) -> Any:
    return selector


def selected(
    selector: Any, candidates: Sequence[Candidate], argument: str, strict: bool
) -> tuple[list[str], str]:
    """Names of the parameters that a selector matches, and its label in messages.

    Args:
        selector: see `wdhook.plan`.
        candidates: every name of every parameter.
        argument: the one that the selector is a key of, for messages.
        strict: True where a selector that matches nothing is an error.

    Raises:
        ArgumentError: the selector has no meaning.
        SelectorError: the selector matches nothing.
    """
    matches, label = _matcher(selector, candidates)
    names = list(dict.fromkeys(c.name for c in candidates if matches(c)))
    if strict and not names:
        raise SelectorError(_nothing_matches(argument, label, selector, candidates))
    return names, label


def _absolute(given: Any, label: str) -> float | None:
    """The λ of an override; None for True, which means λ as given."""
    if given is True:
        return None
    if given is False:
        return 0.0
    return check_factor(given, f"overrides[{label}]")


def _matcher(selector: Any, candidates: Sequence[Candidate]) -> tuple[Test, str]:
    """The test that a selector stands for, and its label in messages."""
    if isinstance(selector, str):
        return _by_text(selector, candidates), repr(str(selector))
    if isinstance(selector, type):
        if not issubclass(selector, nn.Module):
            raise ArgumentError(
                f"A class in `overrides` must be a torch.nn.Module.\n  got: {selector.__name__}"
            )
        return (lambda c: isinstance(c.module, selector)), selector.__name__
    if isinstance(selector, nn.Module):
        inside = {id(module) for module in selector.modules()}
        return (lambda c: id(c.module) in inside), f"module {type(selector).__name__}"
    if callable(selector):
        return _by_predicate(selector)
    raise ArgumentError(
        "A selector in `overrides` must be a role, a glob on the parameter name, a module class, a "
        "module of the model or a predicate f(name, module, parameter).\n"
        f"  got: {selector!r}"
    )


def _by_text(selector: str, candidates: Sequence[Candidate]) -> Test:
    """A role, or a name; a text that is a name exactly is not read as a glob."""
    text = str(selector)
    if isinstance(selector, Role):
        return lambda c: c.role == selector
    role = text if text in _ROLES else None
    if any(text in (c.alias, c.bare) for c in candidates):
        return lambda c: c.role == role or text in (c.alias, c.bare)
    return lambda c: c.role == role or fnmatchcase(c.alias, text) or fnmatchcase(c.bare, text)


def _by_predicate(predicate: Predicate) -> tuple[Test, str]:
    label = getattr(predicate, "__name__", type(predicate).__name__)

    def test(candidate: Candidate) -> bool:
        answer: Any = predicate(candidate.alias, candidate.module, candidate.parameter)
        if isinstance(answer, bool) or type(answer).__name__ in ("bool", "bool_"):
            return bool(answer)
        raise ArgumentError(
            "A predicate in `overrides` must return True or False.\n"
            f"  predicate: {label}\n  for: {candidate.alias}\n  returned: {answer!r}\n"
            "  Write `return bool(...)`, or `lambda name, module, parameter: ... is not None`"
        )

    return test, label


_SHOWN = 6  # names in a line of an error


def _nothing_matches(
    argument: str, label: str, selector: Any, candidates: Sequence[Candidate]
) -> str:
    """The error for a selector without a match: near words first, the others counted."""
    roles = sorted({str(c.role) for c in candidates})
    classes = sorted({shown_class(c.module) for c in candidates})
    names = list(dict.fromkeys(c.bare for c in candidates))
    text = selector if isinstance(selector, str) else ""
    question = [repr(word) for word in _nearest(text, roles, names)]
    lines = [f"A selector in `{argument}` matches nothing.", f"  selector: {label}"]
    if question:
        lines.append(f"  Did you mean {' or '.join(question)}?")
    lines += [
        f"  roles there are: {', '.join(roles)}",
        f"  classes there are: {_shortened(classes)}",
        f"  names there are: {_shortened([*near(text, names), *names])}",
    ]
    if isinstance(selector, nn.Module):
        lines.append("  The module is no part of this model, or holds no parameter")
    elif text in classes:
        lines.append(f"  In Python a class is a key by itself: overrides={{{text}: 0.0}}")
    else:
        lines.append("  A glob must match the whole name: write 'head.*', not 'head'")
    return "\n".join(lines)


def _nearest(text: str, roles: Sequence[str], names: Sequence[str]) -> list[str]:
    """Roles, globs and names that resemble the text; a glob stays one, for all below a module."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    parents: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            parents[".".join(parts[:end])] = None
    globs = [f"{path}.*" for path in parents if path]
    if text in parents:
        return [f"{text}.*"]
    if "*" in text:
        return near(text, globs)
    return near(text, [*roles, *globs, *names])


def _shortened(words: Sequence[str]) -> str:
    """The first words, and the number of the others."""
    unique = list(dict.fromkeys(words))
    more = len(unique) - _SHOWN
    return ", ".join(unique[:_SHOWN]) + (f", ... {more} more" if more > 0 else "")
