"""DistributedDataParallel: each rank decays its own gradients once, and all ranks hold the same
parameters.

Workers compare with two references that do not use wdhook: a copy for each rank in one process, and
DistributedDataParallel with the optimizer's own decay.
"""

from __future__ import annotations

import copy

import pytest
from distributed import MOMENTS, Loop, assert_ranks_agree, optimizer_of, play, play_alone
from processes import Group
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from twins import assert_bit_equal, perceptron, λ

import wdhook

WRAPPERS: dict[str, dict[str, bool]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}
ONE_PASS = {
    "clipped": Loop(clip=0.3),
    "zeroed in place": Loop(to_none=False),
}
LOOPS = {
    **ONE_PASS,
    "skipped": Loop(skipped=(1, 2)),
    "skipped, zeroed in place": Loop(skipped=(1, 2), to_none=False),
    "no_sync": Loop(micro=2, skipped=(1,)),
    "no_sync, zeroed in place": Loop(micro=2, skipped=(1,), to_none=False, clip=0.3),
    "synchronised each time": Loop(micro=2, sync_each=True, skipped=(1,)),
    "synchronised each time, zeroed in place": Loop(
        micro=2, sync_each=True, skipped=(1,), to_none=False, clip=0.3
    ),
}
CASES = [
    pytest.param(*moment, wrapper, loop, id="-".join((*moment, wrapper, loop)))
    for moment in MOMENTS
    for wrapper in WRAPPERS
    # Decoupled decay of a second backward pass needs at="step", as its warning says.
    for loop in (ONE_PASS if moment == ("decoupled", "backward") else LOOPS)
    # torch does not allow no_sync() with static_graph=True.
    if not ("static" in wrapper and "no_sync" in loop)
]


class Branching(nn.Module):
    """One of two heads, and the other in turn: what no rank uses in a step has no gradient
    there."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.heads = nn.ModuleList([perceptron(seed=1)[5], perceptron(seed=2)[5]])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.heads[self.calls % 2](self.body[:5](x))  # type: ignore[no-any-return]


def check_against_references(
    mode: str,
    at: str,
    wrapper: dict[str, bool],
    loop: Loop,
    attached: str = "before",
    off: float = 1.0,
) -> None:
    """In a worker: raise unless wdhook, copies in one process, and DDP with own decay end with the
    same parameters."""
    first = Branching() if "find_unused_parameters" in wrapper else perceptron()
    by_hand = λ if (mode, at) == ("coupled", "backward") else 0.0
    alone = play_alone(first, lambda m: optimizer_of(m, mode, 0.0 if by_hand else λ), loop, by_hand)
    model = copy.deepcopy(first)
    ddp = DistributedDataParallel(model, **wrapper) if attached == "after" else model
    optimizer = optimizer_of(model, mode, 0.0)
    with wdhook.attach(ddp, λ * off, mode=mode, at=at, optimizer=optimizer) as decay:
        ddp = (
            ddp
            if isinstance(ddp, DistributedDataParallel)
            else DistributedDataParallel(model, **wrapper)
        )
        play([ddp], [optimizer], [dist.get_rank()], loop)
        assert [d.reason for d in decay.plan.values()] == [
            d.reason for d in wdhook.plan(first, λ).values()
        ]
    assert_ranks_agree(model.state_dict())
    if dist.get_world_size() == 2:  # a sum of two has one order
        assert_bit_equal(model.state_dict(), alone.state_dict())
    if not by_hand:
        own = copy.deepcopy(first)
        play(
            [DistributedDataParallel(own, **wrapper)],
            [optimizer_of(own, mode, λ)],
            [dist.get_rank()],
            loop,
        )
        assert_bit_equal(model.state_dict(), own.state_dict())


@pytest.mark.parametrize(("mode", "at", "wrapper", "loop"), CASES)
def test_every_loop(two: Group, mode: str, at: str, wrapper: str, loop: str) -> None:
    """However gradients are averaged, kept and zeroed: bit for bit what one process computes, on
    every rank."""
    two(check_against_references, mode, at, WRAPPERS[wrapper], LOOPS[loop])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_attached_to_the_wrapper(two: Group, mode: str, at: str, wrapper: str) -> None:
    """Attached after wrapping, to the wrapper: the same decisions, selectors and parameters."""
    two(check_against_references, mode, at, WRAPPERS[wrapper], ONE_PASS["clipped"], "after")


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(two: Group, mode: str, at: str) -> None:
    """A λ that is wrong by one percent is seen."""
    with pytest.raises(AssertionError, match="differs by up to"):
        two(
            check_against_references,
            mode,
            at,
            {},
            LOOPS["no_sync" if at == "step" else "clipped"],
            "before",
            1.01,
        )


@pytest.mark.parametrize("wrapper", ["plain", "views", "unused"])
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_four_processes(four: Group, mode: str, at: str, wrapper: str) -> None:
    """More ranks change nothing; a sum of four has many orders, so only the wrapper itself is the
    reference."""
    two_passes = LOOPS["synchronised each time" if wrapper == "views" else "no_sync"]
    loop = ONE_PASS["clipped"] if (mode, at) == ("decoupled", "backward") else two_passes
    four(check_against_references, mode, at, WRAPPERS[wrapper], loop)
