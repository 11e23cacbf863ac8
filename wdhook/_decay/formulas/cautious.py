"""Cautious decay: only where the update shrinks a value too (arXiv:2510.12402).

With u = p_before − p_after of an optimizer's own update: p ← p_after − amount·p_before where
u·p_before ≥ 0. Signs are compared: products of small numbers underflow.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import tensors
from ..entry import Due
from ..tensors import Number
from .base import How, Rates, Rest, Wrapping

_Before = list[tuple[Tensor, Tensor]]
"""Parameters (of a DTensor the local shard, of a sparse gradient the table), and their values
before the update."""


class Cautious(Wrapping):
    """Another formula, masked by the update. It keeps one copy of the parameters during the step.

    Nothing is decayed where nothing of a kind has moved: the step was skipped.

    Args:
        formula: says how much.
    """

    in_gradient = False
    needs_lr = True
    at_step_only = True

    def number(self, rates: Rates) -> Number:
        """The share of a value that one step takes away, where the update agrees."""
        return self._formula.amount(rates)

    def amount_of(self, number: Number) -> Number:
        """The number itself; of values that the mask spares nothing is taken."""
        return number

    def kept(self, number: Number, gain: Number | None) -> Number | None:
        """Of values that the mask spares all is kept: a lower bound."""
        return 1 - number

    def taken(self, before: Tensor, change: Tensor, number: Number) -> Tensor:
        """The decay agrees with the whole change where it agrees with the update alone."""
        return before * number * (torch.sign(before) * torch.sign(change) >= 0)

    def pay_(self, due: Due, number: Number, how: How) -> Rest | None:
        """Keep the values; the rest compares, and decays."""
        if how.found_inf is not None:
            number = tensors.unless(how.found_inf, number, 0.0)
        kept: _Before = []
        rows: list[Tensor | None] = []
        for param, grad, _ in due:
            local = tensors.local(param)
            row = None
            if grad.is_sparse:
                local, row = tensors.as_table(grad, param)
            kept.append((local, local.clone() if row is None else local[row]))
            rows.append(row)
        return partial(_decay, kept, rows, number)


def _has_moved(kept: _Before, rows: list[Tensor | None]) -> Tensor:
    """Tell a step that was taken, as a 0-dim tensor. On the CPU the first difference is enough."""
    pairs = [
        (param if row is None else param[row], before)
        for (param, before), row in zip(kept, rows, strict=True)
    ]
    if all(after.is_cpu for after, _ in pairs):
        pieces = (piece for pair in pairs for piece in tensors.pieces(*pair))
        return torch.tensor(any(not torch.equal(a, b) for a, b in pieces))
    return torch.stack([(after != before).any() for after, before in pairs]).any()


@torch.no_grad()
def _decay(kept: _Before, rows: list[Tensor | None], amount: Number) -> None:
    has_moved = _has_moved(kept, rows)
    amount = has_moved.to(tensors.widest(has_moved.device)) * amount
    for (param, before), row in zip(kept, rows, strict=True):
        after = param if row is None else param[row]
        for a, b in tensors.pieces(after, before):
            _decay_where_it_agrees(a, b, amount)
        if row is not None:
            param[row] = after


def _decay_where_it_agrees(after: Tensor, before: Tensor, amount: Tensor) -> None:
    """after −= amount·before where (before − after)·before ≥ 0, by signs."""
    mask = torch.sign(before).mul_(after).le_(before.abs())  # 0 or 1, in the dtype of the values
    after.sub_(mask.mul_(before).mul_(amount))
