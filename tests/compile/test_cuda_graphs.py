"""CUDA graphs replay kernels without any Python: what wdhook can know of that, and what it says.

Without a device a replay is played: gradients are written where the graph would write them,
without a hook and without a trace in their versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as without_trace
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, perceptron, twins, weights, λ

import wdhook
from wdhook._decay import steps as _step

SGD = torch.optim.SGD
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device"
)


@pytest.fixture
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that a graph could have written."""
    monkeypatch.setattr(_step, "may_be_replayed", lambda grad: True)


@pytest.mark.parametrize("on_cuda", [True, False])
def test_a_gradient_that_may_have_been_replayed(
    monkeypatch: pytest.MonkeyPatch, on_cuda: bool
) -> None:
    """Stepped twice as it is, a gradient holds its decay; a graph, `.data` or numpy may have
    refilled it, so there is a warning, once."""
    monkeypatch.setattr(_step, "may_be_replayed", lambda grad: on_cuda)
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, at="step"):
        loss_of(model, batches(model, 1)[0]).backward()
        optimizer.step()
        with pytest.warns(wdhook.WdhookWarning, match="CUDA graph"):
            optimizer.step()
        optimizer.step()


def replay(model: nn.Module, batch: Tensor, decays: str | None) -> None:
    """What a captured forward and backward does, with the hooks that ran in the capture."""
    params = list(model.parameters())
    decayed = {id(p) for p in weights(model)} if decays else set()
    grads = torch.autograd.grad(loss_of(model, batch), params)
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            with without_trace(param.grad):
                param.grad.copy_(grad)
                if id(param) in decayed and decays == "coupled":
                    param.grad.add_(param, alpha=λ)
            if id(param) in decayed and decays == "decoupled":
                with without_trace(param):
                    param.mul_(1 - LR * λ)


def unscale(model: nn.Module) -> None:
    """What a GradScaler does before a step: gradients change in place, seen."""
    torch._foreach_mul_([p.grad for p in model.parameters()], 1.0)


def play(
    mode: str, at: str | None, between: Callable[[nn.Module], None], schedule: bool = False
) -> dict[str, Tensor]:
    """Forward and backward captured once, the step outside of the graph."""
    model = perceptron()
    kind = SGD if mode == "coupled" else torch.optim.AdamW
    optimizer = kind(own_groups(model, 0.0 if at else λ), lr=LR)
    handle = (
        wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer)
        if at
        else contextlib.nullcontext()
    )
    with handle:
        first, *others = batches(model, 5)
        loss_of(model, first).backward()
        between(model)
        optimizer.step()
        for batch in others:
            replay(model, batch, mode if at == "backward" else None)
            between(model)
            optimizer.step()
        if schedule:
            handle.weight_decay = 2 * λ
    return model.state_dict()


def nothing(model: nn.Module) -> None:
    """No change between the replay and the step."""


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize(
    ("mode", "at", "between"),
    [
        ("coupled", "backward", nothing),
        ("coupled", "step", unscale),
        ("decoupled", "step", nothing),
        ("decoupled", "step", unscale),
    ],
)
def test_a_replayed_backward_that_works(mode: str, at: str, between: Any) -> None:
    """The decay is in the graph, or at each step: to the last bit that of torch.optim, and without
    a warning."""
    assert_bit_equal(play(mode, at, between), play(mode, None, between))


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize(
    ("mode", "at", "between", "message"),
    [
        ("coupled", "backward", unscale, "no backward pass has called its hook"),
        ("decoupled", "backward", nothing, "no backward pass has called its hook"),
        ("coupled", "step", nothing, "they are NOT decayed"),
    ],
)
def test_a_replayed_backward_that_does_not_work(
    mode: str, at: str, between: Any, message: str
) -> None:
    """The gradient tells too little: decayed twice or not at all, and a warning that names the
    moment that works."""
    with pytest.warns(wdhook.WdhookWarning, match=message):
        ours = play(mode, at, between)
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(ours, play(mode, None, between))


@pytest.mark.usefixtures("_on_cuda")
def test_a_schedule_of_a_replayed_backward() -> None:
    """λ is a constant in a captured backward pass: setting it later warns."""
    with pytest.warns(wdhook.WdhookWarning, match="after a CUDA graph was captured"):
        play("coupled", "backward", nothing, schedule=True)


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("to_none", [True, False])
def test_an_ordinary_loop_on_a_device_is_not_warned(to_none: bool) -> None:
    """Parameters without a part in a pass, clipping and a schedule of λ raise no such alarm."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ) as decay:
        for i, batch in enumerate(batches(model, 4)):
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model[:3] if i % 2 else model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay.weight_decay = λ / (i + 2)


class Graphed(torch.autograd.Function):
    """What `torch.cuda.make_graphed_callables` makes: gradients in static buffers, which it hands
    to autograd."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, weight: Tensor, static: Tensor) -> Tensor:
        ctx.save_for_backward(batch)
        ctx.static = static
        return batch @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        with without_trace(ctx.static):
            torch.matmul(grad.T, ctx.saved_tensors[0], out=ctx.static)
        return None, ctx.static.detach(), None


