"""DistributedDataParallel where ranks differ, where losses are scaled, and what the decay costs;
DataParallel."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

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
from torch.nn.parallel import DataParallel, DistributedDataParallel
from twins import assert_bit_equal, assert_close, batches, loss_of, perceptron, train, twins, λ

import wdhook

SGD = torch.optim.SGD


def whole_batch(mode: str, at: str, loop: Loop, off: float = 1.0) -> None:
    """In a worker: raise unless the ranks together do what one process does with all rows of each
    batch."""
    model, twin = twins(perceptron(torch.float64))
    optimizer = optimizer_of(model, mode, 0.0)
    with wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer):
        play([DistributedDataParallel(model)], [optimizer], [dist.get_rank()], loop)
    assert_ranks_agree(model.state_dict())
    inputs = batches(twin, loop.steps * loop.micro)
    train(twin, optimizer_of(twin, mode, λ), inputs, micro=loop.micro, clip=loop.clip)
    # The same sums in another order: errors of some 1e-15 in float64 gradients between 3e-5 and 2.
    # Adam divides by
    # their size, so that a step of 0.1 errs by 1e-11 at most, and each of 4 steps passes on a few
    # times what it got.
    assert_close(model.state_dict(), twin.state_dict(), 1e-9)


@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize(("mode", "at"), MOMENTS[:3])
def test_the_whole_batch_in_one_process(
    request: pytest.FixtureRequest, world: str, mode: str, at: str
) -> None:
    """`torch.optim` with param groups, in one process on undivided batches, ends with the same
    parameters."""
    # Clipping comes before the optimizer's own decay, so it is compared at "step" only.
    loop = Loop(micro=2, sync_each=world == "four", clip=0.3 if at == "step" else None)
    request.getfixturevalue(world)(whole_batch, mode, at, loop)


@pytest.mark.parametrize(("mode", "at"), MOMENTS[:3])
def test_the_whole_batch_comparison_can_fail(two: Group, mode: str, at: str) -> None:
    """One part in a million of λ is seen."""
    with pytest.raises(AssertionError, match="differs by"):
        two(whole_batch, mode, at, Loop(), 1 + 1e-6)


class Scaled:
    """An optimizer that a GradScaler steps. The loss overflows in one step, in the last rank
    only."""

    def __init__(self, optimizer: torch.optim.Optimizer, overflow: int):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.optimizer = optimizer
        self.overflow = overflow
        self.calls = 0

    def backward(self, loss: Tensor) -> None:
        last = dist.get_rank() == dist.get_world_size() - 1
        self.scaler.scale(
            loss * (float("inf") if last and self.calls == self.overflow else 1.0)
        ).backward()
        self.calls += 1

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def scaled(mode: str, at: str, to_none: bool, views: bool) -> None:
    """In a worker: raise unless scaling changes no bit, and the step that overflowed in one rank
    is skipped in all."""
    first = perceptron()
    by_hand = λ if at == "backward" else 0.0
    loop = Loop(to_none=to_none)
    alone = play_alone(
        first,
        lambda m: optimizer_of(m, mode, 0.0 if by_hand else λ),
        Loop(skipped=(1,), to_none=to_none),
        by_hand,
    )
    model = copy.deepcopy(first)
    optimizer = optimizer_of(model, mode, 0.0)
    stepper = Scaled(optimizer, overflow=1)
    given = stepper.scaler if (mode, at) == ("coupled", "backward") else None
    with wdhook.attach(model, λ, mode=mode, at=at, scaler=given):
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=views)
        play([ddp], [stepper], [dist.get_rank()], loop, backward=stepper.backward)
    assert_ranks_agree(model.state_dict())
    assert_bit_equal(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize("views", [False, True], ids=["copies", "views"])
@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
@pytest.mark.parametrize(("mode", "at"), MOMENTS[:3])
def test_a_scaler(two: Group, mode: str, at: str, to_none: bool, views: bool) -> None:
    """An overflow in one rank skips the step of all; a scale that is a power of two changes no
    bit."""
    two(scaled, mode, at, to_none, views)


class Choosing(nn.Module):
    """A head for each rank, chosen by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.heads = nn.ModuleList([perceptron(seed=1)[5], perceptron(seed=2)[5]])

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](self.body[:5](x))  # type: ignore[no-any-return]


def ranks_differ(mode: str, at: str) -> None:
    """In a worker: each rank uses a head of its own, so that the other's gradient comes from the
    other rank alone."""
    models = twins(Choosing())
    for model, own in zip(models, (0.0, λ), strict=True):
        optimizer = optimizer_of(model, mode, own)
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        decay = None if own else wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer)
        for step in range(4):
            optimizer.zero_grad()
            batch = local_batch(batches(model.body, 4)[step])
            ddp(batch, (dist.get_rank() + step) % 2).square().mean().backward()
            optimizer.step()
        if decay is not None:
            decay.remove()
        assert_ranks_agree(model.state_dict())
    assert_bit_equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_ranks_that_use_different_parameters(two: Group, mode: str, at: str) -> None:
    """What only one rank has used is decayed once, and alike in both: decay is added after
    averaging."""
    two(ranks_differ, mode, at)


