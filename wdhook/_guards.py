"""Loud, never silent: what is checked before a step, and what the errors say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._errors import DoubleDecayError, LossScaleError, MasterWeightsError, UnsupportedOptimizerError
from ._optimizers import check_supports_decoupled, learning_rate, stepping_scaler

if TYPE_CHECKING:
    from ._engine import Engine
    from ._state import Pair, View


def decays_itself(group: Mapping[str, Any]) -> bool:
    """Whether the optimizer decays the parameters of this param group."""
    return bool(group.get("weight_decay"))


def check_step(engine: Engine, optimizer: Optimizer, view: View, claimed: bool) -> None:
    """Raise for everything that would make this step's decay wrong. Changes nothing.

    Args:
        claimed: some handle decays parameters of this optimizer.
    """
    settings = engine.settings
    if not view.has_entries():
        if not (view.wraps or claimed):
            _check_copies(engine, optimizer)
        return
    for index, (group, buckets) in enumerate(zip(optimizer.param_groups, view.buckets, strict=True)):
        active = next((bucket[0] for bucket in buckets if bucket[0][1].alpha), None)
        if active is not None:
            if decays_itself(group):
                raise _double_decay(optimizer, index, group, active)
            if settings.mode != "coupled" and settings.lr is None:
                learning_rate(group, None)
    if settings.mode != "coupled":
        _check_strays(engine, view)
    if not view.checked:
        _check_once(engine, optimizer, view)
        view.checked = True


def _check_once(engine: Engine, optimizer: Optimizer, view: View) -> None:
    """What can only be wrong from the first step on."""
    settings = engine.settings
    if settings.mode != "coupled":
        check_supports_decoupled(optimizer)
    elif settings.at == "backward":
        if settings.scaler is None and stepping_scaler() is not None:
            raise LossScaleError(
                "The loss is scaled by a GradScaler that `attach` was not told about: the decay in the gradients "
                "is too weak by the factor of the scale (65536 at first).\n"
                f"  optimizer: {type(optimizer).__name__}\n"
                '  Use attach(..., scaler=scaler), or attach(..., at="step")'
            )
        if view.turned is not None:
            name, view.turned = view.turned, None
            raise UnsupportedOptimizerError(
                "The optimizer maximizes, which was not known in the backward pass that has decayed already: "
                "that decay has the wrong sign.\n"
                f"  parameter: {name}\n  optimizer: {type(optimizer).__name__}(maximize=True)\n"
                '  Use attach(..., optimizer=optimizer), or attach(..., at="step")'
            )
    _warn_of_rounding(engine, optimizer, view)


def _double_decay(optimizer: Optimizer, index: int, group: Mapping[str, Any], pair: Pair) -> DoubleDecayError:
    param, entry = pair
    return DoubleDecayError(
        "The optimizer decays a parameter that wdhook decays too.\n"
        f"  parameter: {entry.name} {tuple(param.shape)}\n"
        f"  optimizer: {type(optimizer).__name__}, param_groups[{index}]['weight_decay'] = {group['weight_decay']}\n"
        f"  wdhook: weight_decay = {entry.weight_decay:g}\n"
        "  Construct the optimizer with weight_decay=0, or let wdhook take over: "
        "wdhook.adopt(model, optimizer). A loaded optimizer checkpoint brings its weight_decay back: "
        "set it to 0 after optimizer.load_state_dict(...)"
    )


def _check_strays(engine: Engine, view: View) -> None:
    """Decoupled: parameters with a gradient that none of the given optimizers steps."""
    waiting = [(param, entry) for param, entry in view.strays if param.grad is not None and not entry.decayed]
    owned = engine.owned_ids() if waiting else set()
    for param, entry in waiting:
        if id(param) not in owned:
            raise _master_weights(entry.name, param, "none of those given as `optimizer`")


def _check_copies(engine: Engine, optimizer: Optimizer) -> None:
    """An optimizer that owns nothing of ours may step copies: then decay at the step changes nothing.

    Told by the size of what it steps: the model's, to the element. (An optimizer that was given to `attach`
    and owns nothing needs no such guess.)
    """
    settings = engine.settings
    if engine.was_owned or (settings.mode == "coupled" and settings.at == "backward"):
        return
    waiting = next(_waiting(engine), None)
    if waiting is None:
        return
    stepped = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    trained = sum(p.numel() for _, p in engine.parameters() if p.requires_grad)
    if engine.was_given(optimizer) or stepped == trained:
        raise _master_weights(*waiting, type(optimizer).__name__)


def _waiting(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    governed = engine.governed()
    for name, param in engine.parameters():
        if id(param) in governed and param.grad is not None:
            yield name, param


def _master_weights(name: str, param: Tensor, optimizer: str) -> MasterWeightsError:
    return MasterWeightsError(
        "A decayed parameter has a gradient, and the optimizer that steps does not own it. It may step master weights: "
        "copies of the parameters, which it writes back, so that decay of the parameter itself would be lost.\n"
        f"  parameter: {name} {tuple(param.shape)} {param.dtype}\n  optimizer: {optimizer}\n"
        '  Use mode="coupled" with at="backward", whose decay travels in the gradient; or give every optimizer, '
        "optimizer=[a, b]; or freeze what is not trained: parameter.requires_grad_(False)"
    )


def _warn_of_rounding(engine: Engine, optimizer: Optimizer, view: View) -> None:
    """Warn once if the decay of a low-precision parameter is less than its rounding error."""
    for group, buckets in zip(optimizer.param_groups, view.buckets, strict=True):
        lr = _largest_lr(group)
        for bucket in buckets:
            param, entry = bucket[0]
            if lr is None or param.dtype not in (torch.bfloat16, torch.float16) or not entry.alpha:
                continue
            # p·(1 − x) rounds to p again if x is less than half the spacing of numbers just below p's power of two.
            half_ulp = torch.finfo(param.dtype).eps / 2
            if lr * entry.weight_decay < half_ulp:
                engine.warn_once(
                    "rounding",
                    "The decay of one step is less than half a unit in the last place of the parameter: alone, it "
                    "rounds away.\n"
                    f"  parameter: {entry.name} {param.dtype}\n"
                    f"  lr·λ: {lr * entry.weight_decay:g}, half a unit: {half_ulp:g}\n"
                    "  Keep the parameters in float32 (autocast computes in low precision without it)",
                )


def _largest_lr(group: Mapping[str, Any]) -> float | None:
    """The largest lr that a group is known to reach, so that a warm-up raises no alarm."""
    values = [group.get(key) for key in ("lr", "initial_lr", "max_lr")]
    numbers = [float(v) for v in values if isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.is_cpu)]
    return max(numbers, default=None)
