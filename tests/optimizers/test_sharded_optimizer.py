"""Optimizer state that is sharded: `ZeroRedundancyOptimizer`, in which each rank steps a part of
the parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distributed import (
    MOMENTS,
    Loop,
    assert_ranks_agree,
    local_batch,
    optimizer_of,
    play,
    play_alone,
)
from processes import Group
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, perceptron, λ

import wdhook

ADAMW = {"optimizer_class": torch.optim.AdamW, "lr": LR}
SGD = {"optimizer_class": torch.optim.SGD, "lr": LR, "momentum": 0.9}


def sharded(model: nn.Module, mode: str, weight_decay: float = 0.0, views: bool = False) -> Any:
    """The sharded twin of `distributed.optimizer_of`."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not on top: its import warns

    groups = own_groups(model, weight_decay)
    return ZeroRedundancyOptimizer(
        groups, parameters_as_bucket_view=views, **(SGD if mode == "coupled" else ADAMW)
    )


class Scheduled:
    """An optimizer whose learning rate is halved after each step."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()


def check_sharded(
    mode: str,
    at: str,
    loop: Loop,
    views: bool = False,
    off: float = 1.0,
    wrap: Any = lambda optimizer: optimizer,
) -> str:
    """In a worker: raise unless copies in one process, which shard nothing, end with the same
    parameters."""
    first = perceptron()
    by_hand = λ if (mode, at) == MOMENTS[0] else 0.0
    alone = play_alone(
        first, lambda m: wrap(optimizer_of(m, mode, 0.0 if by_hand else λ)), loop, by_hand
    )
    model = copy.deepcopy(first)
    optimizer = sharded(model, mode, views=views)
    with wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer) as decay:
        play([DistributedDataParallel(model)], [wrap(optimizer)], [dist.get_rank()], loop)
        life = repr(decay)
    assert_ranks_agree(model.state_dict())
    if dist.get_world_size() == 2:  # a sum of two has one order
        assert_bit_equal(model.state_dict(), alone.state_dict())
    else:
        own = copy.deepcopy(first)
        play(
            [DistributedDataParallel(own)],
            [wrap(optimizer_of(own, mode, λ))],
            [dist.get_rank()],
            loop,
        )
        assert_bit_equal(model.state_dict(), own.state_dict())
    return life


@pytest.mark.parametrize("views", [False, True], ids=["tensors", "views"])
@pytest.mark.parametrize(
    "loop",
    [
        Loop(clip=0.3),
        Loop(to_none=False),
        Loop(micro=2, skipped=(1,)),
        Loop(micro=2, sync_each=True, to_none=False),
    ],
    ids=["clipped", "in place", "no_sync", "synchronised each time"],
)
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_each_rank_decays_what_it_steps(
    two: Group, mode: str, at: str, loop: Loop, views: bool
) -> None:
    """The optimizer inside steps a shard, and the wrapper sends it to the others: each parameter
    is decayed once."""
    if (mode, at) == ("decoupled", "backward") and loop.micro > 1:
        loop = Loop(clip=0.1)  # a second backward pass needs at="step", as its warning says
    two(check_sharded, mode, at, loop, views)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(two: Group, mode: str, at: str) -> None:
    """A λ that is wrong by one percent is seen."""
    with pytest.raises(AssertionError, match="differs by up to"):
        two(check_sharded, mode, at, Loop(), False, 1.01)


@pytest.mark.parametrize(("mode", "at"), MOMENTS[1:])
def test_four_processes(four: Group, mode: str, at: str) -> None:
    """Some ranks own no decayed parameter, and that changes nothing."""
    four(check_sharded, mode, at, Loop(clip=0.3))


@pytest.mark.parametrize(("mode", "at"), MOMENTS, ids=["-".join(m) for m in MOMENTS])
def test_a_schedule(two: Group, mode: str, at: str) -> None:
    """The learning rate of the decay is the one that the schedule has set, not the last one that
    the shard has seen."""
    two(check_sharded, mode, at, Loop(), False, 1.0, Scheduled)


def test_steps_are_counted_once(two: Group) -> None:
    """A step of the wrapper, with the step inside, is one."""
    assert all("steps=4" in life for life in two(check_sharded, "coupled", "step", Loop()))


def refused(load: bool) -> None:
    """In a worker: step with an optimizer that decays, as constructed or as a checkpoint has
    brought it back."""
    model = perceptron()
    optimizer = sharded(model, "decoupled", 0.0 if load else 0.01)
    if load:
        other = sharded(copy.deepcopy(model), "decoupled", 0.01)
        other.consolidate_state_dict(to=0)
        states = [other.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(states, src=0)
        optimizer.load_state_dict(states[0])
    before = copy.deepcopy(model.state_dict())
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        loss_of(DistributedDataParallel(model), local_batch(batches(model, 1)[0])).backward()
        try:
            optimizer.step()
        finally:
            assert_bit_equal(model.state_dict(), before)


@pytest.mark.parametrize("load", [False, True], ids=["constructed", "loaded"])
def test_the_guard(two: Group, load: bool) -> None:
    """Every rank refuses a step in which the sharded optimizer decays too, also after
    `load_state_dict`."""
    with pytest.raises(
        AssertionError, match=r"(?s)rank 0:.*DoubleDecayError.*'weight_decay'\] = 0.01"
    ) as failure:
        two(refused, load)
    assert str(failure.value).count("wdhook._base.errors.DoubleDecayError: ") == 2


def adopted() -> None:
    """In a worker: take over the decay of a sharded optimizer."""
    model, twin = perceptron(), perceptron()
    optimizer = sharded(model, "decoupled", λ)
    with wdhook.adopt(model, optimizer, mode="decoupled"):
        play([DistributedDataParallel(model)], [optimizer], [dist.get_rank()], Loop(micro=2))
    play(
        [DistributedDataParallel(twin)],
        [sharded(twin, "decoupled", λ)],
        [dist.get_rank()],
        Loop(micro=2),
    )
    assert_ranks_agree(model.state_dict())
    assert_bit_equal(model.state_dict(), twin.state_dict())
    assert not any(
        group["weight_decay"] for group in (*optimizer.param_groups, *optimizer.optim.param_groups)
    )


def test_adopt(two: Group) -> None:
    """`adopt` takes the decay out of the wrapper and of the optimizer inside."""
    two(adopted)
