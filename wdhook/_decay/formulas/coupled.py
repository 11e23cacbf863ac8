"""Coupled decay: g ← g + λ·p, L2 regularization (Krogh & Hertz 1991; `torch.optim.SGD`, `Adam`)."""

from __future__ import annotations

from .. import tensors
from ..entry import Due
from ..tensors import Number
from .base import Formula, How, Rates, Rest


class Coupled(Formula):
    """g ← g + λ·p, as if ½·λ·‖p‖² had been added to the loss."""

    name = "coupled"
    factor = "λ"
    in_gradient = True

    def number(self, rates: Rates) -> Number:
        """λ, negative for an optimizer that maximizes: it negates the gradient, and weights shrink
        still."""
        return rates.sign * rates.weight_decay

    def amount_of(self, number: Number) -> Number:
        """The number itself."""
        return number

    def kept(self, number: Number, gain: Number | None) -> Number | None:
        """1 − lr·λ, if the update is lr times the gradient."""
        assert isinstance(number, float)
        return None if gain is None else 1 - tensors.wide(gain) * abs(number)

    def pay_(self, due: Due, number: Number, how: How) -> Rest | None:
        """Add to each gradient, times the factor of the loss."""
        assert isinstance(number, float)
        dense, sparse = due.split_sparse() if due.has_sparse() else (due, None)
        if not (how.by_autograd or tensors.all_writable(dense.grads)):
            _renew_gradients(dense)
        self.add_(dense, number, how)
        for param, grad, entry in () if sparse is None else sparse:
            seen = entry.rows if entry.paid else None
            amount = tensors.scaled(number, how.scale)
            entry.rows = tensors.add_rows_(grad, param, amount, seen, self.target(entry.memo))
        return None

    def add_(self, due: Due, number: float, how: How) -> None:
        """Add to dense gradients that can be changed in place."""
        foreach = tensors.use_foreach(how.foreach, due.params)
        tensors.add_all_(due.grads, due.params, number, how.scale, foreach)


def _renew_gradients(due: Due) -> None:
    """Give each parameter a copy of its gradient; one made in inference mode cannot be changed."""
    for index, param in enumerate(due.params):
        param.grad = due.grads[index] = due.grads[index].clone()