@pytest.mark.parametrize("at", ["backward", "step"])
def test_graphed_callables(at: str) -> None:
    """Autograd accumulates outside of the graphs, so hooks run as always, also where p.grad is the
    static buffer."""
    states = []
    for own in (0.0, λ):
        model = nn.Linear(4, 2, bias=False)
        nn.init.eye_(model.weight)
        static = torch.zeros(2, 4)
        optimizer = SGD(model.parameters(), lr=LR, weight_decay=own)
        with contextlib.nullcontext() if own else wdhook.attach(model, λ, at=at):
            for batch in batches(perceptron(), 5):
                optimizer.zero_grad()
                (Graphed.apply(batch, model.weight, static) - 1).square().mean().backward()
                optimizer.step()
        states.append(model.state_dict())
    assert_bit_equal(*states)


def test_a_schedule_after_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ is a constant in a captured step: setting it later warns, the same value does not."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, at="step") as decay:
        decay.weight_decay = 0.1
        monkeypatch.setattr(_step, "is_capturing", lambda: True)
        loss_of(model, batches(model, 1)[0]).backward()
        optimizer.step()
        decay.weight_decay = 0.1
        with pytest.warns(wdhook.WdhookWarning, match="after a CUDA graph was captured"):
            decay.weight_decay = 0.2


def warm_up(iterate: Callable[[], None]) -> None:
    """Three iterations on a stream of their own, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iterate()
    torch.cuda.current_stream().wait_stream(side)


@needs_cuda
@pytest.mark.parametrize(
    ("mode", "at"),
    [
        ("coupled", "backward"),
        ("coupled", "step"),
        ("decoupled", "backward"),
        ("decoupled", "step"),
    ],
)
def test_a_captured_iteration(mode: str, at: str) -> None:
    """Forward, backward and step in one graph: each replay decays once, as torch.optim's own decay
    does."""
    ends = []
    for own, model in zip((0.0, λ), twins(perceptron().cuda()), strict=True):
        options = {} if mode == "coupled" else {"capturable": True}
        optimizer = (SGD if mode == "coupled" else torch.optim.AdamW)(
            own_groups(model, own), lr=LR, **options
        )
        handle = (
            contextlib.nullcontext()
            if own
            else wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer)
        )
        inputs = [batch.cuda() for batch in batches(perceptron(), 6)]
        static = inputs[0].clone()

        def iterate(
            model: nn.Module = model, optimizer: Any = optimizer, static: Tensor = static
        ) -> None:
            optimizer.zero_grad()
            loss_of(model, static).backward()
            optimizer.step()

        with handle:
            warm_up(iterate)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iterate()
            for batch in inputs:
                static.copy_(batch)
                graph.replay()
        ends.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert_bit_equal(*ends)


@needs_cuda
def test_a_captured_backward_with_a_loss_scale() -> None:
    """Forward and backward in a graph, the GradScaler's step outside: decay at "step" is that of
    torch.optim."""
    ends = []
    for own, model in zip((0.0, λ), twins(perceptron().cuda()), strict=True):
        optimizer, scaler = (
            SGD(own_groups(model, own), lr=LR),
            torch.amp.GradScaler("cuda", init_scale=1024.0),
        )
        inputs = [batch.cuda() for batch in batches(perceptron(), 6)]
        static = inputs[0].clone()

        def back(
            model: nn.Module = model,
            optimizer: Any = optimizer,
            scaler: Any = scaler,
            x: Tensor = static,
        ) -> None:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x)).backward()

        with contextlib.nullcontext() if own else wdhook.attach(model, λ, at="step"):
            warm_up(back)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                back()
            for batch in inputs:
                static.copy_(batch)
                graph.replay()
                scaler.step(optimizer)
                scaler.update()
        ends.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert_bit_equal(*ends)


@needs_cuda
@pytest.mark.parametrize("at", ["backward", "step"])
def test_callables_graphed_on_a_device(at: str) -> None:
    """`torch.cuda.make_graphed_callables`, a replay each iteration: hooks run as without it."""
    ends = []
    for own, model in zip((0.0, λ), twins(perceptron().cuda()), strict=True):
        optimizer = SGD(own_groups(model, own), lr=LR)
        with contextlib.nullcontext() if own else wdhook.attach(model, λ, at=at):
            graphed = torch.cuda.make_graphed_callables(model, (torch.zeros(4, 4, device="cuda"),))
            for batch in batches(perceptron(), 6):
                optimizer.zero_grad()
                (graphed(batch.cuda()) - 1).square().mean().backward()
                optimizer.step()
        ends.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert_bit_equal(*ends)
