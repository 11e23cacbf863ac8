"""The arguments of `attach`: what has no meaning is an error before anything is registered."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import schedules
from .._base.errors import ArgumentError, LearningRateError
from .._base.problem import Problem
from .._base.text import or_not_given
from .._base.validate import check_choice, check_factor, is_number
from .._plan.decide import plan
from .._plan.overrides import Overrides
from .._plan.plan import Plan
from .._plan.recipes import Recipe
from .._plan.targets import Toward
from .._roles.places import named_parameters
from ..schedules import Schedule
from .formulas import FORMULAS, Formula, compose
from .optimizers import (
    LearningRate,
    announces_steps,
    check_supports_decoupled,
    innermost,
    learning_rate,
)

Mode = Literal["coupled", "decoupled", "independent", "corrected"]
Moment = Literal["backward", "step"]
LowPrecision = Literal["defer", "round"]
MODES: tuple[str, ...] = tuple(FORMULAS)
_ALSO = {"l2": "coupled", "sgd": "coupled", "adam": "coupled"}
_ALSO |= {"adamw": "decoupled", "adamc": "corrected"}
MOMENTS: tuple[str, ...] = get_args(Moment)
Optimizers = Optimizer | Iterable[Optimizer]


def formula_of(
    mode: str | None, at: str, low_precision: str | None, cautious: object, toward: bool
) -> Formula:
    """The formula that the arguments of `attach` name; a mode of None is coupled.

    Raises:
        ArgumentError: an argument has no meaning, or none together with another.
    """
    if mode is None:
        mode = "coupled"
    check_choice("mode", mode, MODES, _ALSO)
    if low_precision is not None:
        check_choice("low_precision", low_precision, get_args(LowPrecision))
    if low_precision == "defer":
        _check_can_wait(mode, bool(cautious))
    if cautious not in (True, False):
        raise ArgumentError(f"`cautious` must be True or False.\n  got: {cautious!r}")
    if cautious:
        _check_knows_the_update(mode, at)
    if cautious and toward:
        raise ArgumentError(
            Problem(
                "`cautious=True` compares the update with the way to 0, and `toward` draws "
                "elsewhere.",
                "Give one of them",
                {"cautious": cautious},
            )
        )
    return compose(mode, low_precision != "round", bool(cautious), toward)


def _check_can_wait(mode: str, cautious: bool) -> None:
    reason = None
    if FORMULAS[mode].in_gradient:
        reason = "is added to gradients: a gradient is gone after its step"
    elif cautious:
        reason = "is cautious: each value has a mask of its own in each step"
    if reason is not None:
        raise ArgumentError(
            Problem(
                f'`low_precision="defer"` has no meaning for decay that {reason}, and what was '
                "rounded away is gone too.",
                'Use mode="decoupled" with cautious=False, or leave `low_precision` out',
                {"mode": mode, "cautious": cautious},
            )
        )


def _check_knows_the_update(mode: str, at: str) -> None:
    if not FORMULAS[mode].in_gradient and at == "step":
        return
    raise ArgumentError(
        Problem(
            "`cautious=True` decays where the update agrees, so it comes after the update, and "
            "changes parameters: not gradients, and not in the backward pass.",
            'Use attach(..., cautious=True, mode="decoupled", at="step")',
            {"mode": mode, "at": at},
        )
    )


def check_attach(
    model: object, weight_decay: object, misplaced: tuple[object, ...], at: object, foreach: object
) -> None:
    """Raise for arguments of `attach` in the wrong place, and for those that have no meaning by
    themselves."""
    check_model("attach", model)
    if misplaced:
        raise ArgumentError(
            Problem(
                "`attach` takes a model and a λ by position, and everything else by name.",
                _by_name(misplaced[0]),
                {"third argument": type(misplaced[0]).__name__},
            )
        )
    check_choice("at", at, MOMENTS)
    if foreach not in (None, True, False):
        raise ArgumentError(f"`foreach` must be None, True or False.\n  got: {foreach!r}")
    if inspect.isfunction(weight_decay) and weight_decay.__module__ == schedules.__name__:
        raise ArgumentError(
            Problem(
                "`weight_decay` is a function that makes schedules, and no schedule.",
                f"Call it: wdhook.schedules.{weight_decay.__name__}(...)",
                {"got": weight_decay.__name__},
            )
        )


def _by_name(misplaced: object) -> str:
    """The call that was probably meant by a third argument."""
    if hasattr(misplaced, "param_groups"):
        return (
            "Write attach(model, weight_decay): wdhook finds the optimizer by itself, at its first "
            "step.\n"
            'Decoupled decay at="backward" needs it before: attach(..., optimizer=optimizer)'
        )
    if isinstance(misplaced, str) and misplaced in MODES:
        return f"Write attach(model, weight_decay, mode={misplaced!r})"
    return "Write attach(model, weight_decay, mode=..., at=...)"


def check_model(function: str, model: object) -> None:
    """Raise if `model` is no module."""
    if isinstance(model, nn.Module):
        return
    second = "optimizer" if function == "adopt" else "weight_decay"
    fix = f"The model comes first: wdhook.{function}(model, {second})"
    if isinstance(model, type) and issubclass(model, nn.Module):
        fix = f"Give a model, and not its class: wdhook.{function}({model.__name__}(...), {second})"
    raise ArgumentError(
        Problem("`model` must be a torch.nn.Module.", fix, {"got": type(model).__name__})
    )


def check_adopt(model: object, optimizer: Any) -> None:
    """Raise for arguments of `adopt` that are in the wrong place, or that leave nothing to
    adopt."""
    check_model("adopt", model)
    if not hasattr(optimizer, "param_groups"):
        raise ArgumentError(
            Problem(
                "`optimizer` must be one optimizer with param_groups.",
                "Adopt several one by one, each for the module that it trains",
                {"got": type(optimizer).__name__},
            )
        )
    groups = optimizer.param_groups
    if not any(group.get("weight_decay") for group in groups):
        raise ArgumentError(
            Problem(
                "`optimizer` is not configured to decay anything, so there is nothing to adopt.",
                "Use wdhook.attach(model, weight_decay)",
                {
                    "optimizer": (
                        f"{type(optimizer).__name__}, weight_decay 0 in {len(groups)} param groups"
                    )
                },
            )
        )


def ready_plan(
    model: nn.Module,
    weight_decay: float | Plan,
    overrides: Overrides | None,
    recipe: Recipe | None,
    inputs: Any | None,
    toward: Toward | None,
) -> Plan:
    """The plan that was given, or the one that is made of the arguments."""
    given = {"overrides": overrides, "recipe": recipe, "inputs": inputs, "toward": toward}
    if not isinstance(weight_decay, Plan):
        return plan(model, weight_decay, **given)  # type: ignore[arg-type]
    if any(value is not None for value in given.values()):
        raise ArgumentError(
            "A ready plan has its `overrides`, `recipe`, `inputs` and `toward` in it already: give "
            "them to wdhook.plan instead"
        )
    names = dict(named_parameters(model))
    unknown = [
        name for name in (*names, *weight_decay) if (name in names) != (name in weight_decay)
    ]
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        raise ArgumentError(
            "The plan is not one of this model.\n"
            f"  names that only one of them has: {', '.join(unknown[:5])}{more}"
        )
    return weight_decay


def optimizers_of(given: Optimizers | None) -> tuple[Any, ...]:
    """The optimizers given, as a tuple."""
    if given is None:
        return ()
    optimizers = (given,) if hasattr(given, "param_groups") else given
    if not isinstance(optimizers, Iterable):
        raise ArgumentError(_no_optimizer(given))
    several = tuple(optimizers)
    if not all(hasattr(o, "param_groups") for o in several):
        raise ArgumentError(_no_optimizer(given))
    return several


def _no_optimizer(given: object) -> str:
    return f"`optimizer` must have param_groups, or be a list of such.\n  got: {given!r}"


def check_lr(
    formula: Formula, at: str, optimizers: tuple[Any, ...], lr: LearningRate | None
) -> None:
    """Raise for a learning rate that has no meaning, and where there is none."""
    if is_number(lr):
        check_factor(lr, "lr")
    elif lr is not None and not (callable(lr) or isinstance(lr, Tensor)):
        raise ArgumentError(f"`lr` must be a number or a function of a param group.\n  got: {lr!r}")
    if not formula.needs_lr:
        if lr is not None:
            raise ArgumentError(
                f'`lr` has no meaning with mode="{formula.name}": the optimizer applies its own.\n'
                f"  got: {lr!r}"
            )
        return
    for optimizer in optimizers:
        check_supports_decoupled(optimizer)
        if lr is None:
            _check_groups_have_lr(optimizer)
    needs_group = lr is None or callable(lr) or formula.needs_peak
    if at == "backward" and not optimizers and needs_group:
        raise LearningRateError(
            Problem(
                f'mode={formula.name!r} with at="backward" needs a learning rate before any '
                "optimizer has stepped.",
                'Use attach(..., optimizer=optimizer), a number as `lr=`, or at="step"',
                {"lr": or_not_given(lr), "optimizer": "not given"},
            )
        )


def _check_groups_have_lr(optimizer: Any) -> None:
    for stepping in innermost(optimizer):
        if isinstance(stepping, Optimizer) and _has_no_step(stepping):
            raise LearningRateError(
                Problem(
                    "The optimizer has no step(): it updates inside the backward pass, with a "
                    "learning rate that it is given there, and not that of its param groups (as "
                    "LOMO does).",
                    'Give it with `lr=`, a float or a function of the group, or use mode="coupled"',
                    {"optimizer": type(stepping).__name__},
                )
            )
        for group in stepping.param_groups:
            learning_rate(group, None)


def _has_no_step(optimizer: Optimizer) -> bool:
    return "step" not in vars(optimizer) and not announces_steps(optimizer)


def check_steps_are_announced(
    at: str, optimizers: tuple[Any, ...], schedule: Schedule | None
) -> None:
    """Raise where decay or a schedule waits for the steps of an optimizer that torch does not
    announce."""
    for given in optimizers:
        for optimizer in innermost(given):
            if not announces_steps(optimizer):
                _check_unannounced(optimizer, at, schedule)


def _check_unannounced(optimizer: Any, at: str, schedule: Schedule | None) -> None:
    if schedule is not None:
        raise ArgumentError(
            Problem(
                "`weight_decay` is a schedule, which goes on with each step, and torch does not "
                "announce the steps of this optimizer: it is no torch.optim.Optimizer, has no "
                "step(), or its step was replaced.",
                "Attach with a number, and set handle.weight_decay = schedule(step) yourself",
                {"optimizer": type(optimizer).__name__},
            )
        )
    if at == "step":
        raise ArgumentError(
            Problem(
                'at="step" needs the step() of torch.optim.Optimizer and its subclasses, whose '
                "hooks announce it; this optimizer has none, or another function in its place.",
                'Use at="backward"',
                {"optimizer": type(optimizer).__name__},
            )
        )


def check_scaler(scaler: object) -> None:
    if scaler is not None and not all(
        callable(getattr(scaler, name, None)) for name in ("scale", "is_enabled")
    ):
        raise ArgumentError(
            f"`scaler` must be a torch.amp.GradScaler.\n  got: {type(scaler).__name__}"
        )
