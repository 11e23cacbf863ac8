"""What a formula of decay is: the number that is written with, and the writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tensors
from ..entry import Due
from ..memory import Memo
from ..tensors import Number

Rest = Callable[[], None]
"""The part of a payment that comes after the optimizer's update."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The numbers of one payment.

    Attributes:
        weight_decay: λ.
        lr: learning rate; None for a formula that needs none.
        peak: largest learning rate so far; None for a formula that needs none.
        sign: -1.0 for an optimizer that maximizes, which negates the gradient.
        dtype: of the parameters; None where no formula has to know.
    """

    weight_decay: float
    lr: Number | None = None
    peak: Number | None = None
    sign: float = 1.0
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class How:
    """The circumstances of one payment.

    Attributes:
        foreach: as in torch.optim: None chooses, True forces, False forbids.
        scale: the factor (0-dim tensor) that the gradients hold still; None stands for 1.
        found_inf: 0-dim tensor of a fused optimizer; not 0 where it will skip the step.
        capturable: the step may go into a CUDA graph, which replays no Python.
        capturing: the payment goes into a CUDA graph now, Python numbers as constants.
        by_autograd: autograd has just added to the gradients, so they can be changed in place.
    """

    foreach: bool | None = None
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    capturable: bool = False
    capturing: bool = False
    by_autograd: bool = False


class Formula:
    """One kind of decay. To add one: one file with a subclass, and its row in `FORMULAS`.

    Attributes:
        name: the `mode` of `attach`.
        factor: what a parameter is multiplied with, as a term, for messages.
        in_gradient: True where the decay is added to gradients and shares their fate; False where
            it changes parameters.
        needs_lr: `Rates.lr` is read.
        needs_peak: `Rates.peak` is read.
        remembers: each parameter has a `Memo`.
        defers: decay that a low-precision parameter cannot hold yet is kept for later.
        at_step_only: the formula has to know the update.
        begins: `begin_` has to be called.
    """

    name: str
    factor: str
    in_gradient: bool
    needs_lr: bool = False
    needs_peak: bool = False
    remembers: bool = False
    defers: bool = False
    at_step_only: bool = False
    begins: bool = False

    def begin_(self, param: Tensor, memo: Memo) -> None:
        """Look at a parameter before its first update. May be called again."""

    def target(self, memo: Memo | None) -> Tensor | None:
        """The values to which a parameter is drawn; None stands for 0."""
        return None

    def number(self, rates: Rates) -> Number:
        """The number that is written with. All numbers of a step are computed before the first is
        used."""
        raise NotImplementedError

    def pay_(self, due: Due, number: Number, how: How) -> Rest | None:
        """Decay the parameters of `due`, whose gradients are dense or sparse.

        Returns:
            What is to be done after the optimizer's update, if the step is taken; None where
            nothing is.
        """
        raise NotImplementedError

    def amount_of(self, number: Number) -> Number:
        """The multiple of a parameter that a payment with that number takes or adds."""
        return 1 - number

    def kept(self, number: Number, gain: Number | None) -> Number | None:
        """The factor by which decay alone multiplies a parameter in one step; None where nobody
        can tell.

        Args:
            number: of the payment.
            gain: the factor by which plain SGD multiplies a gradient, in this step and all later
                ones together; None for another optimizer, or a formula that does not add to
                gradients.
        """
        return number

    def taken(self, before: Tensor, change: Tensor, number: Number) -> Tensor:
        """The part of a change that is decay, for a formula that changes parameters.

        Args:
            before: values before the step, less the target.
            change: of the step, decay and update: before − after.
            number: of the payment.
        """
        return before * (1 - number)

    def flush_(self, param: Tensor, memo: Memo) -> None:
        """Write what is pending of one parameter. May wait for the device."""


def over_peak(lr: Number, peak: Number | None) -> Number:
    """`lr` over the largest learning rate so far, and 0 while that is 0: a warm-up may start
    there."""
    if isinstance(peak, Tensor):
        return torch.where(peak > 0, lr / peak, 0.0)
    return lr / peak if peak else 0.0


class Shrinking(Formula):
    """A formula that multiplies parameters: p ← (1 − amount)·p."""

    in_gradient = False
    needs_lr = True

    def amount(self, rates: Rates) -> Number:
        """The share of a parameter that one step takes away."""
        raise NotImplementedError

    def number(self, rates: Rates) -> Number:
        """1 − amount."""
        return 1 - self.amount(rates)

    def pay_(self, due: Due, number: Number, how: How) -> Rest | None:
        """Multiply each parameter; of one with a sparse gradient, the rows that have a gradient."""
        if how.found_inf is not None:
            number = tensors.unless(how.found_inf, number)
        dense, sparse = due.split_sparse() if due.has_sparse() else (due, None)
        self.shrink_(dense.params, [entry.memo for entry in dense.entries], number, how.foreach)
        for param, grad, entry in () if sparse is None else sparse:
            seen = entry.rows if entry.paid else None
            target = self.target(entry.memo)
            entry.rows = tensors.mul_rows_(grad, param, number, seen, target)
        return None

    def shrink_(
        self, params: list[Tensor], memos: list[Memo | None], by: Number, foreach: bool | None
    ) -> None:
        """Multiply dense parameters.

        Args:
            params: any shapes, of one kind.
            memos: of the parameters, in their order.
            by: the factor.
            foreach: as in torch.optim.
        """
        tensors.mul_all_(params, by, tensors.use_foreach(foreach, params))


class Wrapping(Formula):
    """A formula around another one, which says how much.

    Args:
        formula: the one inside.
    """

    def __init__(self, formula: Shrinking) -> None:
        self._formula = formula
        self.name = formula.name
        self.factor = formula.factor
        self.needs_peak = formula.needs_peak
