"""Weak reference to a model, or to its surviving modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from torch import nn

from .._roles.places import walk


class ModelRef:
    """Weak reference to a model. If the model dies first, refers to its surviving modules.

    A container made only for `attach` may die while its members train on.
    """

    def __init__(self, model: nn.Module, died: Callable[[], None]) -> None:
        self._root = weakref.ref(model)
        self._died = died  # called when the last module is gone
        forget = self._forget
        named = {path: module for path, module, repeated in walk(model) if not repeated}
        self._paths = "\0".join(named)  # one string: most are never needed, and short
        self._modules = [weakref.ref(module, forget) for module in named.values()]
        self._living = len(self._modules)

    def _forget(self, _: object) -> None:
        self._living -= 1
        if not self._living:
            self._died()

    def is_alive(self) -> bool:
        """The model itself still exists."""
        return self._root() is not None

    def model(self) -> nn.Module:
        """The model as it is now; if it has died, a container with its surviving modules."""
        model = self._root()
        if model is not None:
            return model
        refs = zip(self._paths.split("\0"), self._modules, strict=True)
        return _container({path: ref() for path, ref in refs})


def _container(modules: Mapping[str, nn.Module | None]) -> nn.Module:
    """A module that holds the living `modules` under their paths. Nothing is added to any of
    them."""
    placed: dict[str, nn.Module] = {"": nn.Module()}

    def place(path: str) -> nn.Module:
        if path in placed:
            return placed[path]
        above, _, local = path.rpartition(".")
        parent = place(above)
        module = modules.get(path)
        placed[path] = nn.Module() if module is None else module
        if modules.get(above) is None:  # a surviving module still holds its own children
            parent.add_module(local, placed[path])
        return placed[path]

    for path in modules:
        place(path)
    return placed[""]
