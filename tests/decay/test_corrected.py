"""Corrected decay (AdamC): p ← p·(1 − λ·lr²/lr_peak), as timm's optimizers have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twins import (
    LR,
    assert_bit_equal,
    batches,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    weights,
    λ,
)

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
AT = pytest.mark.parametrize("at", ["backward", "step"])


def schedule(step: int) -> float:
    """A warm-up to 1, then down to 0.1."""
    return 0.25 * (step + 1) if step < 4 else max(0.1, 1 - 0.15 * (step - 3))


def scheduled(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train with the learning rate of `schedule`."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for batch in batches(model, steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()


@AT
@pytest.mark.parametrize("name", ["adamc", "nadamc", "lionc"])
def test_timm(name: str, at: str) -> None:
    """To the last bit what timm's corrected optimizers do: the peak is the constructor's lr in
    both."""
    optim = pytest.importorskip("timm.optim", reason="timm is not installed")

    def make(params: Any, weight_decay: float) -> Any:
        return optim.create_optimizer_v2(params, opt=name, lr=0.01, weight_decay=weight_decay)

    model, twin = twins(perceptron())
    optimizer = make([{"params": list(model.parameters())}], 0.0)
    with wdhook.attach(model, 2.0, mode="corrected", at=at, optimizer=optimizer):
        scheduled(model, optimizer, 12)
    scheduled(twin, make(own_groups(twin, 2.0), 2.0), 12)
    assert_bit_equal(model.state_dict(), twin.state_dict())
    undecayed = perceptron()
    scheduled(undecayed, make([{"params": list(undecayed.parameters())}], 0.0), 12)
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(model.state_dict(), undecayed.state_dict())


@pytest.mark.parametrize("name", ["adamc", "lionc"])
def test_adopt_takes_timms(name: str) -> None:
    """`adopt` takes corrected decay over where it is told so, and never guesses."""
    optim = pytest.importorskip("timm.optim", reason="timm is not installed")
    model, twin = twins(perceptron())

    def make(groups: Any) -> Any:
        return optim.create_optimizer_v2(groups, opt=name, lr=0.01, weight_decay=2.0)

    optimizer = make(own_groups(model, 2.0))
    with pytest.raises(wdhook.ArgumentError, match="corrected"):
        wdhook.adopt(model, optimizer)
    decay = wdhook.adopt(model, optimizer, mode="corrected")
    scheduled(model, optimizer, 8)
    scheduled(twin, make(own_groups(twin, 2.0)), 8)
    decay.remove()
    assert_bit_equal(model.state_dict(), twin.state_dict())


@AT
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("peak", ["initial_lr", "max_lr", "seen"])
def test_by_hand(peak: str, tensor: bool, at: str) -> None:
    """Against the formula in float64. The peak is the largest rate that the group or the run
    knows."""
    model, twin = twins(perceptron(torch.float64))
    wrap = (lambda x: torch.tensor(x, dtype=torch.float64)) if tensor else float
    optimizer = SGD(model.parameters(), lr=wrap(LR))
    group = optimizer.param_groups[0]
    top = {"initial_lr": 0.4, "max_lr": 0.8, "seen": 0.0}[peak]
    if top:
        group[peak] = top
    handle = wdhook.attach(model, λ, mode="corrected", at=at, optimizer=optimizer)
    for lr in (0.1, 0.2, 0.0, 0.05):
        group["lr"] = wrap(lr)
        top = max(top, lr)
        model.zero_grad()
        sum((p * 0).sum() for p in model.parameters()).backward()
        optimizer.step()
        for weight in weights(twin):
            weight.data *= 1 - λ * lr**2 / top
    handle.remove()
    # Four products, whose factors are rounded in another order: 2⁻⁵³ for each operation. A peak
    # that is a number in the group becomes a float32 tensor beside a tensor: 2⁻²⁴ of a decay below
    # λ.
    bound = 4 * λ * 2**-24 if tensor and peak != "seen" else 16 * 2**-53
    for one, other in zip(weights(model), weights(twin), strict=True):
        assert ((one - other).abs() <= bound * other.abs()).all()


def test_a_warm_up_that_starts_at_zero() -> None:
    """A peak of 0 decays nothing."""
    model, twin = twins(perceptron())
    optimizer = SGD(model.parameters(), lr=0.0)
    with wdhook.attach(model, λ, mode="corrected", at="step"):
        train(model, optimizer, batches(model, 1))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_a_resume_keeps_the_peak() -> None:
    """The peak is in the state: without it the decay after a warm-down would be larger."""
    ends = []
    for resumed in (False, True, None):
        model = perceptron()
        optimizer = SGD(model.parameters(), lr=0.2)
        inputs = batches(model, 6)
        handle = wdhook.attach(model, 0.5, mode="corrected", at="step")
        train(model, optimizer, inputs[:3])
        if resumed is not False:
            state = handle.state_dict()
            handle.remove()
            optimizer = SGD(model.parameters(), lr=0.2)
            handle = wdhook.attach(model, 0.5, mode="corrected", at="step")
            if resumed:
                handle.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.02
        train(model, optimizer, inputs[3:])
        handle.remove()
        ends.append(model.state_dict())
    assert_bit_equal(ends[0], ends[1])
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(ends[0], ends[2])
