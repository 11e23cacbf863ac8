"""What can be read off an optimizer and its param groups. Nothing here changes either."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from .._base.errors import LearningRateError, UnsupportedOptimizerError
from .formulas import Number

_OPTIMIZER_FILE = (
    Optimizer.profile_hook_step.__code__.co_filename
)  # where the wrapper of every step is defined
_SEQUENCES = {"z", "x0", "x_k"}  # of ScheduleFree and FTRL; MADGRAD and dual averaging; A2Grad

LearningRate = Number | Callable[[Mapping[str, Any]], Number]
"""A number, or a function of the param group that owns the parameter."""


def learning_rate(group: Mapping[str, Any], given: LearningRate | None) -> Number:
    """The learning rate of a step, from `given` if there is one, else from the param group.

    Raises:
        LearningRateError: the group has none, or its ``lr`` is not what the update is multiplied with.
    """
    value: Any
    if given is not None:
        if isinstance(group.get("lr"), float) and not group["lr"] and not callable(given):
            return 0.0  # a step that moves nothing, as that by which torch.distributed.checkpoint makes a state
        value = given(group) if callable(given) else given
        if value is None:
            raise LearningRateError("`lr` is a function that returned None for a param group.")
        return value  # type: ignore[no-any-return]
    value = group.get("lr")
    if value is None:
        raise LearningRateError(
            "Decoupled decay needs a learning rate, and the param group has none that it could read "
            "(as with Adafactor's relative step).\n"
            f"  group['lr']: {value!r}\n"
            '  Give it with `lr=`, a float or a function of the group, or use mode="coupled"'
        )
    if (
        "d" in group and "beta2_decay" not in group
    ):  # torch's Adafactor calls its clipping threshold `d`
        return _estimated(group)
    return value  # type: ignore[no-any-return]


def _estimated(group: Mapping[str, Any]) -> Number:
    """The step of Prodigy and D-Adaptation: ``lr`` times their estimate ``d`` of the distance to the solution.

    They multiply an update with the estimate from before it, and that is what is in the group now. Their forms that
    are no kin of Adam (SGD, AdaGrad) have no ``betas``; they normalize the step by other things besides.
    """
    corrected = group.get("use_bias_correction", False)
    if "betas" not in group or group.get("bias_correction") or (corrected and "k" not in group):
        raise LearningRateError(
            "The param group scales its learning rate with an estimate `d` (D-Adaptation), and with other things that "
            "are not in the group, so the effective one is not known.\n"
            f"  group['lr']: {group['lr']!r}\n  group['d']: {group['d']!r}\n"
            '  Give it, as in lr=lambda group: group["lr"] * group["d"], or use mode="coupled"'
        )
    step: Number = group["lr"] * group["d"]
    if corrected:  # Adam's, of the step that is coming
        beta1, beta2 = group["betas"][:2]
        count = group["k"] + 1
        step = step * ((1 - beta2**count) ** 0.5 / (1 - beta1**count))
    return step


def peak_learning_rate(group: Mapping[str, Any], seen: Number | None, now: Number) -> Number:
    """The largest learning rate of a run, as far as it is known.

    Schedulers of torch note theirs in the group (``max_lr``, ``initial_lr``); else it is the largest
    seen so far.
    """
    known = [group.get("max_lr"), group.get("initial_lr"), seen, now]
    numbers = [k for k in known if k is not None]
    if any(isinstance(k, torch.Tensor) for k in numbers):
        device = next(k.device for k in numbers if isinstance(k, torch.Tensor))
        return torch.stack([torch.as_tensor(k, device=device).detach() for k in numbers]).max()
    return max(numbers)


def check_supports_decoupled(optimizer: Optimizer) -> None:
    """Raise for optimizers that keep two sequences of weights (ScheduleFree).

    Shrinking the point at which the gradient is taken does not shrink the other sequence, so
    p ← p·(1 − lr·λ) has no meaning there. Such optimizers have to be told which sequence the model
    should hold, by ``train()`` and ``eval()``.
    """
    for inner in innermost(optimizer):
        if _keeps_two_sequences(inner):
            raise UnsupportedOptimizerError(
                "Decoupled decay cannot be taken out of an optimizer that keeps two sequences of weights "
                "(ScheduleFree, MADGRAD): it would shrink one of them only.\n"
                f"  optimizer: {type(inner).__name__}\n"
                '  Use mode="coupled", or give the optimizer wdhook.param_groups(model, λ) and let it decay'
            )


def _keeps_two_sequences(optimizer: Optimizer) -> bool:
    """Whether the optimizer moves the parameters towards a point that it keeps itself.

    Told by the methods or the group entry with which ScheduleFree switches, or, once it has stepped, by what it keeps
    for a parameter: the point ``z``, an average ``x_k``, or the start ``x0`` to which it adds sums of gradients.
    """
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        return True
    if any("train_mode" in group for group in optimizer.param_groups):
        return True
    firsts = (group["params"][0] for group in optimizer.param_groups if group["params"])
    state = getattr(optimizer, "state", {})  # one that is no torch Optimizer may have none
    return any(not _SEQUENCES.isdisjoint(state.get(p, ())) for p in firsts)


def tells_of_steps(optimizer: object) -> bool:
    """Whether the steps of `optimizer` are heard.

    Not those of an object that is no torch Optimizer, nor of one that updates inside the backward pass, and whose
    ``step`` is the inherited one that only raises NotImplementedError (LOMO).
    """
    if not isinstance(optimizer, Optimizer):
        return False
    code = getattr(inspect.unwrap(type(optimizer).step), "__code__", None)
    return code is None or code.co_names != ("NotImplementedError",)


def only_accumulates(optimizer: object) -> bool:
    """Whether the step that is coming takes the gradients into the state and leaves the parameters (optimi)."""
    return bool(getattr(optimizer, "optimizer_accumulation", False))


def maximizes(optimizer: object, group: Mapping[str, Any]) -> bool:
    """Whether the optimizer negates the gradients of a param group; some note that on themselves, for all groups."""
    return bool(group.get("maximize", getattr(optimizer, "maximize", False)))


def owned_ids(optimizers: Iterable[Any]) -> set[int]:
    """ids of the parameters that some of the optimizers hold."""
    return {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def inner_optimizers(optimizer: object) -> Iterator[Optimizer]:
    """Optimizers that `optimizer` holds, as SAM, Lookahead and accelerate's wrapper do; some hold several in a list."""
    for value in vars(optimizer).values():
        members = (
            value
            if isinstance(value, (list, tuple))
            else value.values()
            if type(value) is dict
            else (value,)
        )
        for member in members:
            if isinstance(member, Optimizer) and member is not optimizer:
                yield member


