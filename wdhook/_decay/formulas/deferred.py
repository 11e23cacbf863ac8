"""Deferred decay, for parameters in low precision: many small factors are multiplied before one of
them is written.

A parameter in bfloat16 rounds p·(1 − lr·λ) to p again. So the factors of several steps are
collected in a product, a number for each parameter. When it is far enough from 1 to be felt, the
parameter is multiplied. Nothing is random: replicas that take the same steps stay equal to the
last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tensors
from ..entry import Due
from ..memory import Memo
from ..tensors import Number
from .base import How, Rates, Rest, Shrinking, Wrapping


def stride(dtype: torch.dtype) -> float:
    """How far from 1 a product is written: four units in the last place, and at least 2⁻⁷.

    Fewer units lose decay to rounding; measured by `python -m benchmarks.low_precision`,
    docs/amp.md.
    """
    return max(4 * torch.finfo(dtype).eps, 2**-7)


class Deferred(Wrapping, Shrinking):
    """Another formula, whose factors are collected where the parameters are of low precision.

    The factor that is written can be represented in the parameter's precision; what is left of the
    product is kept. So no kernel rounds a factor.

    Args:
        formula: the one that says how much.
        defers: False: nothing is collected; what another handle has collected before a checkpoint
            is written.
    """

    remembers = True

    def __init__(self, formula: Shrinking, defers: bool = True) -> None:
        super().__init__(formula)
        self.defers = defers
        self.begins = formula.begins

    def begin_(self, param: Tensor, memo: Memo) -> None:
        """As the formula does."""
        self._formula.begin_(param, memo)

    def target(self, memo: Memo | None) -> Tensor | None:
        """That of the formula."""
        return self._formula.target(memo)

    def waits(self, dtype: torch.dtype | None) -> bool:
        """Tell a precision in which decay is collected."""
        return self.defers and dtype is not None and tensors.is_low(dtype)

    def amount(self, rates: Rates) -> Number:
        """That of the formula; in double precision on a device, since 1 − lr·λ in single precision
        is coarse."""
        amount = self._formula.amount(rates)
        return tensors.wide(amount) if self.waits(rates.dtype) else amount

    def taken(self, before: Tensor, change: Tensor, number: Number) -> Tensor:
        """As of the formula."""
        return self._formula.taken(before, change, number)

    def shrink_(
        self, params: list[Tensor], memos: list[Memo | None], by: Number, foreach: bool | None
    ) -> None:
        """As the formula does."""
        self._formula.shrink_(params, memos, by, foreach)

    def flush_(self, param: Tensor, memo: Memo) -> None:
        """Multiply the parameter with its product."""
        if memo.product is None:
            return
        product, memo.product = float(memo.product), None
        self.shrink_([param], [memo], product, False)

    # ---------------------------------------------------------------- payment

    def pay_(self, due: Due, number: Number, how: How) -> Rest | None:
        """Collect for dense parameters of low precision, and let the formula pay for all others."""
        if not any(map(self.waits, {param.dtype for param in due.params})):
            self._settle(due)
            return self._formula.pay_(due, number, how)
        coarse, others = Due(due.terms), Due(due.terms)
        for param, grad, entry in due:
            waits = self.waits(param.dtype) and not grad.is_sparse
            (coarse if waits else others).add(param, grad, entry)
        if others.params:
            self._settle(others)
            self._formula.pay_(others, number, how)
        if coarse.params:
            self._collect(coarse, number, how)
        return None

    def _settle(self, due: Due) -> None:
        """Write what is pending of parameters that have become wide since."""
        for param, memo in zip(due.params, _memos(due), strict=True):
            product, memo.written = memo.product, None
            if product is not None and not self.waits(param.dtype):
                memo.product = None
                self.shrink_([param], [memo], product, False)

    def _collect(self, due: Due, number: Number, how: How) -> None:
        on_device = [isinstance(memo.product, Tensor) for memo in _memos(due)]
        if how.capturing and not all(on_device):
            # The graph would replay a product of now, whatever it has become: the factor of each
            # step is written.
            self._formula.pay_(due, number, how)
        elif _stays_in_python(number, how) and not any(on_device):
            self._collect_in_python(due, float(number), how.foreach)
        else:
            self._collect_on_device(due, number, how.found_inf)

    def _collect_in_python(self, due: Due, number: float, foreach: bool | None) -> None:
        written: dict[tuple[float, torch.dtype], tuple[list[Tensor], list[Memo | None]]] = {}
        for param, memo in zip(due.params, _memos(due), strict=True):
            product = number if memo.product is None else float(memo.product) * number
            memo.written = 1.0
            if 1 - product >= stride(param.dtype):
                factor = torch.tensor(product, dtype=torch.float64).to(param.dtype).item()
                params, memos = written.setdefault((factor, param.dtype), ([], []))
                params.append(param)
                memos.append(memo)
                memo.written = factor
                product = product / factor if factor else 1.0
            memo.product = product
        for (factor, _), (params, memos) in written.items():
            self.shrink_(params, memos, factor, foreach)

    def _collect_on_device(self, due: Due, number: Number, found_inf: Tensor | None) -> None:
        """The same, where a number is on the device or has to stay there: nothing is read, every
        factor is written.

        The products are changed in place, so that a CUDA graph goes on with them.
        """
        device, dtype = due.params[0].device, due.params[0].dtype
        memos = _memos(due)
        products = [tensors.on_device(memo.product, device) for memo in memos]
        if found_inf is not None:
            number = tensors.unless(found_inf, number)
        if isinstance(number, Tensor):
            number = number.to(device)
        together = torch.stack(products) * number
        factors = torch.where(1 - together >= stride(dtype), together, 1.0).to(dtype)
        exact = factors.to(together.dtype)
        rest = torch.where(exact == 0, 1.0, together / exact)
        for index, (param, memo, product) in enumerate(
            zip(due.params, memos, products, strict=True)
        ):
            memo.product = product.copy_(rest[index])
            memo.written = factors[index]
            self.shrink_([param], [memo], factors[index], False)


def _stays_in_python(number: Number, how: How) -> bool:
    """No number of a payment is on a device, or has to be."""
    return not isinstance(number, Tensor) and how.found_inf is None and not how.capturable


def _memos(due: Due) -> list[Memo]:
    return [memo for entry in due.entries if (memo := entry.memo) is not None]
