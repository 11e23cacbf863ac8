"""For tests of sharded models: a model that no number of ranks divides, a loop, its references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import LR, assert_bit_equal, assert_close, batches, loss_of, own_groups, weights, λ

import wdhook

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
needs_dtensor = pytest.mark.skipif(
    VERSION < (2, 6), reason="DTensor and fully_shard are public since torch 2.6"
)

STEPS = 4
WAYS = [("coupled", "backward"), ("coupled", "step"), ("decoupled", "step")]

# float64: a sum over ranks or micro-batches in another order differs by some units in the last
# place (2e-16) of numbers below 10, and 4 steps of learning rate 0.1 carry that on. AdamW divides
# by the root of its second moments, above 1e-5.
BOUND = 1e-10


def blocks(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Sizes that neither 2 nor 4 divides, and a head of one row: some shards of it are empty."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5)),
            nn.Sequential(nn.Linear(5, 5), nn.Tanh()),
            nn.Linear(5, 1),
        ).to(dtype)


def shard(model: nn.Module, **how: Any) -> nn.Module:
    """The first block by itself, the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], **how)
    return fully_shard(model, **how)


def shard_one(model: nn.Module, **how: Any) -> nn.Module:
    """One group of parameters."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, **how)


NORMS = {"norm": True}  # decayed too: the gradients of replicated parameters are partial sums


class Tower(nn.Module):
    """Layers that two ranks can split by columns, by rows, or by the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.mid = nn.Linear(8, 8)
        self.down = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(self.norm(self.up(x).tanh())).tanh())


def tower() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower().double()


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Hand-made param groups: `weights` and the norm decayed, biases not."""
    decayed = [*weights(model), model.norm.weight, model.norm.bias]
    ids = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": 0.0},
    ]


def parallel(style: str, mesh: Any, model: nn.Module) -> nn.Module:
    """Parallelise, in place."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    by_rows = RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False
    )
    sequence = {"up": by_rows, "norm": SequenceParallel(sequence_dim=0)}
    plans = {
        "columns and rows": {"mid": ColwiseParallel(), "down": RowwiseParallel()},
        "sequence": {
            **sequence,
            "mid": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(),
        },
        "replicated": {**sequence, "down": RowwiseParallel(input_layouts=Shard(0))},
    }
    parallelize_module(model, mesh, plans[style])
    if style == "replicated":
        distribute_module(
            model.mid, mesh
        )  # a weight of which each rank has the gradient of its rows alone
    return model


@dataclass(frozen=True)
class Loop:
    """A training loop; `skipped` are the steps that are not taken."""

    micro: int = 1
    sync_last: bool = False  # gradients are reduced with the last micro-batch only
    to_none: bool = True
    clip: float | None = None
    skipped: tuple[int, ...] = ()


LOOPS = {
    "plain": Loop(),
    "accumulated": Loop(micro=3),
    "accumulated, synchronised last, zeroed in place": Loop(micro=2, sync_last=True, to_none=False),
    "accumulated, synchronised last, clipped": Loop(micro=2, sync_last=True, clip=0.05),
    "skipped": Loop(skipped=(0, 2)),
    "skipped, zeroed in place": Loop(skipped=(1, 2), to_none=False),
    "skipped, accumulated, zeroed in place": Loop(micro=2, skipped=(1, 2), to_none=False),
}


def optimizer_of(mode: str, groups: Any, **how: Any) -> torch.optim.Optimizer:
    """An optimizer whose own decay has the formula of `mode`."""
    if mode == "coupled":
        return torch.optim.SGD(groups, lr=LR, momentum=0.9, **how)
    return torch.optim.AdamW(groups, lr=0.01, **how)


def everything(batch: Tensor) -> Tensor:
    """The part of a batch that a process on its own sees."""
    return batch


@dataclass(frozen=True)
class Trainer:
    """How a model is trained: the loop, and what depends on how it is sharded."""

    loop: Loop = Loop()
    part: Callable[[Tensor], Tensor] = everything  # of each batch, that this rank sees
    syncing: Callable[[nn.Module, bool], AbstractContextManager[Any]] = lambda model, sync: (
        nullcontext()
    )
    clip: Callable[[nn.Module, float], Any] = lambda model, norm: nn.utils.clip_grad_norm_(
        model.parameters(), norm
    )
    groups: Callable[[nn.Module, float], list[dict[str, Any]]] = own_groups

    def play(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        by_hand: Callable[[int], str] = lambda i: "",
    ) -> None:
        """Train.

        Args:
            by_hand: when to add λ·p to the gradients that have come into being in step i: after
                the "backward" that brings the first of them, before the "step", or never.
        """
        inputs = iter(batches(model, STEPS * self.loop.micro))
        for i in range(STEPS):
            optimizer.zero_grad(set_to_none=self.loop.to_none)
            moment = by_hand(i)
            for k in range(self.loop.micro):
                synced = k == self.loop.micro - 1 or not self.loop.sync_last
                with self.syncing(model, synced):
                    (loss_of(model, self.part(next(inputs))) / self.loop.micro).backward()
                if synced and moment == "backward":
                    moment = ""
                    self._add(model)
            if i in self.loop.skipped:
                continue
            if self.loop.clip is not None:
                self.clip(model, self.loop.clip)
            if moment == "step":
                self._add(model)
            optimizer.step()

    def _add(self, model: nn.Module) -> None:
        for group in self.groups(model, λ):
            for p in group["params"]:
                if group["weight_decay"] and p.grad is not None:
                    p.grad.add_(p.detach(), alpha=λ)

    def play_by_torch(self, model: nn.Module, mode: str) -> None:
        """Train without wdhook: the optimizer decays, at its step."""
        self.play(model, optimizer_of(mode, self.groups(model, λ)))

    def play_penalised(self, model: nn.Module, late: bool = False) -> None:
        """Train without wdhook: λ·p is added by hand after the first backward.

        Args:
            late: not so until a step was taken, but before that step: a handle whose hooks went
                with the parameters finds the new ones there.
        """
        first = next(i for i in range(STEPS) if i not in self.loop.skipped)
        optimizer = optimizer_of("coupled", self.groups(model, 0.0))
        self.play(model, optimizer, lambda i: "step" if late and i <= first else "backward")

    def play_attached(self, model: nn.Module, mode: str, **how: Any) -> None:
        """Train a model that a handle decays."""
        self.play(model, optimizer_of(mode, self.groups(model, 0.0), **how))


