"""Decay toward a target t: p ← p − amount·(p − t), or g ← g + λ·(p − t).

L2-SP (Li, Grandvalet & Davoine 2018, arXiv:1802.01483) draws to the values before fine-tuning. The
subtraction comes first, so that a parameter at its target stays there to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._base.errors import TargetError
from ..._base.problem import Problem
from ..._plan.anchor import Anchor
from .. import tensors
from ..entry import Due
from ..memory import Memo
from ..tensors import Number
from .base import Formula, How, Rates, Shrinking, Wrapping
from .coupled import Coupled


def toward_targets(formula: Formula) -> Formula:
    """The formula with targets in place of 0, for the parameters that have one."""
    return TowardShrinking(formula) if isinstance(formula, Shrinking) else TowardCoupled()


class _Toward(Formula):
    remembers = True
    begins = True

    def begin_(self, param: Tensor, memo: Memo) -> None:
        """Take the target, or see that the present one fits.

        Raises:
            TargetError: the shapes differ, or a sharded parameter's values cannot be kept so.
        """
        toward = memo.toward
        if isinstance(toward, float):
            memo.target = _number(toward, memo.target, param)
        elif memo.waits:
            memo.target = first_values(param, toward)
        elif memo.target is not None:
            memo.target = _fitted(memo.target, param, toward)

    def target(self, memo: Memo | None) -> Tensor | None:
        """That of the memo."""
        return None if memo is None else memo.target


class TowardShrinking(_Toward, Wrapping, Shrinking):
    """Another formula that multiplies the distance from the target: p ← t + (1 − amount)·(p − t).

    Args:
        formula: the one that says how much.
    """

    def amount(self, rates: Rates) -> Number:
        """That of the formula; in double precision on a device, since the weight of a target is
        1 − (1 − amount)."""
        return tensors.wide(self._formula.amount(rates))

    def shrink_(
        self, params: list[Tensor], memos: list[Memo | None], by: Number, foreach: bool | None
    ) -> None:
        """Multiply the distances; parameters without a target as the formula does."""
        plain: tuple[list[Tensor], list[Memo | None]] = [], []
        aimed: tuple[list[Tensor], list[Tensor]] = [], []
        for param, memo in zip(params, memos, strict=True):
            target = self.target(memo)
            if target is None:
                plain[0].append(param)
                plain[1].append(memo)
            else:
                aimed[0].append(param)
                aimed[1].append(target)
        if plain[0]:
            self._formula.shrink_(*plain, by, foreach)
        if aimed[0]:
            tensors.lerp_all_(*aimed, by, tensors.use_foreach(foreach, aimed[0]))


class TowardCoupled(_Toward, Coupled):
    """g ← g + λ·(p − t), as if ½·λ·‖p − t‖² had been added to the loss.

    Needs memory for the distance of one parameter at a time.
    """

    def add_(self, due: Due, number: float, how: How) -> None:
        """Add to dense gradients; those of parameters without a target as coupled decay does."""
        plain = Due(due.terms)
        for param, grad, entry in due:
            memo = entry.memo
            if memo is None or memo.target is None:
                plain.add(param, grad, entry)
                continue
            aim = (
                memo.toward if isinstance(memo.toward, float) else tensors.here(memo.target, param)
            )
            tensors.add_(grad, param - aim, number, how.scale)
        super().add_(plain, number, how)


def first_values(param: Tensor, anchor: Anchor) -> Tensor:
    """A copy of the values of a parameter, where and in which precision its `Anchor` says.

    Raises:
        TargetError: a sharded parameter, and the anchor names a device; or a complex one, and the
            anchor names a real dtype.
    """
    return _placed(param.detach().clone(), anchor)


def _number(toward: float, known: Tensor | None, param: Tensor) -> Tensor | None:
    """A number in the precision of the parameter, on its device; None for 0."""
    if not toward:
        return None
    if known is not None and (known.dtype, known.device) == (param.dtype, param.device):
        return known
    return torch.full((), toward, dtype=param.dtype, device=param.device)


def _placed(values: Tensor, anchor: Anchor) -> Tensor:
    if anchor.device is not None and hasattr(values, "to_local"):
        raise TargetError(
            Problem(
                "The target of a sharded parameter is kept beside the parameter.",
                "Leave out `device`: Anchor(source, dtype=torch.bfloat16) takes less memory",
                {"device": anchor.device},
            )
        )
    if values.is_complex() and anchor.dtype is not None and not anchor.dtype.is_complex:
        raise TargetError(
            Problem(
                "The target of a complex parameter cannot be kept as real numbers.",
                "Leave out `dtype`, or give a complex one",
                {"dtype": anchor.dtype},
            )
        )
    moved = values.to(device=anchor.device, dtype=anchor.dtype)
    return moved.pin_memory() if moved.is_cpu and not values.is_cpu else moved


def _fitted(target: Tensor, param: Tensor, anchor: Anchor) -> Tensor:
    """A target that was given or loaded, as the parameter needs it.

    Raises:
        TargetError: the shapes differ, or the target is the parameter.
    """
    if hasattr(param, "to_local") and not hasattr(target, "to_local"):
        target = tensors.sharded_as(target, param)
    one, other = tensors.local(target), tensors.local(param)
    if one.shape != other.shape:
        raise TargetError(
            Problem(
                "The target of a parameter has another shape than the parameter here.",
                'Use toward="init", or a number; or attach to the model before it is sharded',
                {"parameter": tuple(param.shape), "target": tuple(target.shape)},
            )
        )
    if one.numel() and one.data_ptr() == other.data_ptr():
        raise TargetError(shares_memory(tuple(param.shape)))
    if anchor.device is None and anchor.dtype is None:
        return target.to(param.device, param.dtype)
    return _placed(target, anchor)


def shares_memory(parameter: object, names: tuple[str, ...] = ()) -> Problem:
    """The problem of a target in the memory of its parameter."""
    return Problem(
        "A target shares memory with its parameter, so it moves with the parameter, and nothing "
        "would be decayed.",
        'Use toward="init"; or give a copy: wdhook.Anchor(copy.deepcopy(model))',
        {"parameter": parameter},
        names,
    )
