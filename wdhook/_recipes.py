"""The rules of known projects, so that their results can be reproduced. wdhook's own is `classify`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from ._errors import ArgumentError

Rule = Callable[[nn.Module], Iterable[tuple[str, bool, str]]]
"""Model → (parameter name, decayed?, reason)."""


def follow(model: nn.Module, recipe: str) -> dict[str, tuple[bool, str]]:
    """Parameter name → (decayed?, reason) by the rule of a known project.

    Raises:
        ArgumentError: there is no recipe of that name.
    """
    rule = RECIPES.get(recipe)
    if rule is None:
        raise ArgumentError(
            f"`recipe` names no known rule.\n  got: {recipe!r}\n  there are: {', '.join(map(repr, RECIPES))}"
        )
    return {name: (decayed, f"recipe {recipe}: {reason}") for name, decayed, reason in rule(model)}


def _forum(model: nn.Module) -> Iterable[tuple[str, bool, str]]:
    """The snippet of the PyTorch forum: 1-D tensors and biases are exempt."""
    for name, param in model.named_parameters():
        exempt = param.ndim == 1 or name.endswith(".bias")
        yield name, not exempt, f"{param.ndim}-D" if not name.endswith(".bias") else "named bias"


def _nanogpt(model: nn.Module) -> Iterable[tuple[str, bool, str]]:
    """nanoGPT's ``configure_optimizers``: everything with two dimensions or more is decayed."""
    for name, param in model.named_parameters():
        yield name, param.ndim >= 2, f"{param.ndim}-D"


RECIPES: Mapping[str, Rule] = {"forum": _forum, "nanogpt": _nanogpt}