def innermost(optimizer: Any) -> Iterator[Any]:
    """The optimizers inside a wrapper, or the optimizer itself where it is none."""
    inside = list(inner_optimizers(optimizer))
    for inner in inside:
        yield from innermost(inner)
    if not inside:
        yield optimizer


def zeroes_by_foreach(optimizer: object) -> bool:
    """Whether ``zero_grad(set_to_none=False)`` is a foreach kernel: it does not change the version of a DTensor."""
    defaults = getattr(optimizer, "defaults", {})
    return bool(defaults.get("foreach") or defaults.get("fused"))


def own_mode(optimizer: Optimizer) -> str | None:
    """``"coupled"`` or ``"decoupled"`` where the formula of the optimizer's own decay is known."""
    kind = type(optimizer)
    if (
        getattr(torch.optim, kind.__name__, None) is not kind
        or "weight_decay" not in optimizer.defaults
    ):
        return None  # a subclass may do anything with the number, and Rprop does nothing
    if kind.__name__ == "Adafactor":
        return None  # its update reads the parameter before it is decayed
    if kind.__name__ in ("AdamW", "Muon"):
        return "decoupled"
    decaying = [group for group in optimizer.param_groups if group.get("weight_decay")]
    decoupled = {bool(group.get("decoupled_weight_decay", False)) for group in decaying}
    if len(decoupled) > 1:
        return None
    return "decoupled" if decoupled == {True} else "coupled"


def is_nested_step() -> bool:
    """Whether an optimizer step runs inside another one, as in a subclass that calls ``super().step()``.

    A step that raised leaves no word behind, so the call stack is the only witness of those that still run.
    """
    return (
        sum(
            code.co_name == "wrapper" and code.co_filename == _OPTIMIZER_FILE
            for code, _ in _callers()
        )
        > 1
    )


def stepping_scaler() -> Any | None:
    """The enabled ``GradScaler`` whose ``step`` is running, if there is one.

    A scaler leaves no trace on an optimizer that it has un-scaled, so the call stack is the only witness.
    """
    for code, frame in islice(
        _callers(), 40
    ):  # ten or so of torch and of ours, the rest for frameworks
        if code is torch.amp.GradScaler.step.__code__:
            # Only now: asking any frame for its locals makes it keep them alive.
            scaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
    return None


def _callers() -> Iterator[tuple[CodeType, FrameType]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code, frame
        frame = frame.f_back
