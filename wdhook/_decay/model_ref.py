"""The model and its modules, referred to weakly."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from torch import nn


class Members:
    """A model, as long as it lives; after that, those of its modules that do.

    A container made only for `attach` may die while its members train on.
    """

    def __init__(self, model: nn.Module, died: Callable[[], None]) -> None:
        self._root = weakref.ref(model)
        self._died = died  # called when the last module is gone
        forget = self._forget
        named = dict(model.named_modules())
        self._paths = "\0".join(named)  # one string: needed by few, and most of them are short
        self._modules = [weakref.ref(module, forget) for module in named.values()]
        self._living = len(self._modules)

    def _forget(self, _: object) -> None:
        self._living -= 1
        if not self._living:
            self._died()

    def model(self) -> nn.Module:
        """The model as it is now; if it has died, a container with those of its modules that live."""
        model = self._root()
        if model is not None:
            return model
        return _container(
            {path: ref() for path, ref in zip(self._paths.split("\0"), self._modules, strict=True)}
        )


def _container(modules: Mapping[str, nn.Module | None]) -> nn.Module:
    """A module that holds the living ones of `modules` under their paths. Nothing is added to any of them."""
    placed: dict[str, nn.Module] = {"": nn.Module()}

    def place(path: str) -> nn.Module:
        if path not in placed:
            above, _, local = path.rpartition(".")
            parent = place(above)
            module = modules.get(path)
            placed[path] = module if module is not None else nn.Module()
            if modules.get(above) is None:  # one that lives has its children already
                parent.add_module(local, placed[path])
        return placed[path]

    for path in modules:
        place(path)
    return placed[""]
