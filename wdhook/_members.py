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
        self._modules = {path: weakref.ref(module, forget) for path, module in model.named_modules()}

    def _forget(self, _: object) -> None:
        if all(ref() is None for ref in self._modules.values()):
            self._died()

    def model(self) -> nn.Module:
        """The model as it is now; if it has died, a container with those of its modules that live."""
        model = self._root()
        return model if model is not None else _container({path: ref() for path, ref in self._modules.items()})


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
