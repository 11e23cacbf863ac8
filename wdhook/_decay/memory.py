"""What a formula remembers of each parameter, and what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .tensors import Number


class Memo:
    """What a formula remembers of one parameter.

    Attributes:
        product: decay that is counted and not written yet: the factor that is to be multiplied;
            None stands for 1.
        written: what the last payment multiplied the parameter with, where that is another factor
            than the one it counted; else None.
    """

    __slots__ = ("product", "written")

    def __init__(self) -> None:
        self.product: Number | None = None
        self.written: Number | None = None

    def save(self) -> dict[str, Any]:
        """The contents as a checkpoint holds them; empty where there is nothing to remember."""
        product = self.product
        if product is None:
            return {}
        return {"product": product.detach().clone() if isinstance(product, Tensor) else product}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Undo of `save`."""
        product = saved.get("product")
        self.product = product.detach().clone() if isinstance(product, Tensor) else product


class Memory:
    """What a checkpoint holds of parameters that have not been met yet, by their names.

    The memo of a parameter that is known goes with its progress, from entry to entry.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Mapping[str, Any]] = {}

    def new_memo(self, name: str) -> Memo:
        """A memo for a parameter that is met, with what was saved of it."""
        memo = Memo()
        memo.load(self._saved.pop(name, {}))
        return memo

    def save(self, memos: Mapping[str, Memo]) -> tuple[dict[str, Any], ...]:
        """Name → contents, in a tuple, which torch.distributed.checkpoint saves as one object; ()
        where none is.

        Args:
            memos: of the parameters that are known.
        """
        saved = {**self._saved, **{name: memo.save() for name, memo in memos.items()}}
        saved = {name: contents for name, contents in saved.items() if contents}
        return (saved,) if saved else ()

    def load(self, saved: tuple[Mapping[str, Any], ...], memos: Mapping[str, Memo]) -> None:
        """Undo of `save`: also of what has been remembered since."""
        self._saved = {name: contents for known in saved for name, contents in known.items()}
        for name, memo in memos.items():
            memo.load(self._saved.pop(name, {}))
