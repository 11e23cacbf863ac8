"""What a formula remembers of each parameter, and what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._plan.anchor import Anchor
from .._plan.decision import Decision
from .._plan.names import plain_name
from .tensors import Number


class Memo:
    """What a formula remembers of one parameter.

    Attributes:
        product: decay that is counted and not written yet: the factor that is to be multiplied;
            None stands for 1.
        written: what the last payment multiplied the parameter with, where that is another factor
            than the one it counted; else None.
        toward: the target as it was decided.
        target: the target as values; None where decay draws to 0, and before the first step.
        is_loaded: the target is that of a checkpoint.
    """

    __slots__ = ("is_loaded", "product", "target", "toward", "written")

    def __init__(self, decision: Decision) -> None:
        self.product: Number | None = None
        self.written: Number | None = None
        self.toward = decision.toward
        self.target = decision.given
        self.is_loaded = False

    def copy(self) -> Memo:
        """The target, for a second tensor that is made of the parameter. What is counted is written
        once."""
        copy: Memo = Memo.__new__(Memo)
        copy.product = copy.written = None
        copy.toward, copy.target, copy.is_loaded = self.toward, self.target, self.is_loaded
        return copy

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

    @property
    def is_of_init(self) -> bool:
        """The target is the value before the first update."""
        return isinstance(self.toward, Anchor) and self.toward.is_init

    @property
    def waits(self) -> bool:
        """The target is the value before the first update, which has not come yet."""
        return self.target is None and self.is_of_init

    def take(self, target: Tensor | None) -> None:
        """Take the target of a checkpoint, if the checkpoint has one; a given one stays."""
        if target is not None and self.is_of_init:
            self.target, self.is_loaded = target.detach().clone(), True


class Memory:
    """What a checkpoint holds of parameters that have not been met yet, by their names.

    The memo of a parameter that is known goes with its progress, from entry to entry.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Mapping[str, Any]] = {}
        self._targets: dict[str, Tensor] = {}

    def new_memo(self, decision: Decision) -> Memo:
        """A memo for a parameter that is met, with what was saved of it."""
        memo = Memo(decision)
        name = plain_name(decision.name)
        memo.load(self._saved.pop(name, {}))
        memo.take(self._targets.pop(name, None))
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

    def load(
        self,
        saved: tuple[Mapping[str, Any], ...],
        targets: Mapping[str, Tensor],
        memos: Mapping[str, Memo],
    ) -> None:
        """Undo of `save`: also of what has been remembered since."""
        self._saved = {name: contents for known in saved for name, contents in known.items()}
        self._targets = dict(targets)
        for name, memo in memos.items():
            memo.load(self._saved.pop(name, {}))
            memo.take(self._targets.pop(name, None))

    def save_targets(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the parameters that are known, and those that were loaded for others."""
        return {**self._targets, **found}
