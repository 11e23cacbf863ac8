"""The one door to private parts of torch. Nothing else in the package reads them.

Each has its reason here, and a test in tests/house/test_torch_private.py that fails when torch
changes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # imports torch._dynamo at the first call alone
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_F = TypeVar("_F", bound=Callable[..., Any])

OPTIMIZER_FILE = Optimizer.profile_hook_step.__code__.co_filename
"""The file of the wrapper that torch puts around every step: a frame of it is a step that runs."""


# Autograd --------------------------------------------------------------------------------------

graph_task_id: Callable[[], int] = torch._C._current_graph_task_id
"""Autograd has no other name for "this backward pass". -1 outside of one."""


def at_the_end_of_the_pass(call: Callable[[], None]) -> None:
    """Let autograd make a call when the present backward pass ends, after all others'.

    DistributedDataParallel and FSDP queue callbacks too, which write the gradients. A callback
    that is queued by a callback comes after them.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(partial(queue, call))  # no Python frame, which Dynamo would look at


def in_compiled_autograd() -> bool:
    """Tell that compiled autograd runs the backward pass: its region takes no callbacks."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def register_first(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a post-accumulate-grad hook that runs before the hooks which are there already.

    An optimizer that steps inside the backward pass does so in such a hook, and decay comes before
    the step.
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
    """Post-accumulate-grad hooks of a parameter that has some, or has had some."""
    return param._post_accumulate_grad_hooks


# Tensors ---------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int:
    """Count of in-place changes, which views share with their base; -1 for a tensor of inference
    mode."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def local_version(tensor: Tensor) -> int:
    """Version of the local shard of a DTensor, which counts apart; 0 for any other tensor."""
    local = getattr(tensor, "_local_tensor", None)
    return 0 if local is None else local._version


def is_view(tensor: Tensor) -> bool:
    """Tell a slice of another tensor: DDP's bucket, a flat buffer."""
    return tensor._is_view()


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that a view is a slice of."""
    return tensor._base


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Weak reference to the memory of a tensor; None where a tensor has none of its own.

    A weak reference to the tensor itself would stop `torch.utils.swap_tensors`.
    """
    local = getattr(tensor, "_local_tensor", tensor)
    try:
        return StorageWeakRef(local.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError, AttributeError, ValueError):
        return None


def is_storage_of(known: StorageWeakRef | None, tensor: Tensor) -> bool:
    """Tell whether the memory that a weak reference names is alive, and that of `tensor`."""
    if known is None or known.expired():  # type: ignore[no-untyped-call]
        return False
    local = getattr(tensor, "_local_tensor", tensor)
    return bool(known.cdata == local.untyped_storage()._cdata)


# Optimizers ------------------------------------------------------------------------------------


def step_pre_hooks(optimizer: Optimizer) -> dict[int, Any]:
    """The optimizer's own step pre-hooks, which torch runs after those of the process.

    torch has no public way to be the last of them.
    """
    return optimizer._optimizer_step_pre_hooks


def process_step_pre_hooks() -> dict[int, Any]:
    """The step pre-hooks of the process, in the order in which torch runs them."""
    from torch.optim import optimizer

    return optimizer._global_optimizer_pre_hooks


# Compilation -----------------------------------------------------------------------------------


def never_compiled(function: _F) -> _F:
    """`torch.compiler.disable` at no cost for each call, and without an import of torch._dynamo.

    A backward pass inside a compiled function would compile the hook anew for each shape of
    parameter.
    Compiled autograd and a compiled step would inline what they call, with guards on windows and λ.
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
    """Tell a DistributedDataParallel module whose communication hook steps an optimizer.

    The hooks of torch.distributed.algorithms that do so have "optimizer" in their names.
    """
    hooks = getattr(replica, "_comm_hooks", ())
    return any("optimizer" in getattr(hook, "__qualname__", "") for hook, *_ in hooks)


# Pipelines -------------------------------------------------------------------------------------


def pipeline_schedules() -> type[Any] | None:
    """The base class of torch's pipeline schedules, once something has imported them."""
    module = sys.modules.get("torch.distributed.pipelining.schedules")
    return getattr(module, "_PipelineSchedule", None)


def micro_batches(schedule: Any) -> int:
    """Number of micro-batches of a pipeline schedule."""
    return int(schedule._n_microbatches)


def stages(schedule: Any) -> Iterator[Any]:
    """The stages of a pipeline schedule: one, or several on one rank."""
    yield from getattr(schedule, "_stages", None) or [schedule._stage]