def uneven(mode: str, at: str, by_all: bool, off: float = 1.0) -> None:
    """In a worker: rank 1 has two batches less than rank 0, inside
    DistributedDataParallel.join()."""
    models = twins(perceptron(torch.float64))
    for model, own in zip(models, (0.0, λ), strict=True):
        optimizer = optimizer_of(model, mode, own)
        decay = (
            None if own else wdhook.attach(model, λ * off, mode=mode, at=at, optimizer=optimizer)
        )
        ddp = DistributedDataParallel(model)
        with ddp.join(divide_by_initial_world_size=by_all):
            for batch in batches(model, 4 - 2 * dist.get_rank()):
                optimizer.zero_grad()
                loss_of(ddp, local_batch(batch)).backward()
                optimizer.step()
        if decay is not None:
            decay.remove()
        assert_ranks_agree(model.state_dict())
    assert_bit_equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("by_all", [True, False])
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_uneven_inputs(two: Group, mode: str, at: str, by_all: bool) -> None:
    """With join() a rank that has run out of inputs changes nothing, whatever the gradients are
    divided by."""
    two(uneven, mode, at, by_all)


def test_uneven_inputs_can_fail(two: Group) -> None:
    """One part in a million of λ is seen."""
    with pytest.raises(AssertionError, match="differs by"):
        two(uneven, *MOMENTS[0], False, 1 + 1e-6)


def lone_weight(loop: Loop) -> None:
    """In a worker: a model with one decayed parameter, for which no other gradient can speak."""
    model = nn.Linear(4, 2)
    alone = play_alone(copy.deepcopy(model), lambda m: optimizer_of(m, "coupled", 0.0), loop, λ)
    with wdhook.attach(model, λ):
        play(
            [DistributedDataParallel(model)],
            [optimizer_of(model, "coupled", 0.0)],
            [dist.get_rank()],
            loop,
        )
    assert_bit_equal(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
def test_a_lone_weight(two: Group, to_none: bool) -> None:
    """One decayed parameter: right wherever the gradient tells enough, and a warning where it does
    not."""
    two(lone_weight, Loop(to_none=to_none))
    two(lone_weight, Loop(micro=2, skipped=(1,)))
    two(lone_weight, Loop(micro=2, sync_each=True))
    if to_none:
        return
    unclear = Loop(skipped=(1,), to_none=False)
    with pytest.raises(AssertionError, match="WdhookWarning: A gradient was changed in place"):
        two(lone_weight, unclear)


def collectives(moment: tuple[str, str] | None, micro: int, extra: bool = False) -> Counter[str]:
    """In a worker: what four steps, with `micro` synchronised backward passes each, say to other
    ranks."""
    model = perceptron()
    mode, at = moment or MOMENTS[0]
    optimizer = optimizer_of(model, mode, 0.0)
    decay = wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer)
    if moment is None:
        decay.remove()
    ddp = DistributedDataParallel(model)
    loop = Loop(micro=micro, sync_each=True, clip=0.3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        play([ddp], [optimizer], [dist.get_rank()], loop)
        if extra:
            dist.all_reduce(torch.ones(1))
    decay.remove()
    return Counter(
        event.name for event in profile.events() if event.name.startswith(("gloo:", "c10d::"))
    )


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_no_extra_collective(two: Group, mode: str, at: str) -> None:
    """Decay needs no word of the other ranks."""
    micro = 1 if (mode, at) == MOMENTS[3] else 2
    bare = two(collectives, None, micro)
    assert two(collectives, (mode, at), micro) == bare
    assert bare[0]["gloo:all_reduce"] == 4 * micro
    assert two(collectives, None, micro, True) != bare


@pytest.mark.parametrize("attached_to", ["wrapper", "module"])
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_data_parallel(mode: str, at: str, attached_to: str) -> None:
    """DataParallel (without a GPU it calls the module itself): attached to either, the same
    decisions and result."""
    model, twin = twins(perceptron())
    wrapper = DataParallel(model)
    optimizer = optimizer_of(model, mode, 0.0)
    to = wrapper if attached_to == "wrapper" else model
    with wdhook.attach(to, λ, mode=mode, at=at, optimizer=optimizer) as decay:
        train(wrapper, optimizer, batches(model, 5))
    train(twin, optimizer_of(twin, mode, λ), batches(twin, 5))
    assert_bit_equal(model.state_dict(), twin.state_dict())
    plans = [decay.plan, wdhook.plan(twin, λ)]
    assert (
        len(
            {
                tuple((n.removeprefix("module."), d.reason) for n, d in plan.items())
                for plan in plans
            }
        )
        == 1
    )


@pytest.mark.parametrize("wrapper", [DataParallel, lambda model: model], ids=["wrapped", "bare"])
def test_selectors_know_no_wrapper(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    """Names in `overrides` are those of the user's model, whatever it is wrapped in."""
    plan = wdhook.plan(wrapper(perceptron()), λ, overrides={"3.weight": 0.0})
    assert [name.removeprefix("module.") for name in plan.decayed] == ["0.weight", "5.weight"]
