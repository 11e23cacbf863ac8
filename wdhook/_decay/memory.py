"""What a formula remembers of each parameter: under the parameter's name, so that it outlives an
optimizer."""

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

    def take(self, other: Memo) -> None:
        """Take over what another memo holds, and leave nothing there: it is written once."""
        self.product, other.product = other.product, None

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
    """The memos of one handle, by the names of parameters.

    An entry goes when its optimizer goes, or its parameter. A memo waits for the next entry of
    that name: of the same parameter under another optimizer, or of one that has taken its place
    (a conversion, ``assign=True``).
    """

    def __init__(self) -> None:
        self._memos: dict[str, Memo] = {}

    def begin(self, name: str) -> Memo:
        """A memo for a new entry, with what the last entry of that name has left."""
        memo = Memo()
        if name in self._memos:
            memo.take(self._memos[name])
        self._memos[name] = memo
        return memo

    def of(self, name: str) -> Memo | None:
        """The memo of that name; None where there is none."""
        return self._memos.get(name)

    def save(self) -> tuple[dict[str, Any], ...]:
        """Name → contents, in a tuple, which torch.distributed.checkpoint saves as one object; ()
        where none is."""
        saved = {name: memo.save() for name, memo in self._memos.items()}
        saved = {name: contents for name, contents in saved.items() if contents}
        return (saved,) if saved else ()

    def load(self, saved: tuple[Mapping[str, Any], ...]) -> None:
        """Undo of `save`: also of what has been remembered since."""
        contents = {name: memo for known in saved for name, memo in known.items()}
        for name in {*self._memos, *contents}:
            self._memos.setdefault(name, Memo()).load(contents.get(name, {}))
