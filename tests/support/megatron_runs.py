"""Short trainings with Megatron-core, in the processes of a `Group`: with wdhook, or with the
engine's own decay."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.overrides import TorchFunctionMode
from twins import assert_bit_equal, batches, perceptron

import wdhook

λ = 0.1


@dataclass(frozen=True)
class Cell:
    """In what the trainings differ."""

    mode: str
    dtype: torch.dtype = torch.float32
    sharded: bool = False  # the distributed optimizer
    at: str = "step"
    clip: float = 0.0
    micro: int = 3


class _OnCpu(TorchFunctionMode):
    """Megatron-core makes its tensors on CUDA, and asks parameters for the names of their CUDA
    types."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with a device of the CPU."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return result.replace("torch.", "torch.cuda.")
        return result


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let Megatron-core run without a GPU."""
    device, wait = torch.cuda.current_device, torch.cuda.synchronize
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    try:
        with _OnCpu():
            yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = device, wait


def _engine(model: nn.Module, cell: Cell, own: bool) -> tuple[Any, Any]:
    """Megatron's wrapper of a model, and its optimizer."""
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    low = cell.dtype == torch.bfloat16
    shape = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=low)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=cell.sharded)
    wrapper = DistributedDataParallel(shape, ddp, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        weight_decay=λ if own else 0.0,
        bf16=low,
        params_dtype=cell.dtype,
        use_distributed_optimizer=cell.sharded,
        clip_grad=cell.clip,
        decoupled_weight_decay=cell.mode != "coupled",
    )
    optimizer = get_megatron_optimizer(config, [wrapper])
    for group in optimizer.param_groups:  # as Megatron's scheduler does
        group["weight_decay"] *= group["wd_mult"]
    return wrapper, optimizer


def train(cell: Cell, own: bool, attached: bool = True) -> tuple[dict[str, Tensor], str]:
    """Values after five steps, and the handle."""
    model = perceptron(cell.dtype)
    decay: Any = contextlib.nullcontext()
    with on_cpu():
        wrapper, optimizer = _engine(model, cell, own)
        if attached and not own:
            decay = wdhook.attach(wrapper, λ, mode=cell.mode, at=cell.at)  # type: ignore[arg-type]
        with decay:
            data = batches(model, 5 * cell.micro, seed=10 + dist.get_rank())
            for step in range(5):
                wrapper.zero_grad_buffer()
                optimizer.zero_grad()
                for batch in data[step * cell.micro : (step + 1) * cell.micro]:
                    (wrapper(batch) - 1).float().square().mean().backward()
                wrapper.finish_grad_sync()
                optimizer.step()
            said = repr(decay)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return state, said


def compare(cell: Cell) -> str:
    """Raise unless wdhook and the engine's own decay end with the same bits; the handle."""
    theirs, _ = train(cell, own=True)
    ours, handle = train(cell, own=False)
    assert_bit_equal(theirs, ours)
    return handle


def undecayed(cell: Cell) -> float:
    """The largest difference between the engine's decay and none: the twin that fails."""
    theirs, _ = train(cell, own=True)
    bare, _ = train(cell, own=False, attached=False)
    return max((theirs[name] - bare[name]).abs().max().item() for name in bare)


def refusal(cell: Cell) -> str:
    """The error of a training that wdhook refuses."""
    try:
        train(cell, own=False)
    except wdhook.MasterWeightsError as error:
        return f"{error.rule}: {error}"
    return "nothing"


def planned(cell: Cell) -> None:
    """Raise unless Megatron decays by a plan that it was given as `config_overrides`, and by
    nothing else."""
    model = perceptron(cell.dtype)
    plan = wdhook.plan(model, λ)
    with on_cpu():
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
        from megatron.core.transformer import TransformerConfig

        _engine(perceptron(), cell, own=True)  # the process groups
        shape = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        wrapper = DistributedDataParallel(shape, DistributedDataParallelConfig(), model)
        exempt = ParamWithNamePredicate(
            name="wdhook", fn=lambda param, name: name.removeprefix("module.") in plan.exempt
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=λ, clip_grad=0.0),
            [wrapper],
            config_overrides={ParamKey(with_name_predicate=exempt): {"wd_mult": 0.0}},
        )
    names = {id(param): name for name, param in model.named_parameters()}
    decayed = {
        names[id(param)]
        for group in optimizer.param_groups
        for param in group["params"]
        if group["wd_mult"]
    }
    assert decayed == set(plan.decayed)
