"""Without hooks: decay once now, or decay as a term of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _arithmetic as arithmetic
from ._errors import AlreadyAttachedError, ArgumentError, NoGradientError
from ._listener import attached
from ._overrides import Overrides
from ._plan import Decision, plan, require_eligible


def apply_weight_decay(
    *modules: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    foreach: bool | None = None,
) -> None:
    """Decay every eligible parameter that has a gradient, once, now; no hooks.

    Call it once per optimizer step, after the last ``loss.backward()`` of the step and before the step.
    Without `lr` the decay is coupled (g ← g + λ·p); with it, decoupled (p ← p·(1 − lr·λ)).

    Args:
        modules: one or more modules; a parameter that several of them share is decayed once.
        weight_decay: λ per optimizer step.
        lr: learning rate; makes the decay decoupled.
        scaler: the ``GradScaler``, if the loss was scaled and the gradients are scaled still.
        overrides, recipe: see `plan`; they are matched in each module by itself.
        foreach: as in ``torch.optim``.

    Raises:
        ArgumentError, SelectorError, NothingToDecayError: as `plan` and `attach`.
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
    chosen = _eligible(modules, weight_decay, overrides, recipe)
    _check_unattached(chosen)
    due = [(p, p.grad, d.weight_decay) for p, d in chosen if p.grad is not None]
    if not due:
        raise NoGradientError(
            "No eligible parameter has a gradient.\n"
            f"  eligible parameters: {len(chosen)}\n  Call it after loss.backward() and before optimizer.step()"
        )
    with torch.no_grad():
        for param, grad, λ in due:
            if grad.is_sparse:
                _decay_rows(param, grad, λ, lr, scaler)
        buckets: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for param, grad, λ in due:
            if not grad.is_sparse and λ:
                kind = (λ, param.device, param.dtype, arithmetic.is_plain(param))
                buckets.setdefault(kind, []).append((param, grad))
        for (λ, device, _, plain), pairs in buckets.items():
            params, grads = [p for p, _ in pairs], [g for _, g in pairs]
            many = plain and len(pairs) > 1 if foreach is None else foreach
            if lr is None:
                arithmetic.add_all_(grads, params, λ, arithmetic.loss_scale(scaler, device), many)
            else:
                arithmetic.mul_all_(params, arithmetic.factor(lr, λ), many)


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
    terms = [_half_square(p, d.weight_decay) for p, d in _eligible((model,), weight_decay, overrides, recipe)]
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
    modules: tuple[nn.Module, ...], weight_decay: float, overrides: Overrides | None, recipe: str | None
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


def _decay_rows(param: Tensor, grad: Tensor, λ: float, lr: float | None, scaler: Any | None) -> None:
    if lr is None:
        arithmetic.add_rows_(grad, param, arithmetic.scaled(λ, arithmetic.loss_scale(scaler, grad.device)), None)
    else:
        arithmetic.mul_rows_(grad, param, arithmetic.factor(lr, λ), None)
