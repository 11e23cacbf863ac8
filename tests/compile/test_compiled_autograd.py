"""Compiled autograd: the backward pass is a graph too, and our hooks are called from it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compiled import WARNINGS, Iteration, Run, dynamo, lr_of, needs_compiler, play, small  # noqa: F401 - the fixture
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from twins import assert_bit_equal, assert_close, loss_of, weights, zero

needs_compiled_autograd = pytest.mark.skipif(
    not hasattr(compiled_autograd, "_enable"),
    reason="in this torch compiled autograd calls all hooks after all accumulations",
)
pytestmark = [*WARNINGS, needs_compiled_autograd, pytest.mark.usefixtures("dynamo")]
DECAYED = len(weights(small()))


def loop(
    backend: str,
    micro: int,
    to_none: bool,
    skips: bool,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Iteration:
    """Backward passes as graphs; with `skips` every third step is skipped, its gradients zeroed
    all the same."""

    def iteration(i: int, batch: Tensor) -> None:
        if i % micro == 0:
            zero(model, to_none)
        loss = loss_of(model, batch)
        with compiled_autograd._enable(torch.compile(backend=backend)):
            loss.backward()
        if i % micro == micro - 1 and not (skips and i // micro % 3 == 1):
            optimizer.step()

    return iteration


def pair(at: str, backend: str, micro: int, to_none: bool, skips: bool) -> tuple[Run, Run]:
    """Ours, and torch.optim's own decay, in float64."""
    options = {"make": partial(small, torch.float64), "micro": micro, "steps": 8}
    iterate = partial(loop, backend, micro, to_none, skips)
    ours, expected = (play(iterate, "coupled", moment, **options) for moment in (at, None))
    return ours, expected


def test_at_step() -> None:
    """Bit-equal; after the first step, until which a few hooks watch, nothing is compiled anew."""
    ours, expected = pair("step", "aot_eager", 2, True, True)
    assert_bit_equal(ours.state, expected.state)
    ours.assert_settled(after=4)


@pytest.mark.parametrize(
    ("backend", "micro", "to_none", "skips"),
    [
        ("eager", 1, True, False),
        ("eager", 2, False, True),
        ("aot_eager", 2, False, True),  # this backend changes a gradient twice to add to it
        pytest.param("inductor", 2, False, True, marks=needs_compiler),
    ],
)
def test_in_the_backward(backend: str, micro: int, to_none: bool, skips: bool) -> None:
    """Once per step in every kind of loop; one graph break for each decayed parameter, and nothing
    later."""
    ours, expected = pair("backward", backend, micro, to_none, skips)
    if micro == 1:
        assert_bit_equal(ours.state, expected.state)
    else:
        assert_close(
            ours.state, expected.state, 1e-13
        )  # another order of additions in float64, values below 10
    captures = 1 if to_none and micro == 1 else 2  # a first gradient is taken, a further one added
    assert ours.last.graphs <= expected.last.graphs + captures * DECAYED
    ours.assert_settled(after=2)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "compiled_autograd"), reason="this torch has no such switch"
)
@pytest.mark.parametrize("at", ["backward", "step"])
def test_switched_on_for_a_compiled_function(at: str) -> None:
    """`torch._dynamo.config.compiled_autograd`: forward, backward and step in one compiled
    function."""

    def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iteration:
        @torch.compile(backend="aot_eager")
        def iterate(batch: Tensor) -> None:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

        return lambda i, batch: iterate(batch)

    with torch._dynamo.config.patch(compiled_autograd=True):
        ours, expected = (
            play(everything, "coupled", moment, make=small, **lr_of(True)) for moment in (at, None)
        )
    assert_bit_equal(ours.state, expected.state)
    ours.assert_settled(after=2)
