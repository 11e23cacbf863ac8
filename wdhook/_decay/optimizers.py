"""Facts that can be read off an optimizer and its param groups. Nothing here changes either."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._base.errors import LearningRateError, UnsupportedOptimizerError
from .._base.problem import Problem
from .._base.torch_private import COMPILED_FROM
from .tensors import Number

_SEQUENCES = {"z", "x0", "x_k"}  # of ScheduleFree and FTRL; MADGRAD and dual averaging; A2Grad
_DECOUPLED_KEYS = ("decoupled_weight_decay", "weight_decouple")  # torch; pytorch_optimizer, Prodigy

LearningRate = Number | Callable[[Mapping[str, Any]], Number]
"""A number, or a function of the param group that owns the parameter."""


# Learning rates --------------------------------------------------------------------------------


def learning_rate(group: Mapping[str, Any], given: LearningRate | None) -> Number:
    """The learning rate of a step, from `given` if there is one, else from the param group.

    Raises:
        LearningRateError: the group has none, or its ``lr`` is not what the update is multiplied
        with.
    """
    if callable(given):
        return _called(given, group)
    if given is not None:
        return given
    lr: Number | None = group.get("lr")
    if lr is None:
        raise LearningRateError(
            Problem(
                "Decoupled decay needs a learning rate, and the param group has none that it could "
                "read (as with Adafactor's relative step).",
                'Give it with `lr=`, a float or a function of the group, or use mode="coupled"',
                {"group['lr']": "None" if "lr" in group else "missing"},
            )
        )
    # torch's Adafactor calls its clipping threshold `d`.
    if "d" in group and "beta2_decay" not in group:
        return _estimated(group)
    return lr


def _called(given: Callable[[Mapping[str, Any]], Number], group: Mapping[str, Any]) -> Number:
    lr: Any = given(group)
    if lr is None:
        raise LearningRateError(
            Problem(
                "`lr` is a function that returned None for a param group.",
                "Let it return a number for every group with a decayed parameter",
                {"keys of the group": ", ".join(map(str, group))},
            )
        )
    return lr  # type: ignore[no-any-return]


def _estimated(group: Mapping[str, Any]) -> Number:
    """The step of Prodigy and D-Adaptation: ``lr`` times the estimate ``d`` of the distance to the
    solution.

    They multiply an update with the estimate from before it, which is what the group holds now.
    Their forms that are no kin of Adam (SGD, AdaGrad) have no ``betas``, and normalize the step by
    other things besides.
    """
    corrected = group.get("use_bias_correction", False)
    kin_of_adam = "betas" in group and not group.get("bias_correction")
    if not kin_of_adam or (corrected and "k" not in group):
        raise LearningRateError(
            Problem(
                "The param group scales its learning rate with an estimate `d` (D-Adaptation), and "
                "with other things that are not in the group, so the effective one is not known.",
                'Give it, as in lr=lambda group: group["lr"] * group["d"], or use mode="coupled"',
                {"group['lr']": repr(group["lr"]), "group['d']": repr(group["d"])},
            )
        )
    step: Number = group["lr"] * group["d"]
    if not corrected:
        return step
    beta1, beta2 = group["betas"][:2]
    count = group["k"] + 1  # Adam's correction for the step that is coming
    corrections: float = (1 - beta2**count) ** 0.5 / (1 - beta1**count)
    return step * corrections


def known_rates(group: Mapping[str, Any]) -> list[Number]:
    """Learning rates that torch's schedulers note in a group: those that it starts from or will
    reach."""
    noted = (group.get("max_lr"), group.get("initial_lr"))
    return [rate for rate in noted if rate is not None]


def largest_known_rate(group: Mapping[str, Any]) -> float | None:
    """The largest learning rate that a group is known to reach, read from no device."""
    found = []
    for key in ("lr", "initial_lr", "max_lr"):
        rate = group.get(key)
        if isinstance(rate, (int, float)) or (isinstance(rate, Tensor) and rate.is_cpu):
            found.append(float(rate))
    return max(found, default=None)


def sgd_gain(optimizer: object, group: Mapping[str, Any]) -> Number | None:
    """The factor by which `torch.optim.SGD` multiplies a gradient, in its step and all later ones
    together: lr·(1 − dampening)/(1 − momentum).

    None for another optimizer, and for a momentum that never fades. Nesterov's form has the same
    sum.
    """
    if type(optimizer) is not torch.optim.SGD or not group["momentum"] < 1:
        return None
    share = (1 - group["dampening"]) / (1 - group["momentum"]) if group["momentum"] else 1.0
    return group["lr"] * share  # type: ignore[no-any-return]


def persistence(optimizer: object, group: Mapping[str, Any]) -> float | None:
    """Σc²/(Σc)² of the weights c with which the updates of `torch.optim.SGD`, Adam and AdamW
    contain the gradients of earlier steps.

    1 where each update is of its own gradient, (1 − μ)/(1 + μ) with momentum μ or β₁: of two
    updates that are alike, the second turns a weight no farther. None for other optimizers.
    """
    kind = type(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        fades = float(group["betas"][0])
    elif kind is torch.optim.SGD and group["momentum"] < 1:
        fades = float(group["momentum"])
        if group["nesterov"]:  # c₀ = 1 + μ, then μ², μ³, ...
            return ((1 + fades) ** 2 + fades**4 / (1 - fades**2)) * (1 - fades) ** 2
    else:
        return None
    return (1 - fades) / (1 + fades)


# Own decay and sign ----------------------------------------------------------------------------


def decays_itself(group: Mapping[str, Any]) -> bool:
    """Tell a param group whose parameters the optimizer decays."""
    return bool(group.get("weight_decay"))


def own_mode(optimizer: Optimizer) -> str | None:
    """``"coupled"`` or ``"decoupled"`` where the formula of the optimizer's own decay is known."""
    kind = type(optimizer)
    is_torchs = getattr(torch.optim, kind.__name__, None) is kind
    if not is_torchs or "weight_decay" not in optimizer.defaults:
        return None  # a subclass may do anything with the number, and Rprop does nothing
    if kind.__name__ == "Adafactor":
        return None  # its update reads the parameter before it is decayed
    if kind.__name__ in ("AdamW", "Muon"):
        return "decoupled"
    decaying = [group for group in optimizer.param_groups if decays_itself(group)]
    forms = {bool(group.get("decoupled_weight_decay", False)) for group in decaying}
    if len(forms) > 1:
        return None
    return "decoupled" if forms == {True} else "coupled"


