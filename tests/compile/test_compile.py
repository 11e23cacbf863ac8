"""torch.compile: the decay is the same, and no graph, graph break or recompilation is there
because of it."""

from __future__ import annotations

import subprocess
import sys
from functools import cache, partial
from typing import Any

import pytest
import torch
from compiled import WARNINGS, Iteration, Run, dynamo, each_case, lr_of, needs_compiler, play, small  # noqa: F401 - the fixture
from torch import Tensor, nn
from twins import LR, assert_bit_equal, batches, convnet, loss_of, perceptron, train, weights, λ

import wdhook

pytestmark = [*WARNINGS, pytest.mark.usefixtures("dynamo")]


def forward(backend: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iteration:
    """A forward in one graph, with two batch sizes, and validation in between."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def iteration(i: int, batch: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(compiled, batch if i % 4 else batch[:3]).backward()
        optimizer.step()
        if i % 4 == 1:
            model.eval()
            with torch.no_grad():
                compiled(batch)
            model.train()

    return iteration


def forward_and_backward(
    backend: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iteration:
    """A function that contains ``backward()``."""

    @torch.compile(backend=backend)
    def there_and_back(batch: Tensor) -> None:
        loss_of(model, batch).backward()

    def iteration(i: int, batch: Tensor) -> None:
        optimizer.zero_grad()
        there_and_back(batch)
        optimizer.step()

    return iteration


def everything(backend: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iteration:
    """A function that zeroes, goes forward and backward, and steps."""

    @torch.compile(backend=backend)
    def iterate(batch: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    return lambda i, batch: iterate(batch)


def step_alone(backend: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iteration:
    """``torch.compile(optimizer.step)``."""
    step = torch.compile(optimizer.step, backend=backend)

    def iteration(i: int, batch: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        step()

    return iteration


def step_with_closure(
    backend: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iteration:
    """A compiled function around a step whose closure makes the gradients."""

    @torch.compile(backend=backend)
    def step(batch: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    return lambda i, batch: step(batch)


@cache
def reference(
    loop: Any, backend: str, mode: str, make: Any = perceptron, tensor_lr: bool = False
) -> Run:
    """The same training, decayed by torch.optim."""
    return play(partial(loop, backend), mode, None, make=make, **lr_of(tensor_lr))


@pytest.mark.parametrize(
    ("mode", "at", "late", "backend", "make"),
    [
        ("coupled", "backward", False, "aot_eager", convnet),
        ("coupled", "step", True, "aot_eager", convnet),
        ("decoupled", "step", False, "aot_eager", convnet),
        pytest.param("coupled", "backward", True, "inductor", small, marks=needs_compiler),
    ],
)
def test_forward(mode: str, at: str, late: bool, backend: str, make: Any) -> None:
    """fullgraph=True, two batch sizes, train and eval: what Dynamo counts is what it counts
    without wdhook."""
    ours = play(partial(forward, backend), mode, at, make=make, late=late)
    expected = reference(forward, backend, mode, make)
    assert_bit_equal(ours.state, expected.state)
    assert ours.counts == expected.counts
    assert ours.last.breaks == 0


@each_case
def test_a_function_with_backward(mode: str, at: str) -> None:
    """The hooks run inside a compiled function, and Dynamo leaves them alone: the counts are those
    without wdhook."""
    ours = play(partial(forward_and_backward, "aot_eager"), mode, at)
    expected = reference(forward_and_backward, "aot_eager", mode)
    assert_bit_equal(ours.state, expected.state)
    assert ours.counts == expected.counts


def test_the_counts_can_differ() -> None:
    """A plain hook is compiled for each shape of parameter, and a decay that ignores the schedule
    is seen."""

    def decay(param: Tensor) -> None:
        param.grad.add_(param, alpha=λ)

    def hooked(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iteration:
        for param in weights(model):
            param.register_post_accumulate_grad_hook(decay)
        return forward_and_backward("aot_eager", model, optimizer)

    theirs, expected = (
        play(hooked, "coupled", None),
        reference(forward_and_backward, "aot_eager", "coupled"),
    )
    assert theirs.last.frames > expected.last.frames
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(theirs.state, expected.state)


@pytest.mark.parametrize(
    ("loop", "mode", "at"),
    [
        (everything, "coupled", "backward"),
        (everything, "coupled", "step"),
        (everything, "decoupled", "step"),
        (step_alone, "coupled", "backward"),
        (step_alone, "coupled", "step"),
        (step_alone, "decoupled", "step"),
        (step_with_closure, "coupled", "step"),
    ],
)
def test_a_compiled_step(loop: Any, mode: str, at: str) -> None:
    """No more graphs and breaks than without wdhook, lr being a tensor; no recompilation, though
    lr and λ change.

    torch.optim's own decay is compiled anew for each λ at first.
    """
    ours = play(partial(loop, "aot_eager"), mode, at, **lr_of(True))
    expected = reference(loop, "aot_eager", mode, tensor_lr=True)
    assert_bit_equal(ours.state, expected.state)
    assert ours.last.graphs <= expected.last.graphs
    assert ours.last.breaks <= expected.last.breaks
    ours.assert_settled(after=3)  # the first step makes the momentum, the second finds it


def test_a_compiled_step_with_a_number_as_lr() -> None:
    """The decay follows lr in a step that Dynamo has compiled with lr as a number."""
    ours = play(partial(step_alone, "aot_eager"), "decoupled", "step")
    expected = reference(step_alone, "aot_eager", "decoupled")
    assert_bit_equal(ours.state, expected.state)
    assert ours.last.graphs <= expected.last.graphs
    assert ours.last.breaks <= expected.last.breaks


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("how", ["wrapped", "wrapped_first", "in_place", "a_part"])
def test_names_and_hooks_of_a_compiled_module(how: str, at: str) -> None:
    """`torch.compile(model)` and `model.compile()`: overrides match the user's names, and decay
    happens once."""
    model, twin = perceptron(), perceptron()
    seen = model
    if how == "in_place":
        model.compile(backend="eager")
    elif how == "a_part":
        model[3] = torch.compile(model[3], backend="eager")
    else:
        seen = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with wdhook.attach(
        seen if how == "wrapped_first" else model, λ, at=at, overrides={"5.weight": 0.0}
    ) as decay:
        train(seen, optimizer, batches(model, 3))
        names = [name.replace("_orig_mod.", "") for name in decay.plan]
    assert names == [name for name, _ in twin.named_parameters()]
    rest = [p for p in twin.parameters() if p is not twin[0].weight and p is not twin[3].weight]
    groups = [
        {"params": [twin[0].weight, twin[3].weight], "weight_decay": λ},
        {"params": rest, "weight_decay": 0.0},
    ]
    train(twin, torch.optim.SGD(groups, lr=LR), batches(twin, 3))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_heavy_is_imported() -> None:
    """Neither `import wdhook` nor `attach` nor a backward pass imports torch._dynamo, which takes
    a second or two."""
    program = """
import sys, torch, wdhook
model = torch.nn.Linear(2, 1)
decay = wdhook.attach(model, 0.1)
if hasattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy"):
    model(torch.ones(1, 2)).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
