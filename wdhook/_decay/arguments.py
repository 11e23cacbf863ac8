"""The arguments of `attach`: what has no meaning is an error before anything is registered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._base.errors import ArgumentError, LearningRateError
from .._base.validate import check_factor, is_number
from .._plan.decide import plan
from .._plan.overrides import Overrides
from .._plan.plan import Plan
from ..schedules import Schedule
from .optimizers import (
    LearningRate,
    check_supports_decoupled,
    innermost,
    learning_rate,
    tells_of_steps,
)

MODES = ("coupled", "decoupled", "independent")
MOMENTS = ("backward", "step")
Optimizers = Optimizer | Iterable[Optimizer]


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}.\n  got: {value!r}"
        )


def ready_plan(
    model: nn.Module, weight_decay: float | Plan, overrides: Overrides | None, recipe: str | None
) -> Plan:
    if not isinstance(weight_decay, Plan):
        return plan(model, weight_decay, overrides=overrides, recipe=recipe)
    if overrides is not None or recipe is not None:
        raise ArgumentError(
            "A ready plan has its `overrides` and `recipe` in it already: give them to wdhook.plan instead"
        )
    names = dict(model.named_parameters())
    unknown = [
        name for name in (*names, *weight_decay) if (name in names) != (name in weight_decay)
    ]
    if unknown:
        raise ArgumentError(
            "The plan is not one of this model.\n"
            f"  names that only one of them has: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
        )
    return weight_decay


def optimizers_of(given: Optimizers | None) -> tuple[Any, ...]:
    if given is None:
        return ()
    optimizers = (given,) if hasattr(given, "param_groups") else given
    if not isinstance(optimizers, Iterable) or not all(
        hasattr(o, "param_groups") for o in optimizers
    ):
        raise ArgumentError(
            f"`optimizer` must have param_groups, or be a list of such.\n  got: {given!r}"
        )
    return tuple(optimizers)


def check_lr(mode: str, at: str, optimizers: tuple[Any, ...], lr: LearningRate | None) -> None:
    if is_number(lr):
        check_factor(lr, "lr")
    elif lr is not None and not (callable(lr) or isinstance(lr, Tensor)):
        raise ArgumentError(f"`lr` must be a number or a function of a param group.\n  got: {lr!r}")
    if mode == "coupled":
        if lr is not None:
            raise ArgumentError(
                f'`lr` has no meaning with mode="coupled": the optimizer applies its own.\n  got: {lr!r}'
            )
        return
    for optimizer in optimizers:
        check_supports_decoupled(optimizer)
        for stepping in innermost(optimizer) if lr is None else ():
            _check_steps_by_its_groups(stepping)
            for group in stepping.param_groups:
                learning_rate(group, None)
    if (
        at == "backward"
        and not optimizers
        and (lr is None or callable(lr) or mode == "independent")
    ):
        raise LearningRateError(
            f'mode={mode!r} with at="backward" needs a learning rate before any optimizer has stepped.\n'
            f"  optimizer: None\n  lr: {lr!r}\n"
            '  Use attach(..., optimizer=optimizer), a number as `lr=`, or at="step"'
        )


def _check_steps_by_its_groups(optimizer: Any) -> None:
    if isinstance(optimizer, Optimizer) and not tells_of_steps(optimizer):
        raise LearningRateError(
            "The optimizer has no step(): it updates inside the backward pass, with a learning rate that it is given "
            "there, and not that of its param groups (as LOMO does).\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Give it with `lr=`, a float or a function of the group, or use mode="coupled"'
        )


def check_step_is_heard(at: str, optimizers: tuple[Any, ...], schedule: Schedule | None) -> None:
    for optimizer in (stepping for given in optimizers for stepping in innermost(given)):
        if tells_of_steps(optimizer):
            continue
        if schedule is not None:
            raise ArgumentError(
                "`weight_decay` is a schedule, which goes on with each step, and the steps of this optimizer are not "
                "heard: it is no torch.optim.Optimizer, or has no step().\n"
                f"  optimizer: {type(optimizer).__name__}\n"
                "  Attach with a number, and set handle.weight_decay = schedule(step) yourself"
            )
        if at == "step":
            raise ArgumentError(
                'at="step" hears the step() of torch.optim.Optimizer and its subclasses only.\n'
                f'  optimizer: {type(optimizer).__name__}\n  Use at="backward"'
            )


def check_scaler(scaler: object) -> None:
    if scaler is not None and not all(
        callable(getattr(scaler, name, None)) for name in ("scale", "is_enabled")
    ):
        raise ArgumentError(
            f"`scaler` must be a torch.amp.GradScaler.\n  got: {type(scaler).__name__}"
        )