def play_scaled(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    part: Any,
    overflows: tuple[int, ...] = (),
) -> None:
    """Train with a scaled loss, which overflows on the first rank in some steps."""
    for i, batch in enumerate(batches(model, 6)):
        optimizer.zero_grad()
        loss = loss_of(model, part(batch))
        if i in overflows and torch.distributed.get_rank() == 0:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def reference(
    mode: str, at: str, make: Callable[[], nn.Module], trainer: Trainer, late: bool = False
) -> nn.Module:
    """A model trained without wdhook: by torch's decay, or by hand where torch's is elsewhere."""
    model = make()
    if (mode, at) == ("coupled", "backward"):
        trainer.play_penalised(model, late)
    else:
        trainer.play_by_torch(model, mode)
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, with what all ranks hold of it."""
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for name, param in model.named_parameters()
    }


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of every parameter."""
    return {
        name: (param.to_local() if hasattr(param, "to_local") else param).detach().clone()
        for name, param in model.named_parameters()
    }


def assert_same_shards(one: nn.Module, other: nn.Module) -> None:
    """Raise unless this rank holds the same of both models, to the last bit."""
    assert_bit_equal(local_state(one), local_state(other))


def assert_whole_is_close(sharded: nn.Module, alone: nn.Module, bound: float = BOUND) -> None:
    """Raise unless a sharded model is that of one process up to the order of its sums."""
    assert_close(whole_state(sharded), whole_state(alone), bound)


def reasons(plan: Mapping[str, wdhook.Decision]) -> list[tuple[Any, ...]]:
    """A plan without what sharding changes: prefixes of names, and shapes."""
    prefix = "_fsdp_wrapped_module."
    return [
        (name.replace(prefix, ""), d.role, d.reason, d.weight_decay, d.guess)
        for name, d in plan.items()
    ]


def assert_clean(model: nn.Module) -> None:
    """Raise if a hook of ours is left on some parameter."""
    for name, param in model.named_parameters():
        if getattr(param, "_post_accumulate_grad_hooks", None):
            raise AssertionError(f"a hook is left on {name}")


def attached(when: str, new: Any, make: Any, **how: Any) -> tuple[Any, wdhook.WeightDecay]:
    """A sharded model, and its handle of before or after."""
    model = new()
    if when == "before":
        handle = wdhook.attach(model, λ, **how)
    model = make(model)
    if when == "after":
        handle = wdhook.attach(model, λ, **how)
    return model, handle


def compare(
    mode: str,
    at: str,
    new: Callable[[], nn.Module],
    make: Callable[[nn.Module], nn.Module],
    trainer: Trainer,
    alone: Trainer | None,
    overrides: Any = None,
) -> nn.Module:
    """Raise unless handles from before and after sharding match torch's own decay; the last model.

    Args:
        new: a model on one process.
        make: shards it, and may replace its parameters, with which hooks go.
        alone: how one process trains it, if that can be compared.
    """
    for when in ("before", "after"):
        model, handle = attached(when, new, make, mode=mode, at=at, overrides=overrides)
        trainer.play_attached(model, mode)
        late = when == "before"
        assert_same_shards(model, reference(mode, at, lambda: make(new()), trainer, late))
        if alone is not None:
            assert_whole_is_close(model, reference(mode, at, new, alone, late))
        assert reasons(handle.plan) == reasons(wdhook.plan(new(), λ, overrides=overrides))
        handle.remove()
        assert_clean(model)
    return model


def assert_sees_decay(model: nn.Module) -> None:
    """Raise unless the comparison with an undecayed run fails: the twin of the comparisons."""
    undecayed = blocks()
    Trainer().play(undecayed, optimizer_of("coupled", own_groups(undecayed, 0.0)))
    try:
        assert_whole_is_close(model, undecayed, 1e-3)
    except AssertionError:
        return
    raise AssertionError("decay makes no difference")