def would_decouple(optimizer: object) -> bool:
    """Tell an optimizer whose own decay, if it were on, would be decoupled."""
    kinds: tuple[type, ...] = (torch.optim.AdamW, getattr(torch.optim, "Muon", torch.optim.AdamW))
    if isinstance(optimizer, kinds):
        return True
    groups = getattr(optimizer, "param_groups", ())
    return any(group.get(key) for group in groups for key in _DECOUPLED_KEYS)


def maximizes(optimizer: object, group: Mapping[str, Any]) -> bool:
    """Tell a param group whose gradients are negated; some optimizers note that on themselves."""
    return bool(group.get("maximize", getattr(optimizer, "maximize", False)))


# Steps -----------------------------------------------------------------------------------------


def announces_steps(optimizer: object) -> bool:
    """Tell an optimizer whose steps torch's hooks announce.

    Not an object that is no torch Optimizer, nor one that updates inside the backward pass and
    inherits a ``step`` that only raises NotImplementedError (LOMO), nor one whose ``step`` was
    replaced on the instance.
    """
    if not isinstance(optimizer, Optimizer):
        return False
    replaced = vars(optimizer).get("step")
    if replaced is not None and not _leads_to_class(replaced, optimizer):
        return False
    code = getattr(inspect.unwrap(type(optimizer).step), "__code__", None)
    return code is None or code.co_names != ("NotImplementedError",)


def _leads_to_class(step: Any, optimizer: Optimizer, depth: int = 4) -> bool:
    """Tell a replacement of ``step`` that calls the step of the class, as LR schedulers and
    torch.compile put.

    Followed through ``__wrapped__``, bound methods, partials and the cells of closures.
    """
    if depth == 0 or not (callable(step) or step is optimizer):
        return False
    if getattr(step, "hooked", False) or step is type(optimizer).step or step is optimizer:
        return True
    return any(_leads_to_class(value, optimizer, depth - 1) for value in _wrapped_by(step))


