"""The one door to private parts of torch. No other file of the package reads any.

Each has its reason here, and a test of its behaviour in tests/house/test_torch_private.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # imports torch._dynamo at the first call alone
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_F = TypeVar("_F", bound=Callable[..., Any])

OPTIMIZER_FILE = Optimizer.profile_hook_step.__code__.co_filename
"""The file of torch's wrapper around every step. A frame of the wrapper is a running step."""

STATE_MAKERS = frozenset({"_init_optim_state"})
"""Functions of torch.distributed.checkpoint with steps that only make a state."""

COMPILED_FROM = "_torchdynamo_orig_callable"
"""The attribute of a compiled function with the function before compilation."""


# Autograd --------------------------------------------------------------------------------------

graph_task_id: Callable[[], int] = torch._C._current_graph_task_id
"""Autograd's number of the present backward pass; -1 outside. There is no public name."""


def at_the_end_of_the_pass(call: Callable[[], None]) -> None:
    """Let autograd make a call at the end of the present backward pass, as the last one.

    DistributedDataParallel and FSDP queue callbacks too, which write the gradients. A callback that
    is queued by a callback comes after theirs.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(partial(queue, call))  # no Python frame, which Dynamo would look at


def in_compiled_autograd() -> bool:
    """Tell a backward pass of compiled autograd, which takes no callbacks."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def register_first(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a post-accumulate-grad hook before the hooks of others.

    An optimizer inside the backward pass steps in such a hook, and decay comes before the step.
    """
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    hooks: Any = param._post_accumulate_grad_hooks
    if len(hooks) > 1:
        # autograd walks the dict in the order of insertion, and has no public way to be first.
        *others, ours = list(hooks.items())
        hooks.clear()
        hooks.update([ours, *others])
    return handle


def hooks_of(param: Tensor) -> Mapping[int, Any]:
    """Post-accumulate-grad hooks of a parameter, in the order of the calls."""
    return param._post_accumulate_grad_hooks or {}


hooks_on = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
"""Both kinds of hooks of a parameter, in one call without a Python frame; None where there are
none. LOMO updates parameters in hooks on the gradients of other parameters."""


def has_hook(param: Tensor, handle: RemovableHandle) -> bool:
    """The post-accumulate hook of `handle` is one of this parameter."""
    return handle.id in (param._post_accumulate_grad_hooks or ())


# Tensors ---------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int:
    """Number of in-place changes, shared by views and base; -1 for a tensor of inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def versions(several: list[Tensor]) -> list[int]:
    """`version` of each tensor, without a Python frame for each."""
    try:
        return list(map(_version, several))
    except RuntimeError:
        return list(map(version, several))


_version = attrgetter("_version")


def local_version(tensor: Tensor) -> int:
    """Version of the local shard of a DTensor, with a count of its own; 0 for any other tensor."""
    local = getattr(tensor, "_local_tensor", None)
    return 0 if local is None else local._version


def is_view(tensor: Tensor) -> bool:
    """Tell a slice of another tensor: DDP's bucket, a flat buffer."""
    return tensor._is_view()


def sparse_values(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor, also with repeated indices, which `Tensor.values` refuses."""
    return tensor._values()


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Weak reference to the memory of a tensor; None for a tensor without memory.

    A weak reference to the tensor itself would stop `torch.utils.swap_tensors`.
    """
    local = getattr(tensor, "_local_tensor", tensor)
    try:
        return StorageWeakRef(local.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError, AttributeError, ValueError):
        return None


def is_storage_of(known: StorageWeakRef | None, tensor: Tensor) -> bool:
    """Tell the memory of `tensor` from any other, alive or freed."""
    if known is None or known.expired():  # type: ignore[no-untyped-call]
        return False
    local = getattr(tensor, "_local_tensor", tensor)
    return bool(known.cdata == local.untyped_storage()._cdata)


def is_part_of_flat_parameter(param: Tensor) -> bool:
    """Tell a parameter that FSDP1 shows as a part of its flat parameter (``use_orig_params``)."""
    return hasattr(param, "_fsdp_flattened")


# Optimizers ------------------------------------------------------------------------------------


def step_pre_hooks(optimizer: Optimizer) -> dict[int, Any]:
    """The optimizer's own step pre-hooks. torch runs the hooks of the process before.

    torch has no public way to be the last hook.
    """
    return optimizer._optimizer_step_pre_hooks


def step_post_hooks(optimizer: Optimizer) -> dict[int, Any]:
    """The optimizer's own step post-hooks. torch runs the hooks of the process after."""
    return optimizer._optimizer_step_post_hooks


def register_first_step_post_hook(
    optimizer: Optimizer, hook: Callable[..., None]
) -> RemovableHandle:
    """Register a step post-hook before the hooks of others, which may raise."""
    handle: RemovableHandle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle


def process_step_post_hooks() -> dict[int, Any]:
    """The step post-hooks of the process, in the order of the calls."""
    from torch.optim import optimizer

    return optimizer._global_optimizer_post_hooks


def process_step_pre_hooks() -> dict[int, Any]:
    """The step pre-hooks of the process, in the order of the calls."""
    from torch.optim import optimizer

    return optimizer._global_optimizer_pre_hooks


# Compilation -----------------------------------------------------------------------------------


def never_compiled(function: _F) -> _F:
    """`torch.compiler.disable` at no cost for each call, and without an import of torch._dynamo.

    A backward pass inside a compiled function would compile the hook for each shape of parameter.
    Compiled autograd and a compiled step would inline it, with guards on windows and λ.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    try:
        skip = dynamo._FrameAction.SKIP
        strategy = dynamo._FrameExecStrategy(skip, skip)  # the function and all that it calls
        dynamo.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:  # before torch 2.7
        return cast(_F, _disable_dynamo(function))
    vars(function)["_torchdynamo_disable"] = True
    vars(function)["_torchdynamo_disable_msg"] = (
        'wdhook decays in hooks, which run in Python; at="step" has none in the backward'
    )
    return function


# Distributed -----------------------------------------------------------------------------------


def steps_in_communication_hook(replica: Any) -> bool:
    """Tell a DistributedDataParallel module with an optimizer step in its communication hook.

    The hooks of torch.distributed.algorithms that do so have "optimizer" in their names.
    """
    hooks = getattr(replica, "_comm_hooks", ())
    return any("optimizer" in getattr(hook, "__qualname__", "") for hook, *_ in hooks)


# Pipelines -------------------------------------------------------------------------------------


def pipeline_schedules() -> type[Any] | None:
    """The base class of torch's pipeline schedules, once imported."""
    module = sys.modules.get("torch.distributed.pipelining.schedules")
    return getattr(module, "_PipelineSchedule", None)


def micro_batches(schedule: Any) -> int:
    """Number of micro-batches of a pipeline schedule."""
    return int(schedule._n_microbatches)


def stages(schedule: Any) -> Iterator[Any]:
    """The stages of a pipeline schedule: one, or several on one rank."""
    yield from getattr(schedule, "_stages", None) or [schedule._stage]
