"""CUDA graphs replay kernels without any Python: what wdhook can know of that, and what it says."""

from __future__ import annotations

import pytest
import torch
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, perceptron, twins, λ

import wdhook
from wdhook import _step

SGD = torch.optim.SGD
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")


@pytest.mark.parametrize("on_cuda", [True, False])
def test_a_gradient_that_may_have_been_replayed(monkeypatch: pytest.MonkeyPatch, on_cuda: bool) -> None:
    """Stepped twice as it is, a gradient holds its decay; where a graph may have refilled it, there is a warning."""
    monkeypatch.setattr(_step, "_may_be_replayed", lambda grad: on_cuda)
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, at="step"):
        loss_of(model, batches(model, 1)[0]).backward()
        optimizer.step()
        if on_cuda:
            with pytest.warns(wdhook.WdhookWarning, match="CUDA graph"):
                optimizer.step()
        optimizer.step()


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
        with pytest.warns(wdhook.WdhookWarning, match="captured in a CUDA graph"):
            decay.weight_decay = 0.2


@needs_cuda
@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_captured_iteration(at: str) -> None:
    """Forward, backward and step in one graph: each replay decays once, as torch.optim's own decay does."""
    ends = []
    for own, model in zip((0.0, λ), twins(perceptron().cuda()), strict=True):
        optimizer = SGD(own_groups(model, own), lr=LR)
        handle = None if own else wdhook.attach(model, λ, at=at)
        inputs = [batch.cuda() for batch in batches(perceptron(), 6)]
        static = inputs[0].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model, static).backward()
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss_of(model, static).backward()
            optimizer.step()
        for batch in inputs:
            static.copy_(batch)
            graph.replay()
        if handle is not None:
            handle.remove()
        ends.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert_bit_equal(*ends)
