"""Without hooks: decay once now, or decay as a term of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._base.errors import AlreadyAttachedError, ArgumentError, LearningRateError, NoGradientError
from .._plan.decide import plan, require_eligible
from .._plan.decision import Decision
from .._plan.overrides import Overrides
from . import formulas as arithmetic
from .formulas import Number
from .optimizers import LearningRate, learning_rate
from .step_listener import attached


def apply_weight_decay(
    *modules: nn.Module,
    weight_decay: float,
    mode: str = "coupled",
    optimizer: Any | None = None,
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    foreach: bool | None = None,
) -> None:
    """Decay every eligible parameter that has a gradient, once, now; no hooks.

    Call it once per optimizer step, after the last ``loss.backward()`` of the step and before the step.

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
    if not modules:
        raise ArgumentError("`apply_weight_decay` needs at least one module")
    if mode not in ("coupled", "decoupled"):
        raise ArgumentError(
            f"`mode` must be 'coupled' or 'decoupled' without a handle.\n  got: {mode!r}"
        )
    if mode == "coupled" and lr is not None:
        raise ArgumentError(f'`lr` has no meaning with mode="coupled".\n  got: {lr!r}')
    chosen = _eligible(modules, weight_decay, overrides, recipe)
    _check_unattached(chosen)
    due = [(p, p.grad, d) for p, d in chosen if p.grad is not None]
    if not due:
        raise NoGradientError(
            "No eligible parameter has a gradient.\n"
            f"  eligible parameters: {len(chosen)}\n  Call it after loss.backward() and before optimizer.step()"
        )
    groups = {
        id(p): group for group in getattr(optimizer, "param_groups", ()) for p in group["params"]
    }
    amount = _alpha if mode == "coupled" else _factor
    amounts = [
        amount(decision, groups.get(id(param)), lr) for param, _, decision in due
    ]  # before any change
    with torch.no_grad():
        buckets: dict[Any, tuple[Number, list[Tensor], list[Tensor]]] = {}
        for (param, grad, _), by in zip(due, amounts, strict=True):
            if grad.is_sparse:
                _decay_rows(param, grad, by, mode, scaler)
                continue
            key = by if isinstance(by, float) else id(by)
            kind = (key, param.device, param.dtype, arithmetic.is_plain(param))
            _, params, grads = buckets.setdefault(kind, (by, [], []))
            params.append(param)
            grads.append(grad)
        for (_, device, *_), (by, params, grads) in buckets.items():
            many = arithmetic.use_foreach(foreach, params)
            if mode == "coupled":
                arithmetic.add_all_(
                    grads, params, float(by), arithmetic.loss_scale(scaler, device), many
                )
            else:
                arithmetic.mul_all_(params, by, many)


def _alpha(decision: Decision, group: Any | None, lr: LearningRate | None) -> Number:
    return (
        -decision.weight_decay
        if group is not None and group.get("maximize")
        else decision.weight_decay
    )


def _factor(decision: Decision, group: Any | None, lr: LearningRate | None) -> Number:
    if group is None and (lr is None or callable(lr)):
        raise LearningRateError(
            "Decoupled decay needs a learning rate for the parameter.\n"
            f"  parameter: {decision.name}\n  lr: {lr!r}\n"
            "  Give the optimizer that owns it as `optimizer=`, or a number as `lr=`"
        )
    return arithmetic.factor(learning_rate(group or {}, lr), decision.weight_decay)


def l2_penalty(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: str | None = None,
) -> Tensor:
    """½·Σ λ·‖p‖² over the eligible parameters, as a differentiable 0-dim tensor.

    Add it to the loss in place of `attach`, or log it. Its gradient with respect to each eligible parameter
    is λ·p, to the last bit. Low-precision parameters are summed in float32, and all on the device of the first.

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
    if real.dtype in (torch.float16, torch.bfloat16):
        real = real.float()
    # λ/2 and 2·p are exact, so the gradient (λ/2)·(2·p) is rounded once, as λ·p is.
    return (weight_decay / 2) * real.square().sum()


def _eligible(
    modules: tuple[nn.Module, ...],
    weight_decay: float,
    overrides: Overrides | None,
    recipe: str | None,
) -> list[tuple[nn.Parameter, Decision]]:
    found: dict[int, tuple[nn.Parameter, Decision]] = {}
    for module in modules:
        decided = plan(module, weight_decay, overrides=overrides, recipe=recipe)
        require_eligible(decided)
        for name, param in module.named_parameters():
            if decided[name].eligible:
                found.setdefault(id(param), (param, decided[name]))
    return list(found.values())


def _check_unattached(chosen: list[tuple[nn.Parameter, Decision]]) -> None:
    governed = {key for engine in attached() for key in engine.governed()}
    for param, decision in chosen:
        if id(param) in governed:
            raise AlreadyAttachedError(
                f"A parameter is decayed by a handle already.\n  parameter: {decision.name}\n"
                "  Call remove() on the handle, or leave the decay to it"
            )


def _decay_rows(param: Tensor, grad: Tensor, by: Number, mode: str, scaler: Any | None) -> None:
    if mode == "coupled":
        scale = arithmetic.loss_scale(scaler, grad.device)
        arithmetic.add_rows_(grad, param, arithmetic.scaled(by, scale), None)
    else:
        arithmetic.mul_rows_(grad, param, by, None)
