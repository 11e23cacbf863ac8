"""Without hooks: decay once now, or decay as a term of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._base.errors import (
    AlreadyAttachedError,
    ArgumentError,
    DoubleDecayError,
    LearningRateError,
    NoGradientError,
)
from .._base.problem import Problem
from .._base.text import did_you_mean, or_not_given
from .._plan.decide import plan, require_eligible
from .._plan.decision import Decision
from .._plan.overrides import Overrides
from .._plan.recipes import Recipe
from . import tensors
from .entry import Due, Entry, Terms
from .formulas import FORMULAS, Formula, How, Rates
from .optimizers import LearningRate, decays_itself, learning_rate, maximizes
from .rate import check_lr
from .step_listener import attached
from .window import Clock

Chosen = list[tuple[nn.Parameter, Decision]]


def apply_weight_decay(
    *modules: nn.Module,
    weight_decay: float | None = None,
    mode: str = "coupled",
    optimizer: Any | None = None,
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: Recipe | None = None,
    foreach: bool | None = None,
) -> None:
    """Decay every eligible parameter that has a gradient, once, now; no hooks.

    Call it once per optimizer step, after the last ``loss.backward()`` of the step and before the
    step.

    Args:
        modules: one or more modules; a parameter that several of them share is decayed once.
        weight_decay: λ per optimizer step.
        mode: ``"coupled"`` (g ← g + λ·p) or ``"decoupled"`` (p ← p·(1 − lr·λ)); see `attach`.
        optimizer: read for the learning rate of decoupled decay, and for ``maximize``.
        lr: learning rate of decoupled decay, a number or a function of the param group.
        scaler: the ``GradScaler``, if the loss was scaled and the gradients are scaled still.
        overrides, recipe: see `plan`; they are matched in each module by itself.
        foreach: as in ``torch.optim``.

    Raises:
        ArgumentError, SelectorError, NothingToDecayError: as `plan` and `attach`.
        LearningRateError: decoupled, and there is no learning rate for a parameter.
        NoGradientError: no eligible parameter has a gradient, so ``backward()`` has not run yet.
        AlreadyAttachedError: a handle decays one of the parameters.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> model(torch.zeros(1, 1)).sum().backward()
    >>> wdhook.apply_weight_decay(model, weight_decay=0.5)
    >>> torch.equal(model.weight.grad, 0.5 * model.weight)
    True
    """
    formula = _check(modules, weight_decay, mode, lr)
    assert weight_decay is not None
    chosen = _eligible(modules, weight_decay, overrides, recipe)
    _check_unattached(chosen)
    due = [(param, decision) for param, decision in chosen if param.grad is not None]
    if not due:
        raise NoGradientError(
            Problem(
                "No eligible parameter has a gradient.",
                "Call it after loss.backward() and before optimizer.step()",
                {"eligible parameters": len(chosen)},
            )
        )
    priced: dict[Any, tuple[Rates, Due]] = {}  # all numbers before any change
    groups = {id(p): g for g in getattr(optimizer, "param_groups", ()) for p in g["params"]}
    for param, decision in due:
        group = groups.get(id(param))
        rates = _rates(formula, decision, optimizer, group, lr)
        entry = Entry(decision.name, decision.weight_decay, Clock())
        key = (id(group), decision.weight_decay, Terms.key(None, entry, param)[3:])
        if key not in priced:
            priced[key] = rates, Due(Terms(entry.clock, None, entry, param))
        assert param.grad is not None
        priced[key][1].add(param, param.grad, entry)
    with torch.no_grad():
        for rates, together in priced.values():
            scale = (
                tensors.loss_scale(scaler, together.terms.device) if formula.in_gradient else None
            )
            formula.pay_(together, formula.number(rates), How(foreach, scale))


def _check(
    modules: tuple[object, ...], weight_decay: object, mode: str, lr: LearningRate | None
) -> Formula:
    if not modules:
        raise ArgumentError("`apply_weight_decay` needs at least one module")
    strangers = [module for module in modules if not isinstance(module, nn.Module)]
    if strangers or weight_decay is None:
        facts: dict[str, object] = {"weight_decay": or_not_given(weight_decay)}
        if strangers:
            facts["not a module"] = ", ".join(map(repr, strangers))
        raise ArgumentError(
            Problem(
                "`apply_weight_decay` takes modules by position, and λ by name.",
                "Write apply_weight_decay(model, weight_decay=1e-4)",
                facts,
            )
        )
    if mode not in ("coupled", "decoupled"):
        raise ArgumentError(
            f"`mode` must be 'coupled' or 'decoupled' without a handle.\n  got: {mode!r}"
            f"{did_you_mean(mode, ('coupled', 'decoupled'), quoted=True)}"
        )
    if mode == "coupled" and lr is not None:
        raise ArgumentError(f'`lr` has no meaning with mode="coupled".\n  got: {lr!r}')
    return FORMULAS[mode]


def _rates(
    formula: Formula,
    decision: Decision,
    optimizer: Any,
    group: Any | None,
    lr: LearningRate | None,
) -> Rates:
    """The numbers for one parameter."""
    if group is not None and decays_itself(group) and decision.weight_decay:
        raise DoubleDecayError(
            Problem(
                "The optimizer decays a parameter that `apply_weight_decay` is to decay too.",
                "Construct the optimizer with weight_decay=0",
                {
                    "parameter": decision.name,
                    "optimizer": (
                        f"{type(optimizer).__name__}, weight_decay {group['weight_decay']}"
                    ),
                },
                (decision.name,),
            )
        )
    sign = -1.0 if group is not None and maximizes(optimizer, group) else 1.0
    if not formula.needs_lr:
        return Rates(decision.weight_decay, sign=sign)
    if group is None and (lr is None or callable(lr)):
        raise LearningRateError(
            Problem(
                "Decoupled decay needs a learning rate for the parameter.",
                "Give the optimizer that owns it as `optimizer=`, or a number as `lr=`",
                {"parameter": decision.name, "lr": or_not_given(lr)},
                (decision.name,),
            )
        )
    return Rates(decision.weight_decay, check_lr(learning_rate(group or {}, lr), group or {}))


def l2_penalty(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: Recipe | None = None,
) -> Tensor:
    """½·Σ λ·‖p‖² over the eligible parameters, as a differentiable 0-dim tensor.

    Add it to the loss in place of `attach`, or log it. Its gradient with respect to each eligible
    parameter is λ·p, to the last bit. Low-precision parameters are summed in float32, and all on
    the device of the first.

    Args:
        model, weight_decay, overrides, recipe: see `plan`.

    Raises:
        ArgumentError, SelectorError, NothingToDecayError: as `plan` and `attach`.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> wdhook.l2_penalty(model, 0.5)
    tensor(4.5000, grad_fn=<MulBackward0>)
    """
    terms = [
        _half_square(p, d.weight_decay)
        for p, d in _eligible((model,), weight_decay, overrides, recipe)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def _half_square(param: Tensor, weight_decay: float) -> Tensor:
    real = torch.view_as_real(param) if param.is_complex() else param
    if tensors.is_low(real.dtype):
        real = real.float()
    # λ/2 and 2·p are exact, so the gradient (λ/2)·(2·p) is rounded once, as λ·p is.
    return (weight_decay / 2) * real.square().sum()


def _eligible(
    modules: tuple[Any, ...],
    weight_decay: float,
    overrides: Overrides | None,
    recipe: Recipe | None,
) -> Chosen:
    found: dict[int, tuple[nn.Parameter, Decision]] = {}
    for module in modules:
        decided = plan(module, weight_decay, overrides=overrides, recipe=recipe)
        require_eligible(decided)
        for name, param in module.named_parameters():
            if decided[name].eligible:
                found.setdefault(id(param), (param, decided[name]))
    return list(found.values())


def _check_unattached(chosen: Chosen) -> None:
    governed = {key for engine in attached() for key in engine.state.parameters.governed()}
    for param, decision in chosen:
        if id(param) in governed:
            raise AlreadyAttachedError(
                Problem(
                    "A parameter is decayed by a handle already.",
                    "Call remove() on the handle, or leave the decay to it",
                    {"parameter": decision.name},
                    (decision.name,),
                )
            )
