"""What can be read off an optimizer and its param groups. Nothing here changes either."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from ._arithmetic import Number
from ._errors import LearningRateError, UnsupportedOptimizerError

_OPTIMIZER_FILE = Optimizer.profile_hook_step.__code__.co_filename  # where the wrapper of every step is defined

LearningRate = Number | Callable[[Mapping[str, Any]], Number]
"""A number, or a function of the param group that owns the parameter."""


def learning_rate(group: Mapping[str, Any], given: LearningRate | None) -> Number:
    """The learning rate of a step, from `given` if there is one, else from the param group.

    Raises:
        LearningRateError: the group has none, or its ``lr`` is not what the update is multiplied with.
    """
    value: Any
    if given is not None:
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
    if "d" in group and "beta2_decay" not in group:  # torch's Adafactor calls its clipping threshold `d`
        raise LearningRateError(
            "The param group scales its learning rate with an estimate `d` (Prodigy, D-Adaptation), so "
            "`lr` alone is not the effective one.\n"
            f"  group['lr']: {value!r}\n  group['d']: {group['d']!r}\n"
            '  Give it with `lr=lambda group: group["lr"] * group["d"]`'
        )
    return value  # type: ignore[no-any-return]


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
    for inner in inner_optimizers(optimizer):
        return check_supports_decoupled(inner)
    switches = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
    if switches or any("train_mode" in group for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(
            "Decoupled decay cannot be taken out of an optimizer that keeps two sequences of weights "
            "(ScheduleFree): it would shrink one of them only.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Use mode="coupled", or give the optimizer wdhook.param_groups(model, λ) and let it decay'
        )
    return None


def owned_ids(optimizers: Iterable[Any]) -> set[int]:
    """ids of the parameters that some of the optimizers hold."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def inner_optimizers(optimizer: object) -> Iterator[Optimizer]:
    """Optimizers that `optimizer` holds as attributes, as SAM, Lookahead and accelerate's wrapper do."""
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and value is not optimizer:
            yield value


def zeroes_by_foreach(optimizer: object) -> bool:
    """Whether ``zero_grad(set_to_none=False)`` is a foreach kernel: it does not change the version of a DTensor."""
    defaults = getattr(optimizer, "defaults", {})
    return bool(defaults.get("foreach") or defaults.get("fused"))


def own_mode(optimizer: Optimizer) -> str | None:
    """``"coupled"`` or ``"decoupled"`` where the formula of the optimizer's own decay is known."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return None  # a subclass may do anything with the number
    if kind.__name__ in ("AdamW", "Adafactor", "Muon"):
        return "decoupled"
    decoupled = optimizer.param_groups[0].get("decoupled_weight_decay", False)
    return "decoupled" if decoupled else "coupled"


def is_nested_step() -> bool:
    """Whether an optimizer step runs inside another one, as in a subclass that calls ``super().step()``.

    A step that raised leaves no word behind, so the call stack is the only witness of those that still run.
    """
    return sum(code.co_name == "wrapper" and code.co_filename == _OPTIMIZER_FILE for code, _ in _callers()) > 1


def stepping_scaler() -> Any | None:
    """The enabled ``GradScaler`` whose ``step`` is running, if there is one.

    A scaler leaves no trace on an optimizer that it has un-scaled, so the call stack is the only witness.
    """
    for code, frame in islice(_callers(), 40):  # ten or so of torch and of ours, the rest for frameworks
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
