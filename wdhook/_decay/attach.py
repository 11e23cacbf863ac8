"""`attach` and `adopt`."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._base.errors import AlreadyAttachedError, ArgumentError
from .._plan.decide import decide, plan, require_eligible
from .._plan.overrides import Overrides
from .._plan.plan import Plan
from ..schedules import Schedule
from .arguments import (
    MODES,
    MOMENTS,
    Optimizers,
    check_choice,
    check_lr,
    check_scaler,
    check_step_is_heard,
    optimizers_of,
    ready_plan,
)
from .engine import Engine
from .handle import WeightDecay
from .optimizers import LearningRate, own_mode
from .step_listener import attached, listen
from .tracked import Settings


def attach(
    model: nn.Module,
    weight_decay: float | Schedule | Plan,
    *,
    mode: str = "coupled",
    at: str = "backward",
    optimizer: Optimizers | None = None,
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    foreach: bool | None = None,
) -> WeightDecay:
    r"""Decay the weights of `model`, and nothing else, once per optimizer step from now on.

    Construct the optimizer with ``weight_decay=0``; the training loop stays as it is.

    Args:
        model: the module whose parameters are decayed.
        weight_decay: λ per optimizer step (not per backward); or a function of the number of finished steps that
            gives it, such as those of `wdhook.schedules`; or a ready `Plan`.
        mode: ``"coupled"``: g ← g + λ·p, as if ½·λ·‖p‖² were part of the loss (`torch.optim.SGD`).
            ``"decoupled"``: p ← p·(1 − lr·λ) before the update (`torch.optim.AdamW`; Loshchilov & Hutter 2019).
            ``"independent"``: p ← p·(1 − (lr/lr_peak)·λ), so that λ does not change with the base
            learning rate.
        at: ``"backward"``: in a post-accumulate-grad hook, so that clipping and logging see the decay.
            ``"step"``: just before the update, after accumulation, un-scaling and clipping, as the
            optimizer's own ``weight_decay`` would.
        optimizer: the optimizer(s) that step the model. Needed for decoupled decay at ``"backward"``
            (unless `lr` is a number) and for optimizers that maximize; else any optimizer is heard.
        lr: learning rate of decoupled decay, a number or a function of the param group that owns the
            parameter, where it is not the group's ``lr``.
        scaler: the ``GradScaler``, where coupled decay at ``"backward"`` meets a scaled loss.
        overrides: see `plan`.
        recipe: see `plan`.
        foreach: as in ``torch.optim``, for the pass at the step: None chooses, True forces the foreach
            implementation, False forbids it.

    Returns:
        The handle; ``print(handle.plan)`` shows what is decayed and why.

    Raises:
        ArgumentError: an argument has no meaning.
        SelectorError: a selector of `overrides` matches nothing.
        NothingToDecayError: no parameter is eligible.
        LearningRateError: decoupled decay has no learning rate to go by.
        AlreadyAttachedError: another handle decays some of these parameters.
        UnsupportedOptimizerError: decoupled decay cannot be taken out of this optimizer.

    Nothing is registered when an error is raised. What can only be seen in the training loop is raised
    there, before a step changes anything: `DoubleDecayError`, `MasterWeightsError`, `LossScaleError`.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(3, 2)
    >>> decay = wdhook.attach(model, 1e-4)
    >>> decay
    WeightDecay(0.0001, mode='coupled', at='backward', decayed=1 of 2 tensors, steps=0)
    >>> decay.remove()
    """
    check_choice("mode", mode, MODES)
    check_choice("at", at, MOMENTS)
    if foreach not in (None, True, False):
        raise ArgumentError(f"`foreach` must be None, True or False.\n  got: {foreach!r}")
    schedule = weight_decay if callable(weight_decay) else None
    ready = ready_plan(
        model, weight_decay(0) if callable(weight_decay) else weight_decay, overrides, recipe
    )
    require_eligible(ready)
    optimizers = optimizers_of(optimizer)
    check_lr(mode, at, optimizers, lr)
    check_step_is_heard(at, optimizers, schedule)
    check_scaler(scaler)
    settings = Settings(
        mode=mode,
        at=at,
        optimizers=tuple(weakref.ref(o) for o in optimizers),
        lr=lr,
        scaler=scaler,
        foreach=foreach,
        schedule=schedule,
        replan=partial(decide, overrides=overrides, recipe=recipe, strict=False),
    )
    engine = Engine(model, ready, settings)
    _check_free(engine, ready)
    engine.open()
    listen(engine)
    return WeightDecay(engine, ready, mode, at)


def adopt(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    mode: str | None = None,
    at: str = "step",
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    foreach: bool | None = None,
) -> WeightDecay:
    """Take over the decay that `optimizer` is configured with.

    λ of each parameter is read from its param group; eligible parameters keep it, others are no longer
    decayed, and ``weight_decay`` is set to 0 in the groups and in the optimizer's defaults.

    Args:
        model: the module that `optimizer` trains.
        optimizer: with a non-zero ``weight_decay`` in at least one param group.
        mode: None picks the formula of the optimizer's own decay, where it is known.
        at: the default ``"step"`` is when the optimizer did it itself.
        lr, scaler, overrides, recipe, foreach: see `attach`. An override is absolute; its True means the
            λ of the param group.

    Returns:
        The handle. `WeightDecay.remove` ends the decay; it does not give it back to the optimizer.

    Raises:
        ArgumentError: `optimizer` does not decay, or its formula is not known and `mode` is None; and all
            that `attach` raises. The optimizer is left as it was.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    >>> wdhook.adopt(model, optimizer)
    WeightDecay(0.05, mode='decoupled', at='step', decayed=1 of 2 tensors, steps=0)
    >>> optimizer.param_groups[0]["weight_decay"]
    0.0
    """
    groups = optimizer.param_groups
    λs = {
        id(p): float(group.get("weight_decay") or 0.0) for group in groups for p in group["params"]
    }
    if not any(λs.values()):
        raise ArgumentError(
            "`optimizer` is not configured to decay anything, so there is nothing to adopt.\n"
            f"  optimizer: {type(optimizer).__name__}, weight_decay 0 in {len(groups)} param groups\n"
            "  Use wdhook.attach(model, weight_decay)"
        )
    if mode is None:
        mode = own_mode(optimizer)
    if mode is None:
        raise ArgumentError(
            "The formula of the optimizer's own decay is not known, so `mode` cannot be picked.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Give mode="coupled" (L2, as in SGD) or mode="decoupled" (as in AdamW)'
        )
    decided = plan(model, max(λs.values()), overrides=overrides, recipe=recipe)
    adopted = decided.with_own({n: λs[id(p)] for n, p in model.named_parameters() if id(p) in λs})
    handle = attach(
        model, adopted, mode=mode, at=at, optimizer=optimizer, lr=lr, scaler=scaler, foreach=foreach
    )
    for settings in (*groups, optimizer.defaults):
        if "weight_decay" in settings:
            settings["weight_decay"] = 0.0
    return handle


def _check_free(engine: Engine, wanted: Plan) -> None:
    """Raise if another handle decays a parameter that this one is to decay."""
    others = attached()
    mine = engine.governed() if others else {}
    for other in others:
        for key, name in other.governed().items():
            if key in mine:
                raise AlreadyAttachedError(
                    "A parameter is decayed by another handle already.\n"
                    f"  parameter: {mine[key]}\n  that handle: weight_decay={other.weight_decay:g}, "
                    f"mode={other.settings.mode!r}, name there: {name}\n"
                    f"  this call: weight_decay={wanted.weight_decay:g}\n"
                    "  Call remove() on the first handle, or exempt the parameter in one of them with `overrides`"
                )
