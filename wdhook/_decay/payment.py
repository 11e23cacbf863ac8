"""Pays for lists of parameters: all numbers first, then all writes, then the marks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import ref

import torch
from torch import Tensor

from .._base.torch_private import is_view, local_version, versions
from .entry import Due, Receipt
from .formulas import How, Rest
from .memory import Memo
from .state import State


def begin(state: State, pairs: Iterable[tuple[Tensor, Memo | None]]) -> None:
    """Let a formula look at parameters before their first update.

    Raises:
        TargetError: a target does not fit. Nothing is changed.
    """
    formula = state.config.formula
    if not formula.begins:
        return
    with torch.no_grad():
        for param, memo in pairs:
            if memo is not None:
                formula.begin_(param, memo)


def pay(state: State, dues: list[Due], how: Callable[[Due], How]) -> list[Rest]:
    """Decay the parameters of each `Due`, and mark them as paid.

    An error while the numbers are computed comes before anything is changed. An error while
    something is written leaves the parameters of that `Due` in doubt: the next step refuses them.

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
    priced: list[tuple[Due, Receipt]] = []
    for due in dues:
        rates = state.rate.of(due.terms, formula)
        if rates is not None and rates.weight_decay:
            priced.append((due, Receipt(formula.number(rates), rates.sign)))
    rests: list[Rest] = []
    with torch.no_grad():
        for due, receipt in priced:
            circumstances = how(due)
            receipt.is_scaled = circumstances.scale is not None
            try:
                rest = formula.pay_(due, receipt.number, circumstances)
            except BaseException:
                for entry in due.entries:
                    entry.doubt()
                raise
            _mark(due, receipt)
            if rest is not None:
                rests.append(rest)
    if len(priced) > 1 or any(is_view(due.grads[0]) for due, _ in priced):
        _look_again(priced)
    return rests


def _mark(due: Due, receipt: Receipt) -> None:
    """`Window.pay` for many, without a call for each: the cost is paid for each tensor in each
    step."""
    for grad, entry, seen in zip(due.grads, due.entries, versions(due.grads), strict=True):
        entry.receipt = receipt
        entry.stamp = entry.clock.steps
        entry.buffer = ref(grad)
        entry.version = seen
    if not due.terms.plain:
        for _, grad, entry in due:
            entry.local = local_version(grad)


def _look_again(priced: list[tuple[Due, Receipt]]) -> None:
    """Note the versions once more: slices of one buffer share them, and later writes have changed
    them."""
    for due, _ in priced:
        for _, grad, entry in due:
            entry.look(grad)
