"""Pays for lists of parameters: all numbers first, then all writes, then the marks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .entry import Due
from .formulas import How, Rest
from .state import State
from .tensors import Number


def pay(state: State, dues: list[Due], how: Callable[[Due], How]) -> list[Rest]:
    """Decay the parameters of each `Due`, and mark them as paid.

    An error while the numbers are computed comes before anything is changed. An error while something is written
    leaves the parameters of that `Due` in doubt: the next step refuses them.

    Args:
        state: of the handle.
        dues: parameters by terms.
        how: the circumstances of one payment.

    Returns:
        What is to be done after the optimizer's update.

    Raises:
        LearningRateError: a learning rate is missing or has no meaning.
    """
    formula = state.config.formula
    priced: list[tuple[Due, Number, float]] = []
    for due in dues:
        rates = state.rate.of(due.terms, formula)
        if rates is not None and rates.weight_decay:
            priced.append((due, formula.number(rates), rates.sign))
    rests: list[Rest] = []
    with torch.no_grad():
        for due, number, sign in priced:
            for entry in due.entries:
                entry.number = number
                entry.written = None
            try:
                rest = formula.pay_(due, number, how(due))
            except BaseException:
                _doubt(due)
                raise
            for _, grad, entry in due:
                entry.pay(grad)
                entry.sign = sign
            if rest is not None:
                rests.append(rest)
    _look_again(priced)
    return rests


def _doubt(due: Due) -> None:
    for _, grad, entry in due:
        entry.pay(grad)
        entry.unknown = True


def _look_again(priced: list[tuple[Due, Number, float]]) -> None:
    """Note the versions once more: slices of one buffer share them, and later writes have changed them."""
    if len(priced) < 2 and not any(due.grads[0]._is_view() for due, _, _ in priced):
        return
    for due, _, _ in priced:
        for _, grad, entry in due:
            entry.look(grad)
