"""Communication hooks of DistributedDataParallel: compressed, local and overlapped averaging."""

from __future__ import annotations

import copy

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
from torch import Tensor
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from twins import (
    LR,
    assert_bit_equal,
    assert_close,
    batches,
    loss_of,
    own_groups,
    perceptron,
    twins,
    λ,
)

import wdhook

SGD = torch.optim.SGD


def compressed(mode: str, at: str, off: float = 1.0) -> None:
    """In a worker: raise unless the decay is what one process computes that compresses each rank's
    gradients."""
    first = perceptron()
    by_hand = λ if (mode, at) == MOMENTS[0] else 0.0
    loop = Loop(micro=1 if (mode, at) == MOMENTS[3] else 2)
    weight_decay = 0.0 if by_hand else λ
    alone = play_alone(
        first, lambda m: optimizer_of(m, mode, weight_decay), loop, by_hand, Tensor.half
    )
    model = copy.deepcopy(first)
    optimizer = optimizer_of(model, mode, 0.0)
    with wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer):
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        play([ddp], [optimizer], [dist.get_rank()], loop)
    assert_ranks_agree(model.state_dict())
    assert_bit_equal(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_compressed_to_half_precision(two: Group, mode: str, at: str) -> None:
    """Decay is added to the average after it was compressed, and stays exact."""
    two(compressed, mode, at)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(two: Group, mode: str, at: str) -> None:
    """A λ that is ten percent too large is more than half precision hides."""
    with pytest.raises(AssertionError, match="differs by up to"):
        two(compressed, mode, at, 1.1)


def power_sgd(mode: str, at: str, off: float = 1.0) -> None:
    """In a worker: raise unless wdhook does what the optimizer's own decay does."""
    models = twins(perceptron(torch.float64))
    for model, own in zip(models, (0.0, λ), strict=True):
        optimizer = optimizer_of(model, mode, own)
        decay = (
            None if own else wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer)
        )
        ddp = DistributedDataParallel(model)
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.1)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        play([ddp], [optimizer], [dist.get_rank()], Loop(steps=6))
        if decay is not None:
            decay.remove()
        assert_ranks_agree(model.state_dict())
    assert_bit_equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_power_sgd(two: Group, mode: str, at: str) -> None:
    """Low-rank compression: decay is added to what arrives, and is exact at both moments."""
    two(power_sgd, mode, at)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_power_sgd_can_fail(two: Group, mode: str, at: str) -> None:
    """One part in a million of λ is seen."""
    with pytest.raises(AssertionError, match="differs by"):
        two(power_sgd, mode, at, 1 + 1e-6)


def local_sgd(mode: str, at: str, off: float = 1.0) -> None:
    """In a worker: two steps with averaged gradients, then local steps; their results are averaged
    every other time."""
    from torch.distributed.optim import PostLocalSGDOptimizer  # not on top: its import warns

    models = twins(perceptron(torch.float64))
    subgroup, _ = dist.new_subgroups(group_size=1)
    for model, own in zip(models, (0.0, λ), strict=True):
        optimizer = optimizer_of(model, mode, own)
        decay = (
            None if own else wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer)
        )
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(
            PostLocalSGDState(None, subgroup, start_localSGD_iter=2), post_localSGD_hook
        )
        wrapper = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=2, warmup_steps=2))
        play([ddp], [wrapper], [dist.get_rank()], Loop(steps=7))
        if decay is not None:
            assert "steps=7" in repr(decay)
            decay.remove()
        assert_ranks_agree(model.state_dict())
    assert_bit_equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_local_sgd(two: Group, mode: str, at: str) -> None:
    """`PostLocalSGDOptimizer`: each local step decays once, and so does what is averaged."""
    two(local_sgd, mode, at)


def test_local_sgd_can_fail(two: Group) -> None:
    """One part in a million of λ is seen."""
    with pytest.raises(AssertionError, match="differs by"):
        two(local_sgd, *MOMENTS[0], 1 + 1e-6)


def overlapped(mode: str, at: str, expected: float, to_none: bool = True) -> None:
    """In a worker: DistributedDataParallel steps in its communication hook, with an optimizer that
    nobody hears."""
    model, twin = twins(perceptron(torch.float64))
    ddp, reference = DistributedDataParallel(model), DistributedDataParallel(twin)
    ddp._register_fused_optim(SGD, lr=LR)
    optimizer = SGD(own_groups(twin, expected), lr=LR)
    with wdhook.attach(model, λ, mode=mode, at=at, lr=LR if mode == "decoupled" else None):
        for batch in map(local_batch, batches(model, 4)):
            ddp.zero_grad(set_to_none=to_none)
            loss_of(ddp, batch).backward()
            reference.zero_grad()
            loss_of(reference, batch).backward()
            optimizer.step()
    assert_ranks_agree(model.state_dict())
    # Another order of sums: some roundings of 1e-16 in each of 4 steps.
    assert_close(model.state_dict(), twin.state_dict(), 1e-14)


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
def test_an_optimizer_in_the_communication_hook(two: Group, to_none: bool) -> None:
    """`_register_fused_optim`: coupled decay at "backward" travels in the bucket that is stepped,
    once per step."""
    two(overlapped, *MOMENTS[0], λ, to_none)
    with pytest.raises(AssertionError, match="differs by"):
        two(overlapped, *MOMENTS[0], λ * (1 + 1e-6), to_none)


def test_an_optimizer_in_the_communication_hook_is_never_heard(two: Group) -> None:
    """Decoupled at "backward" each pass is one gradient too many; at "step" no step comes: both
    are warned of."""
    with pytest.raises(AssertionError, match="WdhookWarning: A parameter got a second gradient"):
        two(overlapped, "decoupled", "backward", λ)
    for mode in ("coupled", "decoupled"):
        with pytest.raises(AssertionError, match="no optimizer step was announced"):
            two(overlapped, mode, "step", 0.0)
