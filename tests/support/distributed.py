"""One loop for the ranks and for their copies in one process; a check that ranks agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, weights, zero

MOMENTS = [
    ("coupled", "backward"),
    ("coupled", "step"),
    ("decoupled", "step"),
    ("decoupled", "backward"),
]


class Steps(Protocol):
    """An optimizer, or what calls one."""

    def step(self) -> object: ...


@dataclass(frozen=True)
class Loop:
    """In what training loops differ."""

    micro: int = 1  # batches for each step
    sync_each: bool = (
        False  # the gradients of every micro-batch are averaged, not only those of the last
    )
    to_none: bool = True
    skipped: tuple[int, ...] = ()  # steps that are not taken: their gradients are thrown away
    clip: float | None = None
    steps: int = 4


def local_batch(batch: Tensor, rank: int | None = None, world: int | None = None) -> Tensor:
    """The rows of `batch` that a rank (this one) sees; all ranks see equally many."""
    rank = dist.get_rank() if rank is None else rank
    return batch.chunk(world or dist.get_world_size())[rank]


def assert_ranks_agree(state: Mapping[str, Tensor]) -> None:
    """Raise unless every rank holds the same tensors to the last bit."""
    first = {name: tensor.detach().clone() for name, tensor in state.items()}
    for tensor in first.values():
        dist.broadcast(tensor, src=0)
    assert_bit_equal(first, state)


def optimizer_of(model: nn.Module, mode: str, weight_decay: float) -> torch.optim.Optimizer:
    """One that decays as `mode` says, if it decays at all."""
    groups = own_groups(model, weight_decay)
    kind: Any = torch.optim.SGD if mode == "coupled" else torch.optim.AdamW
    return kind(groups, lr=LR, **({"momentum": 0.9} if mode == "coupled" else {}))  # type: ignore[no-any-return]


def play(
    models: Sequence[nn.Module],
    optimizers: Sequence[Steps],
    ranks: Iterable[int],
    loop: Loop,
    after_backward: Callable[[bool, bool], None] = lambda first, synced: None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> None:
    """Train one model for each of `ranks`, on its own rows: that of this process, or all copies."""
    inputs = iter(batches(models[0], loop.steps * loop.micro))
    for step in range(loop.steps):
        for model in models:
            zero(model, loop.to_none)
        for k in range(loop.micro):
            synced = loop.sync_each or k == loop.micro - 1
            batch = next(inputs)
            for model, rank in zip(models, ranks, strict=True):
                with nullcontext() if synced or not hasattr(model, "no_sync") else model.no_sync():
                    backward(loss_of(model, local_batch(batch, rank)) / loop.micro)
            after_backward(k == 0, synced)
        if step not in loop.skipped:
            for model, optimizer in zip(models, optimizers, strict=True):
                if loop.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
                optimizer.step()


def play_alone(
    model: nn.Module,
    optimizer: Callable[[nn.Module], Steps],
    loop: Loop,
    λ: float = 0.0,
    compress: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> nn.Module:
    """What the ranks compute, in one process without communication: a copy for each, gradients
    averaged by hand.

    Args:
        λ: of coupled decay, added by hand at the end of each parameter's first backward pass, after
            averaging where that pass averages.
        compress: what a communication hook does to each rank's part of the average.
    """
    copies = [copy.deepcopy(model) for _ in range(dist.get_world_size())]
    decayed: set[nn.Parameter] = set()

    @torch.no_grad()
    def after_backward(first: bool, synced: bool) -> None:
        if first:
            decayed.clear()
        for twins in zip(*(m.parameters() for m in copies), strict=True) if synced else ():
            if any(p.grad is not None for p in twins):
                # divided before they are summed, as the reducer of DistributedDataParallel does
                parts = [
                    compress(torch.zeros_like(p) if p.grad is None else p.grad) / len(copies)
                    for p in twins
                ]
                for p in twins:
                    p.grad = sum(parts[1:], parts[0]).to(p.dtype, copy=True)
        for weight in (
            w for m in copies for w in weights(m) if λ and w.grad is not None and w not in decayed
        ):
            weight.grad.add_(weight, alpha=λ)
            decayed.add(weight)

    play(copies, [optimizer(m) for m in copies], range(len(copies)), loop, after_backward)
    for other in copies[1:]:
        assert_bit_equal(copies[0].state_dict(), other.state_dict())
    return copies[0]
