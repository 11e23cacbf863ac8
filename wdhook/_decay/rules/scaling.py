"""Rules about factors: loss scales, moved parameters, decay below the precision of a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..._base.problem import Problem
from ..._base.validate import is_number
from ..entry import Terms
from ..optimizers import LearningRate, largest_known_rate
from ..ownership import View
from .base import Facts


def scaler_was_not_given(facts: Facts) -> Iterator[Problem]:
    """Find a step by a GradScaler that `attach` was not given."""
    if facts.state.config.scaler is not None or facts.running.scaler is None:
        return
    if _some_paid(facts.owned):
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
    if facts.running.scaler is not given and _some_paid(facts.owned):
        yield Problem(
            "The GradScaler that `attach` was given does not step the optimizer. If it did not "
            "scale the loss, the decay in the gradients is wrong by the factor of its scale.",
            "Use scaler.scale(loss).backward() and scaler.step(optimizer), or leave `scaler` out, "
            'or use attach(..., at="step")',
            {"optimizer": facts.optimizer_name},
        )


def _some_paid(view: View) -> bool:
    """A hook has decayed a gradient. None has where a checkpoint steps to make a state."""
    return any(entry.paid for _, entry in view.pairs())


def moved_in_the_closure(facts: Facts) -> Iterator[Problem]:
    """Report a closure that runs at perturbed parameters."""
    yield Problem(
        "The closure of the step runs while a wrapper has moved the parameters (SAM of heavyball), "
        "so decay at its end would be undone.",
        'Use mode="coupled" with at="backward"',
        {"optimizer": facts.optimizer_name},
    )


def rounds_away(facts: Facts) -> Iterator[Problem]:
    """Find low-precision parameters with a decay of one step below their rounding error."""
    for index, buckets in enumerate(facts.owned.buckets):
        group = facts.optimizer.param_groups[index]
        lr = _rate(group, facts.state.config.lr)
        for terms, pairs in buckets:
            half_ulp = _half_ulp(terms)
            if lr is None or half_ulp is None or not 0 < lr * terms.weight_decay < half_ulp:
                continue
            names = tuple(entry.name for _, entry in pairs)
            yield Problem(
                "The decay of one step is less than half a unit in the last place of the "
                "parameter: alone, it rounds away.",
                "Keep the parameters in float32 (autocast computes in low precision without it)",
                {
                    "parameter": f"{names[0]} {terms.dtype}",
                    "lr·λ": f"{lr * terms.weight_decay:g}, half a unit: {half_ulp:g}",
                },
                names,
            )


def _rate(group: Mapping[str, Any], given: LearningRate | None) -> float | None:
    """The largest known learning rate, so that a warm-up raises no alarm."""
    return given if is_number(given) else largest_known_rate(group)


def _half_ulp(terms: Terms) -> float | None:
    """Half the spacing of numbers below a power of two: p·(1 − x) rounds to p for smaller x."""
    if terms.dtype not in (torch.bfloat16, torch.float16):
        return None
    return torch.finfo(terms.dtype).eps / 2
