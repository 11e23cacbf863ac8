"""Rules about factors: loss scales, moved parameters, decay below the precision of a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._base.problem import Problem
from ..._base.validate import is_number
from .. import tensors
from ..entry import Terms
from ..optimizers import LearningRate, largest_known_rate
from .base import Facts


def scaler_was_not_given(facts: Facts) -> Iterator[Problem]:
    """Find a step by a GradScaler that `attach` was not given."""
    if facts.state.config.scaler is not None or facts.running.scaler is None:
        return
    if facts.owned.some_paid():  # none is where a checkpoint steps to make a state
        yield Problem(
            "The loss is scaled by a GradScaler that `attach` was not given: the decay in the "
            "gradients is too weak by the factor of the scale (65536 at first).",
            'Use attach(..., scaler=scaler), or attach(..., at="step")',
            {"optimizer": facts.optimizer_name},
        )


def grad_scale_by_hand(facts: Facts) -> Iterator[Problem]:
    """Find an optimizer with a `grad_scale`, without a scaler."""
    if facts.state.config.scaler is not None:
        return
    if getattr(facts.optimizer, "grad_scale", None) is not None:
        yield Problem(
            "The optimizer divides the gradients by its `grad_scale`, and with them the decay "
            "that was added in the backward.",
            'Use attach(..., at="step"), which knows `grad_scale`',
            {"optimizer": facts.optimizer_name},
        )


def scaler_does_not_step(facts: Facts) -> Iterator[Problem]:
    """Find a step without the given GradScaler.

    A scaler of the user's making, or with a step of its own, is taken at its word.
    """
    given = facts.state.config.scaler
    is_torchs = getattr(type(given), "step", None) is torch.amp.GradScaler.step
    if given is None or not is_torchs or not given.is_enabled():
        return
    if facts.running.scaler is not given and facts.owned.some_paid():
        yield Problem(
            "The GradScaler that `attach` was given does not step the optimizer. If it did not "
            "scale the loss, the decay in the gradients is wrong by the factor of its scale.",
            "Use scaler.scale(loss).backward() and scaler.step(optimizer), or leave `scaler` out, "
            'or use attach(..., at="step")',
            {"optimizer": facts.optimizer_name},
        )


def moved_in_the_closure(facts: Facts) -> Iterator[Problem]:
    """Report a closure that runs at perturbed parameters."""
    yield Problem(
        "The closure of the step runs while a wrapper has moved the parameters (SAM of heavyball), "
        "so decay at its end would be undone.",
        'Use mode="coupled" with at="backward"',
        {"optimizer": facts.optimizer_name},
    )


def rounds_away(facts: Facts) -> Iterator[Problem]:
    """Find low-precision parameters with a decay of one step below their rounding error, and not
    deferred."""
    for index, buckets in enumerate(facts.owned.buckets):
        group = facts.optimizer.param_groups[index]
        lr = _rate(group, facts.state.config.lr)
        for terms, pairs in buckets:
            half_ulp = _half_ulp(terms)
            if lr is None or half_ulp is None or not 0 < lr * terms.weight_decay < half_ulp:
                continue
            names = tuple(entry.name for param, entry in pairs if _is_rounded(facts, param))
            if not names:
                continue
            yield Problem(
                "The decay of one step is less than half a unit in the last place of the "
                "parameter: alone, it rounds away.",
                _KEEPS[facts.state.config.in_gradient],
                {
                    "parameter": f"{names[0]} {terms.dtype}",
                    "lr·λ": f"{lr * terms.weight_decay:g}, half a unit: {half_ulp:g}",
                },
                names,
            )


class LostInGradients:
    """Coupled decay of low-precision parameters that adds nothing to most values of a gradient.

    One gradient is sampled on its device, and the answer is read some steps later: once in a run,
    when it has long been computed.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._sample: tuple[str, torch.dtype, Tensor] | None = None

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Count the steps; sample, and later read."""
        self._steps += 1
        if self._steps == _SAMPLED_AT:
            self._sample = _share_lost(facts)
        if self._steps != _READ_AT or self._sample is None:
            return
        name, dtype, share = self._sample
        lost = float(share)
        self._sample = None
        if lost > 0.5:
            yield Problem(
                "Coupled decay is lost in the gradients of low precision: λ·p is less than half a "
                "unit in the last place of most values.",
                _KEEPS[True],
                {"parameter": f"{name} {dtype}", "lost in": f"{lost:.0%} of its values"},
                (name,),
            )


_SAMPLED_AT, _READ_AT = 3, 25  # steps


def _share_lost(facts: Facts) -> tuple[str, torch.dtype, Tensor] | None:
    """The share of values of the largest low-precision gradient to which λ·p adds nothing."""
    found = []
    for terms, pairs in facts.owned.all_buckets():
        for param, entry in pairs:
            grad = param.grad
            if grad is None or grad.is_sparse or not terms.weight_decay:
                continue
            if tensors.is_low(grad.dtype):
                found.append((param.numel(), entry.name, param, grad, terms.weight_decay))
    if not found or getattr(facts.optimizer, "grad_scale", None) is not None:
        return None
    _, name, param, grad, weight_decay = max(found, key=lambda one: one[0])
    p, g = tensors.local(param), tensors.local(grad)
    lost = p.abs() * weight_decay < g.abs() * (torch.finfo(g.dtype).eps / 2)
    return name, g.dtype, lost.float().mean()


_IN_FLOAT32 = "keep the parameters in float32 (autocast computes in low precision without it)"
_KEEPS = {
    True: 'Use mode="decoupled", which collects what the parameter cannot hold yet, or '
    f"{_IN_FLOAT32}",
    False: 'Leave low_precision="round" and cautious=True out (a sparse gradient is always '
    f"rounded), or {_IN_FLOAT32}",
}


def _is_rounded(facts: Facts, param: Tensor) -> bool:
    """Tell a parameter whose decay is not deferred."""
    if not facts.state.config.formula.defers:
        return True
    return param.grad is not None and param.grad.is_sparse


def _rate(group: Mapping[str, Any], given: LearningRate | None) -> float | None:
    """The largest known learning rate, so that a warm-up raises no alarm."""
    return given if is_number(given) else largest_known_rate(group)


def _half_ulp(terms: Terms) -> float | None:
    """Half the spacing of numbers below a power of two: p·(1 − x) rounds to p for smaller x."""
    if not tensors.is_low(terms.dtype):
        return None
    return torch.finfo(terms.dtype).eps / 2
