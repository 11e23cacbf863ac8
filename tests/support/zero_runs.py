"""Short trainings with DeepSpeed, in the processes of a `Group`: with wdhook, or with the engine's
own decay."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from twins import assert_bit_equal, perceptron, weights

import wdhook

λ = 0.1
LR = 2.0**-6  # a power of two: lr · (λ/lr) is λ to the last bit


@dataclass(frozen=True)
class Cell:
    """In what the trainings differ."""

    stage: int
    mode: str = "decoupled"
    micro: int = 1  # micro-batches for each step
    clip: float = 0.0
    dtype: str = "fp32"
    offload: bool = False
    frozen: bool = False  # a frozen layer, and one that no loss depends on
    split: bool = False  # weights and others in a param group each
    before: bool = False  # attached before `deepspeed.initialize`
    wrapper: bool = False  # attached to the engine, not to its module
    given: str = ""  # the optimizer that `attach` is given: "base" or "engine"; none
    steps: int = 6
    at: str = "step"


class WithUnused(nn.Module):
    """A perceptron whose first layer is frozen, beside a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.body[0].requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def ready() -> Any:
    """DeepSpeed, in a process that has met the others."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_SIZE=size)
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    logging.disable(logging.WARNING)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # float16 is slow on CPUs, and DeepSpeed does not offer it there; the loss scaling is the same
    # everywhere.
    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def settings(cell: Cell) -> dict[str, Any]:
    """The DeepSpeed config of a cell."""
    zero: dict[str, Any] = {"stage": cell.stage}
    if cell.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": cell.micro,
        "gradient_clipping": cell.clip,  # 1.0 unless it is said
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if cell.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if cell.dtype == "fp16":  # the first scales overflow, and their steps are skipped
        config["fp16"] = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}
    return config


def groups_of(model: nn.Module, cell: Cell, own: float) -> list[dict[str, Any]]:
    """Param groups; the weights decay by `own`."""
    decayed = {id(p) for p in weights(model) if p.requires_grad}
    every = [p for p in model.parameters() if p.requires_grad]
    if not own and not cell.split:
        return [{"params": every}]
    return [
        {"params": [p for p in every if id(p) in decayed], "weight_decay": own},
        {"params": [p for p in every if id(p) not in decayed]},
    ]


class Run:
    """One engine, with wdhook or with its own decay, and the loop."""

    def __init__(self, cell: Cell, own: bool, weight_decay: Any = λ) -> None:
        deepspeed = ready()
        self.cell = cell
        self.decay: wdhook.WeightDecay | None = None
        model = WithUnused() if cell.frozen else perceptron()
        kind = torch.optim.Adam if cell.mode == "coupled" else torch.optim.AdamW
        share = λ / LR if cell.mode == "independent" else λ
        optimizer = kind(groups_of(model, cell, share if own else 0.0), lr=LR, weight_decay=0.0)
        arguments: Any = {"mode": cell.mode, "at": cell.at}
        if cell.given == "base":
            arguments["optimizer"] = optimizer
        if cell.before and not own:
            self.decay = wdhook.attach(model, weight_decay, **arguments)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(cell), dist_init_required=False
        )
        if not cell.before and not own:
            if cell.given == "engine":
                arguments["optimizer"] = self.engine.optimizer
            target = self.engine if cell.wrapper else self.engine.module
            self.decay = wdhook.attach(target, weight_decay, **arguments)
        self.model = model
        self.generator = torch.Generator().manual_seed(10 + dist.get_rank())

    def train(self, steps: int, after: Callable[[int], None] = lambda step: None) -> Run:
        """Take steps, each of `cell.micro` micro-batches."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.cell.dtype, torch.float32)
        for step in range(steps):
            for _ in range(self.cell.micro):
                batch = torch.randn(4, 4, generator=self.generator)
                loss = (self.engine(batch.to(dtype)) - 1).float().square().mean()
                self.engine.backward(loss)
                self.engine.step()
            after(step)
        return self

    def state(self) -> dict[str, Tensor]:
        """The float32 values of every parameter."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, param in self.model.named_parameters():
            whole = safe_get_full_fp32_param(param) if param.requires_grad else None
            if whole is not None:
                found[name] = whole.detach().clone().flatten()
        return found

    def close(self) -> None:
        """End the engine and the handle."""
        if self.decay is not None:
            self.decay.remove()
        self.engine.destroy()


def final(cell: Cell, own: bool) -> tuple[dict[str, Tensor], int, str]:
    """Values after a training, the number of steps that were skipped, and the handle."""
    run = Run(cell, own).train(cell.steps)
    result = run.state(), run.engine.skipped_steps, repr(run.decay)
    run.close()
    return result


def compare(cell: Cell) -> tuple[int, str]:
    """Raise unless wdhook and the engine's own decay end with the same bits, and no decay with
    others.

    Returns:
        The number of skipped steps, and the handle.
    """
    theirs, skipped, _ = final(cell, own=True)
    ours, _, handle = final(cell, own=False)
    assert_bit_equal(theirs, ours)
    return skipped, handle


def refusal(cell: Cell) -> str:
    """The error of a training that wdhook refuses, and the moment at which it comes."""
    moment, run = "attach", None
    try:
        run = Run(cell, own=False)
        moment = "training"
        run.train(1)
    except wdhook.MasterWeightsError as error:
        return f"{moment}: {error.rule}: {error}"
    finally:
        if run is not None:
            run.close()
    return "nothing"


def undecayed(cell: Cell) -> float:
    """The largest difference between a training with the engine's decay and one without any: the
    twin that fails."""
    theirs, *_ = final(cell, own=True)
    run = Run(cell, own=False)
    assert run.decay is not None
    run.decay.remove()
    run.train(cell.steps)
    bare = run.state()
    run.close()
    return max((theirs[name] - bare[name]).abs().max().item() for name in bare)


def resumed(cell: Cell, folder: str) -> tuple[str, list[float]]:
    """Raise unless a run that is saved and resumed goes on as one that was not interrupted.

    λ falls with the steps, and so does the learning rate. Every rank resumes with the state that
    rank 0 has saved.

    Returns:
        The resumed handle, and λ after each step of it.
    """

    def schedule(step: int) -> float:
        return λ / (1 + step)

    def fall(run: Run) -> Callable[[int], None]:
        def after(step: int) -> None:
            for group in run.engine.optimizer.param_groups:
                group["lr"] *= 0.5

        return after

    whole = Run(cell, own=False, weight_decay=schedule)
    whole.train(6, fall(whole))
    expected = whole.state()
    whole.close()
    first = Run(cell, own=False, weight_decay=schedule)
    first.train(3, fall(first))
    assert first.decay is not None
    first.engine.save_checkpoint(folder, client_state={"decay": first.decay.state_dict()})
    generator = first.generator
    first.close()
    second = Run(cell, own=False, weight_decay=schedule)
    _, client = second.engine.load_checkpoint(folder)
    assert second.decay is not None
    second.decay.load_state_dict(client["decay"])
    second.generator = generator
    seen = [second.decay.weight_decay]
    second.train(3, fall(second))
    seen.append(second.decay.weight_decay)
    handle = repr(second.decay)
    state = second.state()
    second.close()
    assert_bit_equal(expected, state)
    return handle, seen