def _wrapped_by(step: Any) -> Iterator[Any]:
    """What a function wraps: by attribute, or in the cells of a closure."""
    for name in ("__wrapped__", "__func__", "func", COMPILED_FROM):
        yield getattr(step, name, None)
    for cell in getattr(step, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def is_capturable(known: tuple[Any, Mapping[str, Any]] | None) -> bool:
    """Tell a param group whose step may go into a CUDA graph; `known` is an optimizer and its
    group."""
    return known is not None and bool(known[1].get("capturable"))


def only_accumulates(optimizer: object) -> bool:
    """Tell a step that takes the gradients into the state and leaves the parameters (optimi)."""
    return bool(getattr(optimizer, "optimizer_accumulation", False))


def zeroes_by_foreach(optimizer: object) -> bool:
    """Tell ``zero_grad(set_to_none=False)`` by a foreach kernel: no version of a DTensor
    changes."""
    defaults = getattr(optimizer, "defaults", {})
    return bool(defaults.get("foreach") or defaults.get("fused"))


# Owners and wrappers ---------------------------------------------------------------------------


def owned_ids(optimizers: Iterable[Any]) -> set[int]:
    """ids of the parameters that some of the optimizers hold."""
    return {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def inner_optimizers(optimizer: object) -> Iterator[Any]:
    """Optimizers that `optimizer` holds, as SAM, Lookahead and accelerate's wrapper do; some hold
    several.

    Optimizers of engines (DeepSpeed, Megatron-core) need be no torch Optimizers.
    """
    for value in getattr(optimizer, "__dict__", {}).values():
        for member in _members(value):
            if member is not optimizer and is_optimizer(member):
                yield member


def is_optimizer(thing: object) -> bool:
    """Tell an optimizer, of whatever class: it has param groups, and a step."""
    if isinstance(thing, (Tensor, torch.nn.Module, type)):
        return False
    return hasattr(thing, "param_groups") and callable(getattr(thing, "step", None))


def _members(value: object) -> Iterable[object]:
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if type(value) is dict else (value,)


def innermost(optimizer: Any) -> Iterator[Any]:
    """The optimizers inside a wrapper, or the optimizer itself where it is none."""
    inside = list(inner_optimizers(optimizer))
    for inner in inside:
        yield from innermost(inner)
    if not inside:
        yield optimizer


# Support ---------------------------------------------------------------------------------------


def check_supports_decoupled(optimizer: Optimizer) -> None:
    """Raise for optimizers that keep two sequences of weights (ScheduleFree).

    Shrinking the point at which the gradient is taken does not shrink the other sequence, so
    p ← p·(1 − lr·λ) has no meaning there. Such optimizers have to be told which sequence the model
    should hold, by ``train()`` and ``eval()``.

    Raises:
        UnsupportedOptimizerError: the optimizer, or one inside it, keeps two sequences.
    """
    for inner in innermost(optimizer):
        if keeps_two_sequences(inner):
            raise UnsupportedOptimizerError(two_sequences(inner), "two-sequences")


def two_sequences(optimizer: object) -> Problem:
    """The problem of an optimizer that keeps two sequences of weights."""
    return Problem(
        "Decoupled decay cannot be taken out of an optimizer that keeps two sequences of weights "
        "(ScheduleFree, MADGRAD): it would shrink one of them only.",
        'Use mode="coupled", or give the optimizer wdhook.param_groups(model, λ) and let it decay',
        {"optimizer": type(optimizer).__name__},
    )


def keeps_two_sequences(optimizer: Any) -> bool:
    """Tell an optimizer that moves the parameters towards a point that it keeps itself.

    Seen from the methods or the group entry with which ScheduleFree switches, or, after the first
    step, from the per-parameter state: the point ``z``, an average ``x_k``, or the start ``x0`` to
    which sums of gradients are added.
    """
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        return True
    if any("train_mode" in group for group in optimizer.param_groups):
        return True
    state = getattr(optimizer, "state", {})
    if not isinstance(
        state, Mapping
    ):  # one that is no torch Optimizer may have none, or another kind
        return False
    for group in optimizer.param_groups:
        first = next(iter(group["params"]), None)
        if first is not None and not _SEQUENCES.isdisjoint(state.get(first, ())):
            return True
    return False
