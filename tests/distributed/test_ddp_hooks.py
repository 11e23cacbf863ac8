"""Communication hooks of DistributedDataParallel: compressed, local and overlapped averaging."""

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
from torch import Tensor, nn
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
    weights,
    λ,
)

import wdhook

SGD = torch.optim.SGD


def compressed(mode: str, at: str, off: float = 1.0) -> None:
    """In a worker: raise unless the decay is what one process computes that compresses each rank's gradients."""
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
    """At "backward" coupled decay is rounded with the gradient that it is in; all other decay stays exact."""
    two(compressed, mode, at)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(two: Group, mode: str, at: str) -> None:
    """A λ that is ten percent too large is more than half precision hides."""
    with pytest.raises(AssertionError, match="differs by up to"):
        two(compressed, mode, at, 1.1)


def power_sgd(mode: str, at: str, off: float = 1.0) -> None:
    """In a worker: raise unless wdhook does what a penalty in the loss ("backward") or the optimizer's decay does."""
    models = twins(perceptron(torch.float64))
    penalised = (mode, at) == MOMENTS[0]
    for model, own in zip(models, (0.0, λ), strict=True):
        optimizer = optimizer_of(model, mode, 0.0 if penalised else own)
        decay = (
            None if own else wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer)
        )
        ddp = DistributedDataParallel(model)
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.1)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        penalty = λ / 2 if own and penalised else 0.0
        play(
            [ddp],
            [optimizer],
            [dist.get_rank()],
            Loop(steps=6),
            backward=with_penalty(model, penalty),
        )
        if decay is not None:
            decay.remove()
        assert_ranks_agree(model.state_dict())
    # The penalty sums in another order: some roundings of 1e-16 in each of 6 steps, and rank-1 approximations of
    # matrices whose largest singular value is well separated enlarge them by less than a hundred.
    assert_close(models[0].state_dict(), models[1].state_dict(), 1e-12 if penalised else 0.0)


def with_penalty(model: nn.Module, half: float) -> Any:
    """What calls backward() on the loss, and adds `half` times the squared norm of the weights to it."""
    return lambda loss: (loss + half * sum(w.square().sum() for w in weights(model))).backward()


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_power_sgd(two: Group, mode: str, at: str) -> None:
    """Low-rank compression: coupled at "backward" is a penalty in the compressed loss; all other decay is exact."""
    two(power_sgd, mode, at)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_power_sgd_can_fail(two: Group, mode: str, at: str) -> None:
    """One part in a million of λ is seen."""
    with pytest.raises(AssertionError, match="differs by"):
        two(power_sgd, mode, at, 1 + 1e-6)


def held_back(steps: int) -> tuple[float, float]:
    """In a worker: train on nothing but decay, and return the norms of what was asked for and what is in the memory."""
    model = nn.Linear(20, 16, bias=False, dtype=torch.float64)
    before = model.weight.detach().clone()
    ddp = DistributedDataParallel(model)
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.1)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = SGD(model.parameters(), lr=LR)
    asked = torch.zeros_like(before)
    with wdhook.attach(model, λ):
        for _ in range(steps):
            asked += λ * model.weight.detach()
            optimizer.zero_grad()
            (ddp(torch.ones(1, 20, dtype=torch.float64)) * 0).sum().backward()
            optimizer.step()
    (memory,) = state.error_dict.values()
    arrived = (before - model.weight.detach()) / LR
    # Float64: at most 200 additions of numbers below 1.
    assert_close({"decay": asked}, {"decay": arrived + memory.view_as(arrived)}, 1e-12)
    return asked.norm().item(), memory.norm().item()


def test_power_sgd_delays_coupled_decay(two: Group) -> None:
    """At "backward" compression loses no decay: what has not arrived is in the error memory, and comes later."""
    early, late = two(held_back, 6)[0], two(held_back, 100)[0]
    assert early[1] > 0.3 * early[0]  # of six steps, a third at least is still to come
    assert late[1] < 0.1 * late[0]


def local_sgd(mode: str, at: str, off: float = 1.0) -> None:
    """In a worker: two steps with averaged gradients, then local steps; their results are averaged every other time."""
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
    # Coupled at "backward" sums in another order: some roundings of 1e-16 in each of 7 steps with momentum.
    assert_close(
        models[0].state_dict(), models[1].state_dict(), 1e-13 if (mode, at) == MOMENTS[0] else 0.0
    )


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_local_sgd(two: Group, mode: str, at: str) -> None:
    """`PostLocalSGDOptimizer`: each local step decays once, and so does what is averaged."""
    two(local_sgd, mode, at)


def test_local_sgd_can_fail(two: Group) -> None:
    """One part in a million of λ is seen."""
    with pytest.raises(AssertionError, match="differs by"):
        two(local_sgd, *MOMENTS[0], 1 + 1e-6)


def overlapped(mode: str, at: str, expected: float, to_none: bool = True) -> None:
    """In a worker: DistributedDataParallel steps in its communication hook, with an optimizer that nobody hears."""
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
    """`_register_fused_optim`: coupled decay at "backward" travels in the bucket that is stepped, once per step."""
    two(overlapped, *MOMENTS[0], λ, to_none)
    with pytest.raises(AssertionError, match="differs by"):
        two(overlapped, *MOMENTS[0], λ * (1 + 1e-6), to_none)


def test_an_optimizer_in_the_communication_hook_is_never_heard(two: Group) -> None:
    """The other moments cannot work: decoupled at "backward" warns; at "step" there is no step, and so no decay."""
    with pytest.raises(AssertionError, match="WdhookWarning: A parameter got a second gradient"):
        two(overlapped, "decoupled", "backward", λ)
    two(overlapped, "coupled", "step", 0.0)
    two(overlapped, "decoupled", "step", 0.0)
