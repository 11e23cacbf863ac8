"""`attach` and `adopt`."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from .._base.errors import AlreadyAttachedError, ArgumentError
from .._base.problem import Problem
from .._plan.decide import decide, plan, require_eligible
from .._plan.overrides import Overrides
from .._plan.plan import Plan
from .._plan.recipes import Recipe
from .._plan.targets import Toward
from .._roles.places import named_parameters
from ..schedules import Schedule
from .arguments import (
    LowPrecision,
    Mode,
    Moment,
    Optimizers,
    check_adopt,
    check_attach,
    check_lr,
    check_scaler,
    check_steps_are_announced,
    formula_of,
    optimizers_of,
    ready_plan,
)
from .config import Config
from .engine import Engine
from .handle import WeightDecay
from .optimizers import LearningRate, decays_itself, own_mode
from .step_listener import attached, listen


def attach(
    model: nn.Module,
    weight_decay: float | Schedule | Plan,
    *misplaced: object,
    mode: Mode | None = None,
    at: Moment = "backward",
    optimizer: Optimizers | None = None,
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: Recipe | None = None,
    inputs: Any | None = None,
    foreach: bool | None = None,
    low_precision: LowPrecision | None = None,
    cautious: bool = False,
    toward: Toward | None = None,
) -> WeightDecay:
    r"""Decay the weights of `model`, and nothing else, once per optimizer step from now on.

    Construct the optimizer with ``weight_decay=0``; the training loop stays as it is.

    Args:
        model: the module whose parameters are decayed.
        weight_decay: λ per optimizer step (not per backward); or a function of the number of
            finished steps that gives it, such as those of `wdhook.schedules`; or a ready `Plan`.
        misplaced: takes arguments that were given by position, to answer them with an error.
        mode: None is ``"coupled"``, with a warning where the optimizer's own decay would be
            decoupled.
            ``"coupled"``: g ← g + λ·p, as if ½·λ·‖p‖² were part of the loss (`torch.optim.SGD`).
            ``"decoupled"``: p ← p·(1 − lr·λ) before the update (`torch.optim.AdamW`; Loshchilov &
            Hutter 2019).
            ``"independent"``: p ← p·(1 − (lr/lr_peak)·λ), so that λ does not change with the base
            learning rate.
            ``"corrected"``: p ← p·(1 − (lr²/lr_peak)·λ), so that norms before a normalization do
            not follow the schedule of the learning rate (AdamC; Defazio 2025, arXiv:2506.02285).
        at: ``"backward"``: in a post-accumulate-grad hook, so that clipping and logging see the
            decay.
            ``"step"``: just before the update, after accumulation, un-scaling and clipping, as the
            optimizer's own ``weight_decay`` would.
        optimizer: the optimizer(s) that step the model. Needed for decoupled decay at
            ``"backward"`` (unless `lr` is a number) and for optimizers that maximize; otherwise
            each optimizer is found at its first step.
        lr: learning rate of decoupled decay, a number or a function of the param group that owns
            the parameter, where it is not the group's ``lr``.
        scaler: the ``GradScaler``, where coupled decay at ``"backward"`` meets a scaled loss.
        overrides: see `plan`.
        recipe: see `plan`.
        inputs: example inputs, to settle the guesses of the plan by an audit; see `plan`.
        foreach: as in ``torch.optim``, for the pass at the step: None chooses, True forces the
            foreach implementation, False forbids it.
        low_precision: for parameters in bfloat16 and float16, where p·(1 − lr·λ) mostly rounds
            to p. ``"defer"``, the default of every mode but coupled: the factors are collected,
            and written when they can be represented; `WeightDecay.flush` writes what is pending.
            ``"round"``: each step is rounded, as in ``torch.optim``.
        cautious: decay only values that the optimizer's update shrinks too (arXiv:2510.12402),
            after the update: at ``"step"``, and not coupled. Needs memory for a copy of the decayed
            parameters during the step.
        toward: what decay draws parameters to, in place of 0: a number, ``"init"``, an `Anchor`,
            or a mapping from selectors to these; see `plan`. With t: p ← p − lr·λ·(p − t), or
            g ← g + λ·(p − t). ``"init"`` is the value before the first step, and part of
            `WeightDecay.state_dict`. Needs memory for a copy of what has values as target.

    Returns:
        The handle; ``print(handle.plan)`` shows what is decayed and why.

    Raises:
        ArgumentError: an argument has no meaning.
        SelectorError: a selector of `overrides` matches nothing.
        NothingToDecayError: no parameter is eligible.
        LearningRateError: decoupled decay has no learning rate to go by.
        AlreadyAttachedError: another handle decays some of these parameters.
        UnsupportedOptimizerError: decoupled decay cannot be taken out of this optimizer.
        TargetError: a target shares memory with its parameter.

    Nothing is registered when an error is raised. What can only be seen in the training loop is
    raised there, before a step changes anything: `DoubleDecayError`, `MasterWeightsError`,
    `LossScaleError`.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(3, 2)
    >>> decay = wdhook.attach(model, 1e-4)
    >>> decay
    WeightDecay(0.0001, mode='coupled', at='backward', decayed=1 of 2 tensors, steps=0)
    >>> decay.remove()
    """
    check_attach(model, weight_decay, misplaced, at, foreach)
    schedule = weight_decay if callable(weight_decay) else None
    first = weight_decay(0) if callable(weight_decay) else weight_decay
    formula_of(mode, at, low_precision, cautious, toward is not None)  # before the model is read
    ready = ready_plan(model, first, overrides, recipe, inputs, toward)
    require_eligible(ready)
    aimed = any(decision.toward for decision in ready.values())
    formula = formula_of(mode, at, low_precision, cautious, aimed)
    optimizers = optimizers_of(optimizer)
    check_lr(formula, at, optimizers, lr)
    check_steps_are_announced(at, optimizers, schedule)
    check_scaler(scaler)
    config = Config(
        formula=formula,
        at=at,
        optimizers=tuple(weakref.ref(o) for o in optimizers),
        lr=lr,
        scaler=scaler,
        foreach=foreach,
        schedule=schedule,
        said_mode=mode is not None,
        replan=ready.again or partial(decide, overrides=None, recipe=None, strict=False),
    )
    _check_free(model, ready)
    engine = Engine(model, ready, config)
    engine.open()
    listen(engine)
    return WeightDecay(engine, ready, formula.name, at)


def adopt(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    mode: Mode | None = None,
    at: Moment = "step",
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: Recipe | None = None,
    foreach: bool | None = None,
    low_precision: LowPrecision | None = None,
    cautious: bool = False,
    toward: Toward | None = None,
) -> WeightDecay:
    """Take over the decay that `optimizer` is configured with.

    λ of each parameter is read from its param group; eligible parameters keep it, others are no
    longer decayed, and ``weight_decay`` is set to 0 in the groups and in the optimizer's defaults.

    Args:
        model: the module that `optimizer` trains.
        optimizer: with a non-zero ``weight_decay`` in at least one param group.
        mode: None picks the formula of the optimizer's own decay, where it is known.
        at: the default ``"step"`` is when the optimizer did it itself.
        lr, scaler, overrides, recipe, foreach, low_precision, cautious, toward: see `attach`. An
            override is absolute; its True means the λ of the param group.

    Returns:
        The handle. `WeightDecay.remove` ends the decay; it does not give it back to the optimizer.

    Raises:
        ArgumentError: `optimizer` does not decay, or its formula is not known and `mode` is None;
            and all that `attach` raises. The optimizer is left as it was.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    >>> wdhook.adopt(model, optimizer)
    WeightDecay(0.05, mode='decoupled', at='step', decayed=1 of 2 tensors, steps=0)
    >>> optimizer.param_groups[0]["weight_decay"]
    0.0
    """
    check_adopt(model, optimizer)
    groups = optimizer.param_groups
    λs = {id(p): float(g.get("weight_decay") or 0.0) for g in groups for p in g["params"]}
    _check_owns_no_others(model, optimizer)
    if mode is None:
        mode = _mode_of(optimizer)
    decided = plan(model, max(λs.values()), overrides=overrides, recipe=recipe, toward=toward)
    own = {n: λs[id(p)] for n, p in model.named_parameters() if id(p) in λs}
    adopted = decided.with_own(own)
    handle = attach(
        model,
        adopted,
        mode=mode,
        at=at,
        optimizer=optimizer,
        lr=lr,
        scaler=scaler,
        foreach=foreach,
        low_precision=low_precision,
        cautious=cautious,
    )
    for settings in (*groups, optimizer.defaults):
        if "weight_decay" in settings:
            settings["weight_decay"] = 0.0
    return handle


def _mode_of(optimizer: Optimizer) -> Mode:
    mode = own_mode(optimizer)
    if mode is None:
        raise ArgumentError(
            Problem(
                "The formula of the optimizer's own decay is not known, so `mode` cannot be "
                "picked.",
                'Give mode="coupled" (L2, as in SGD) or mode="decoupled" (as in AdamW) or '
                'mode="corrected" (as in timm\'s adamc)',
                {"optimizer": type(optimizer).__name__},
            )
        )
    return cast(Mode, mode)


def _check_owns_no_others(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise if the optimizer decays parameters of another model: their decay would be switched
    off."""
    mine = {id(p) for p in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        others = [p for p in group["params"] if id(p) not in mine]
        if others and decays_itself(group):
            raise ArgumentError(
                Problem(
                    "`optimizer` decays parameters that are not of `model`, and adopting it would "
                    "end that decay.",
                    "Adopt for all that it trains: "
                    "wdhook.adopt(torch.nn.ModuleList([a, b]), optimizer); or put the "
                    "others in a param group with weight_decay=0",
                    {
                        "param_groups": f"[{index}], weight_decay {group['weight_decay']}",
                        "not of the model": (
                            f"{len(others)} tensors, first {tuple(others[0].shape)}"
                        ),
                    },
                )
            )


def _check_free(model: nn.Module, wanted: Plan) -> None:
    """Raise if another handle decays a parameter that this one is to decay."""
    others = attached()
    if not others:
        return
    eligible = {name for name, decision in wanted.items() if decision.eligible}
    mine = {id(param): name for name, param in named_parameters(model) if name in eligible}
    for other in others:
        for key, name in other.state.parameters.governed().items():
            if key not in mine:
                continue
            there = other.state
            raise AlreadyAttachedError(
                Problem(
                    "A parameter is decayed by another handle already.",
                    "Call remove() on the first handle, or exempt the parameter in one of them "
                    "with `overrides`",
                    {
                        "parameter": mine[key],
                        "that handle": f"weight_decay={there.rate.weight_decay:g}, "
                        f"mode={there.config.mode!r}, name there: {name}",
                        "this call": f"weight_decay={wanted.weight_decay:g}",
                    },
                    (mine[key],),
                )
            )
