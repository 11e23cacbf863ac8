"""Tensors that DeepSpeed's ZeRO and Megatron-core step in place of parameters.

These engines take gradients away in the backward pass and step float32 copies of their own, flat
or whole. Each leaves attributes on the parameters, which lead to the copy. Nothing of an engine is
imported here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._base.torch_private import hooks_of


class Engine(NamedTuple):
    """A distributed engine that owns a parameter.

    Attributes:
        name: as messages show it.
        refusal: the feature of the engine under which nothing tells what is stepped; empty where
            something does.
        advice: how to let the engine decay.
    """

    name: str
    refusal: str = ""
    advice: str = ""


class StandIn(NamedTuple):
    """The part of a tensor that an engine steps in this process in place of one parameter.

    Attributes:
        stepped: the tensor in the param groups of the optimizer; 1-D where it stands for several
            parameters.
        start: first element of the part.
        numel: elements of the part; 0 where other processes hold the parameter. None for the whole
            tensor.
    """

    stepped: Tensor
    start: int
    numel: int | None


def engine_of(param: Tensor) -> Engine | None:
    """The engine that takes the gradients of a parameter away, told by its attributes there."""
    zero = zero_optimizer_of(param)
    if zero is not None:
        stage = 3 if hasattr(param, "_z3_optimizer") else 1 + bool(zero.partition_gradients)
        return Engine(f"DeepSpeed ZeRO-{stage}", _refusal_of_zero(zero), _GROUPS)
    if getattr(param, "_hp_mapping", None) is not None:
        return Engine("DeepSpeed", "an optimizer other than those of ZeRO", _GROUPS)
    if hasattr(param, "main_grad"):
        sharded = getattr(param, "main_param_sharded", False)
        missing = hasattr(param, "main_param") and param.main_param is None and not sharded
        return Engine("Megatron-core", "no `main_param`" if missing else "", _OVERRIDES)
    return None


_GROUPS = "give deepspeed.initialize(optimizer=...) one that has wdhook.param_groups(model, λ)"
_OVERRIDES = "give get_megatron_optimizer the plan as `config_overrides` (docs/distributed.md)"


def _refusal_of_zero(zero: Any) -> str:
    """The feature under which ZeRO does more than let its base optimizer step float32 copies."""
    if getattr(zero, "swap_optimizer", False):
        return "offload_optimizer to NVMe"
    if getattr(zero, "zenflow", False):
        return "ZenFlow"
    if getattr(zero, "use_muon", False) or type(zero.optimizer).__name__ == "MuonWithAuxAdam":
        return "Muon"
    return ""


def zero_optimizer_of(param: Tensor) -> Any | None:
    """The ZeRO optimizer of DeepSpeed that trains a parameter.

    Stages 1 and 2 note it on the parameter with offload alone; their gradient hook always refers
    to it.
    """
    for name in ("_z3_optimizer", "_zero_optimizer"):
        zero = getattr(param, name, None)
        if zero is not None:
            return zero
    if not hasattr(param, "_hp_mapping"):
        return None
    for hook in (hooks_of(param) or {}).values():
        for cell in getattr(hook, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "single_partition_of_fp32_groups"):
                return cell.cell_contents
    return None


def stand_in_of(param: Tensor) -> StandIn | None:
    """The tensor that is stepped here in place of a parameter; None where there is none."""
    zero = zero_optimizer_of(param)
    if zero is None:
        main = getattr(param, "main_param", None)
        return None if main is None else StandIn(main, 0, None)
    if hasattr(param, "_z3_optimizer"):
        place = zero.grad_position.get(zero.get_param_id(param))
        if place is None:
            return None  # frozen when the engine was made
        index, start, numel = place
        return StandIn(zero.fp32_partitioned_groups_flat[index], start, numel)
    return _in_partition(param, zero)


def _in_partition(param: Tensor, zero: Any) -> StandIn | None:
    """The part of the flat partition of its param group that ZeRO-1 or 2 steps in this process."""
    position = getattr(param, "param_idx_in_group", None)
    mapping = getattr(param, "_hp_mapping", None)
    for index, group in enumerate(zero.bit16_groups):
        if position is None or position >= len(group) or group[position] is not param:
            continue
        flat = zero.single_partition_of_fp32_groups[index]
        if mapping is None:
            return StandIn(flat, 0, 0)
        address = mapping.get_hp_fragment_address()
        return StandIn(flat, address.start, address.numel)
    return None


class Loan:
    """A tensor for a part of a flat tensor, which borrows the part's gradient during a step.

    Attributes:
        part: 1-D view of the part.
    """

    __slots__ = ("_address", "_numel", "_start", "_stepped", "part")

    def __init__(self, stand_in: StandIn) -> None:
        self._stepped = weakref.ref(stand_in.stepped)
        self._start = stand_in.start
        self._numel = stand_in.numel or 0
        self._address = stand_in.stepped.data_ptr()
        self.part = self._slice(stand_in.stepped)

    def _slice(self, whole: Tensor) -> Tensor:
        return whole.detach().view(-1).narrow(0, self._start, self._numel)

    def is_current(self) -> bool:
        """The flat tensor is where it was: engines move the memory of theirs."""
        stepped = self._stepped()
        return stepped is not None and stepped.data_ptr() == self._address

    def borrow(self) -> None:
        """Let the part have its part of the gradient."""
        stepped = self._stepped()
        grad = None if stepped is None else stepped.grad
        self.part.grad = None if grad is None else self._slice(grad)

    def give_back(self) -> None:
        """Let go of the gradient."""
        self.part.grad = None


def stand_ins(
    params: Iterable[Tensor], stepped: Iterable[Tensor] = ()
) -> Iterator[tuple[Tensor, StandIn]]:
    """Each parameter that an engine steps a copy or a slice of, with that.

    Args:
        params: of the model.
        stepped: tensors of an optimizer. Megatron's distributed optimizer leaves no other trace of
            float32 slices.
    """
    slices = list(stepped)
    for param in params:
        found = stand_in_of(param)
        if found is not None:
            yield param, found
        elif slices and hasattr(param, "main_grad"):
            for one in slices:
                if one.dtype == torch.float32 and is_slice(one, param):
                    yield param, StandIn(one, 0, None)


def is_slice(tensor: Tensor, param: Tensor) -> bool:
    """Tell a tensor that begins in the memory of a parameter."""
    first, size = param.data_ptr(), param.numel() * param.element_size()
    return first <= tensor.data_ptr() < first + size
