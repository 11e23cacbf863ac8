"""Loud, never silent: what is checked before a step, and what the errors say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._base.errors import (
    DoubleDecayError,
    LearningRateError,
    LossScaleError,
    MasterWeightsError,
    UnsupportedOptimizerError,
)
from .._base.validate import is_number
from .optimizers import (
    check_supports_decoupled,
    is_nested_step,
    learning_rate,
    only_accumulates,
    stepping_scaler,
)
from .rules_averaging import check_pipeline, check_replicas, living

if TYPE_CHECKING:
    from .engine import Engine
    from .tracked import Pair, View


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
            _check_copies(engine, optimizer, view)
        return
    check_own_decay(optimizer, view)
    if settings.mode != "coupled" and settings.lr is None:
        for group, buckets in zip(optimizer.param_groups, view.buckets, strict=True):
            if _active(buckets) is not None:
                learning_rate(group, None)
    if settings.at == "backward" and only_accumulates(optimizer):
        raise UnsupportedOptimizerError(
            "The optimizer takes the gradients of several backward passes into its state before it steps "
            "(`optimizer_accumulation`): a decay in each of them is several decays.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Use attach(..., at="step")'
        )
    if settings.mode != "coupled":
        _check_strays(engine, view)
        _check_place(engine, optimizer, view)
        _check_graph(optimizer, view)
        if view.owner.steps < _STEPS_TO_SHOW:
            check_supports_decoupled(optimizer)
    elif settings.at == "backward":
        _check_loss_scale(engine, optimizer, view)
        _check_sign(optimizer, view)
        check_replicas(engine)
    if not view.checked:
        if settings.mode == "coupled" and settings.at == "backward":
            check_pipeline(view)
        _warn_of_rounding(engine, optimizer, view)
        view.checked = True


def check_own_decay(optimizer: Any, view: View) -> None:
    """Raise if the optimizer decays parameters that are decayed here."""
    for index, (group, buckets) in enumerate(
        zip(optimizer.param_groups, view.buckets, strict=True)
    ):
        active = _active(buckets)
        if active is not None and decays_itself(group):
            raise _double_decay(
                optimizer,
                f"param_groups[{index}]['weight_decay'] = {group['weight_decay']}",
                active,
            )
        if active is None or view.owner.heard:
            continue
        # No step is heard at which it could be seen, and so other names count too: fastai's, and LOMO's attribute.
        for where, own in (
            (f"param_groups[{index}]['wd']", group.get("wd")),
            ("optimizer.weight_decay", getattr(optimizer, "weight_decay", None)),
        ):
            if is_number(own) and own:
                raise _double_decay(optimizer, f"{where} = {own}", active)


def _active(buckets: list[list[Pair]]) -> Pair | None:
    """A parameter of a param group that is decayed with a λ other than 0, if there is one."""
    return next((bucket[0] for bucket in buckets if bucket[0][1].alpha), None)


def _check_graph(optimizer: Optimizer, view: View) -> None:
    """Decoupled: an optimizer that differentiates the gradients needs the parameters as they were."""
    for param, entry in (bucket[0] for buckets in view.buckets for bucket in buckets):
        if param.grad is not None and param.grad.requires_grad:
            raise UnsupportedOptimizerError(
                "The gradients hold their graph (backward(create_graph=True)), and the optimizer may differentiate "
                "them in its step (AdaHessian, SophiaH): decay before that changes what they depend on.\n"
                f"  parameter: {entry.name}\n  optimizer: {type(optimizer).__name__}\n"
                '  Use mode="coupled"'
            )


def check_unmoved(engine: Engine, optimizer: Optimizer, view: View) -> None:
    """Raise if a wrapper has moved the parameters in its step, and lets the optimizer inside run the closure there.

    It will move them back before the update, and take the decay at the end of the closure with it. Told by content,
    since some write to ``p.data``; looked at in the first steps only, since that synchronises.
    """
    if engine.outside is None or view.owner.steps >= _STEPS_TO_SHOW or not is_nested_step():
        return
    param, before = engine.outside
    if not torch.equal(param, before):
        raise UnsupportedOptimizerError(
            "The closure of the step runs while a wrapper has moved the parameters (SAM of heavyball), so decay at its "
            "end would be undone.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Use mode="coupled" with at="backward"'
        )


def _check_loss_scale(engine: Engine, optimizer: Optimizer, view: View) -> None:
    """Coupled decay in the backward has to know the factor of the loss."""
    given = engine.settings.scaler
    stepping = stepping_scaler()
    if given is None and stepping is not None and _is_decayed(view):
        raise LossScaleError(
            "The loss is scaled by a GradScaler that `attach` was not told about: the decay in the gradients "
            "is too weak by the factor of the scale (65536 at first).\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Use attach(..., scaler=scaler), or attach(..., at="step")'
        )
    if given is None and getattr(optimizer, "grad_scale", None) is not None:
        raise LossScaleError(
            "The optimizer divides the gradients by its `grad_scale`, and with them the decay that was added in the "
            "backward.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Use attach(..., at="step"), which knows `grad_scale`'
        )
    if given is not None and given.is_enabled() and stepping is not given and _is_decayed(view):
        raise LossScaleError(
            "The GradScaler that `attach` was given does not step the optimizer. If it did not scale the loss, the "
            "decay in the gradients is wrong by the factor of its scale.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            "  Use scaler.scale(loss).backward() and scaler.step(optimizer), or leave `scaler` out, or use "
            'attach(..., at="step")'
        )


def _is_decayed(view: View) -> bool:
    """Whether a hook has decayed a gradient; none has where torch.distributed.checkpoint steps to make a state."""
    return any(
        entry.decayed for buckets in view.buckets for bucket in buckets for _, entry in bucket
    )


def _check_sign(optimizer: Optimizer, view: View) -> None:
    if view.turned is not None:
        name, view.turned = view.turned, None
        raise UnsupportedOptimizerError(
            "The optimizer maximizes, which was not known in the backward pass that has decayed already: "
            "that decay has the wrong sign.\n"
            f"  parameter: {name}\n  optimizer: {type(optimizer).__name__}(maximize=True)\n"
            '  Use attach(..., optimizer=optimizer), or attach(..., at="step")'
        )


def _double_decay(optimizer: Any, where: str, pair: Pair) -> DoubleDecayError:
    param, entry = pair
    return DoubleDecayError(
        "The optimizer decays a parameter that wdhook decays too.\n"
        f"  parameter: {entry.name} {tuple(param.shape)}\n"
        f"  optimizer: {type(optimizer).__name__}, {where}\n"
        f"  wdhook: weight_decay = {entry.weight_decay:g}\n"
        "  Construct the optimizer with weight_decay=0, or let wdhook take over: "
        "wdhook.adopt(model, optimizer). A loaded optimizer checkpoint brings its weight_decay back: "
        "set it to 0 after optimizer.load_state_dict(...)"
    )


def _check_strays(engine: Engine, view: View) -> None:
    """Decoupled: parameters with a gradient that none of the given optimizers steps."""
    waiting = [
        (param, entry)
        for param, entry in view.strays
        if param.grad is not None and not entry.decayed
    ]
    owned = engine.owned_ids() if waiting else set()
    for param, entry in waiting:
        if id(param) not in owned:
            raise _master_weights(entry.name, param, "none of those given as `optimizer`")


def _check_place(engine: Engine, optimizer: Optimizer, view: View) -> None:
    """Decoupled decay in the backward has read the lr of one optimizer: another must not step with one of its own."""
    given = engine.settings.lr
    if engine.settings.at == "step" or is_number(given) or engine.sees_one_optimizer():
        return
    for index, buckets in enumerate(view.buckets):
        for param, entry in chain.from_iterable(buckets):
            other = entry.place[0]() if entry.place is not None else None
            if not entry.decayed or entry.place is None or other is None or other is optimizer:
                continue
            read = learning_rate(other.param_groups[entry.place[1]], given)
            own = learning_rate(optimizer.param_groups[index], given)
            if read != own:
                raise LearningRateError(
                    "Decay in the backward has read the learning rate of another optimizer than the one that steps.\n"
                    f"  parameter: {entry.name} {tuple(param.shape)}\n"
                    f"  read from: {type(other).__name__}, lr {float(read):g}\n"
                    f"  steps: {type(optimizer).__name__}, lr {float(own):g}\n"
                    '  Use attach(..., at="step"), or attach again with optimizer= the one that steps'
                )


def _check_copies(engine: Engine, optimizer: Optimizer, view: View) -> None:
    """An optimizer that owns nothing of ours may step copies: then decay at the step changes nothing.

    Told by content: copies start with the values of the parameters. (An optimizer that was given to `attach`
    and owns nothing needs no such proof.)
    """
    settings = engine.settings
    if engine.was_owned or (settings.mode == "coupled" and settings.at == "backward"):
        return
    waiting = next(_waiting(engine), None)
    if waiting is None:
        return
    steps = (p for group in optimizer.param_groups for p in group["params"])
    if engine.was_given(optimizer):
        raise _master_weights(*waiting, type(optimizer).__name__)
    if not view.cleared:
        if any(is_copy(p, waiting[1]) and not _is_of_a_module(p) for p in steps):
            raise _master_weights(*waiting, type(optimizer).__name__)
        view.cleared = True
    engine.foreign_steps += 1
    if engine.foreign_steps == _PATIENCE:
        engine.warn_once(
            "unowned",
            f"{_PATIENCE} optimizer steps were heard while a decayed parameter had a gradient, and none of the "
            "optimizers owns a decayed parameter. If they step copies (master weights), decay at the step is lost.\n"
            f"  parameter: {waiting[0]}\n  last optimizer: {type(optimizer).__name__}\n"
            '  Use mode="coupled" with at="backward", or give the optimizer: attach(..., optimizer=optimizer)',
        )


_STEPS_TO_SHOW = 3  # what an optimizer keeps for a parameter is there once it has stepped
_PATIENCE = 20  # steps; the critic of a GAN takes five or so before the generator's first


def is_copy(stepped: Tensor, param: Tensor) -> bool:
    """Whether `stepped` is a copy of `param`, or a flat buffer that begins with one. Synchronises."""
    flat = stepped.ndim == 1 and stepped.numel() >= param.numel()
    if not (flat or stepped.shape == param.shape) or stepped is param or hasattr(param, "to_local"):
        return False
    head, values = stepped.detach().flatten()[: param.numel()], param.detach().flatten()
    # Not to the last bit: decay in the backward has shrunk the parameter already, by much less than a quarter.
    same = torch.isclose(head.to(values.device, values.dtype), values, rtol=0.25, atol=0.0).all()
    return bool(same & values.any())  # zeros are equal by chance


def _is_of_a_module(param: Tensor) -> bool:
    """Whether some module of the process owns the parameter: then it is a twin of ours, and no master copy.

    Looks through all objects of the process; asked once for an optimizer that steps what looks like a copy.
    """
    modules = living(torch.nn.Module)
    return any(
        param is p for module in modules for p in module.__dict__.get("_parameters", {}).values()
    )


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
    for _, message in roundings(engine, optimizer, view):
        engine.warn_once("rounding", message)


def roundings(engine: Engine, optimizer: Any, view: View) -> Iterator[tuple[list[Pair], str]]:
    """Low-precision parameters whose decay of one step is less than their rounding error, and how to say that."""
    for group, buckets in zip(optimizer.param_groups, view.buckets, strict=True):
        lr = given if is_number(given := engine.settings.lr) else _largest_lr(group)
        for bucket in buckets:
            param, entry = bucket[0]
            if lr is None or param.dtype not in (torch.bfloat16, torch.float16) or not entry.alpha:
                continue
            # p·(1 − x) rounds to p again if x is less than half the spacing of numbers just below p's power of two.
            half_ulp = torch.finfo(param.dtype).eps / 2
            if lr * entry.weight_decay < half_ulp:
                yield (
                    bucket,
                    "The decay of one step is less than half a unit in the last place of the parameter: alone, it "
                    "rounds away.\n"
                    f"  parameter: {entry.name} {param.dtype}\n"
                    f"  lr·λ: {lr * entry.weight_decay:g}, half a unit: {half_ulp:g}\n"
                    "  Keep the parameters in float32 (autocast computes in low precision without it)",
                )


def _largest_lr(group: Mapping[str, Any]) -> float | None:
    """The largest lr that a group is known to reach, so that a warm-up raises no alarm."""
    values = [group.get(key) for key in ("lr", "initial_lr", "max_lr")]
    numbers = [
        float(v)
        for v in values
        if isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.is_cpu)
    ]
    return max(numbers, default=None)
