"""fp16-style loss scaling with a GradScaler, on the CPU: the decay is that of an unscaled run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, perceptron, twins, weights, zero, λ

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def play(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, **loop: Any) -> None:
    """Two micro-batches a step, every third one with an overflow, so that its step is skipped."""
    for i, batch in enumerate(batches(model, 14)):
        loss = loss_of(model, batch)
        if i in loop["overflows"]:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if i % loop["micro"] == loop["micro"] - 1:
            if loop["clip"]:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05 if loop["clip"] == "hard" else 1e9)
            scaler.step(optimizer)
            scaler.update()
            zero(model, loop["to_none"])


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
@pytest.mark.parametrize("clip", [None, "soft"])
@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("enabled", [True, False], ids=["scaled", "disabled"])
def test_scaled_with_skipped_steps(at: str, clip: str | None, to_none: bool, enabled: bool) -> None:
    """S·λ·p is added to scaled gradients; skipped steps, growth and un-scaling change no bit of the result."""
    # A disabled scaler skips nothing.
    loop = {"micro": 1, "clip": clip, "to_none": to_none, "overflows": {3, 4, 9} if enabled else set()}
    arguments = {"init_scale": 1024.0, "growth_interval": 3, "enabled": enabled}
    model, twin = twins(perceptron())
    scaler = torch.amp.GradScaler("cpu", **arguments)
    with wdhook.attach(model, λ, at=at, scaler=scaler):
        play(model, SGD(model.parameters(), lr=LR), scaler, **loop)
    play(twin, SGD(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu", **arguments), **loop)
    assert all(p.isfinite().all() for p in model.parameters())
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_accumulated_and_clipped_at_step(mode: str) -> None:
    """At "step" the decay comes after accumulation, un-scaling and clipping, and not at all for a skipped step."""
    kind = SGD if mode == "coupled" else AdamW
    loop = {"micro": 2, "clip": "hard", "to_none": True, "overflows": {2, 7}}
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, mode=mode, at="step"):
        play(model, kind(model.parameters(), lr=LR, weight_decay=0), torch.amp.GradScaler("cpu"), **loop)
    play(twin, kind(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu"), **loop)
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("clip", [None, "soft"])
@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_fused_optimizers(mode: str, at: str, clip: str | None) -> None:
    """A fused optimizer un-scales and skips inside its kernel; the decay knows both."""
    if mode == "decoupled" and at == "backward":
        pytest.skip("decoupled decay in the backward cannot know that the step will be skipped")
    kind = SGD if mode == "coupled" else AdamW
    loop = {"micro": 1, "clip": clip, "to_none": True, "overflows": {3, 4}}
    model, twin = twins(perceptron())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with wdhook.attach(model, λ, mode=mode, at=at, scaler=scaler if mode == "coupled" else None):
        play(model, kind(model.parameters(), lr=LR, weight_decay=0, fused=True), scaler, **loop)
    # The reference is not fused: the kernel of fused AdamW subtracts lr·λ·p where the others multiply.
    play(twin, kind(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu", init_scale=1024.0), **loop)
    for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        # The fused kernels order a few float32 operations differently: 14 steps of some units in the last place,
        # and Adam divides by roots of second moments near 1e-3.
        assert (one - other).abs().max() <= 2e-5, name


def test_the_fused_test_can_fail() -> None:
    """A missing decay is far outside the tolerance above."""
    model, twin = twins(perceptron())
    loop = {"micro": 1, "clip": None, "to_none": True, "overflows": set()}
    play(model, SGD(model.parameters(), lr=LR, fused=True), torch.amp.GradScaler("cpu"), **loop)
    play(twin, SGD(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu"), **loop)
    assert (model[0].weight - twin[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_decoupled_in_the_backward_once_per_step_that_is_taken(fused: bool) -> None:
    """A step that overflowed does not end the window: parameters shrink once for the step that comes after it."""
    model = perceptron()
    before = [w.detach().clone() for w in weights(model)]
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer), warnings.catch_warnings():
        warnings.simplefilter("ignore", wdhook.WdhookWarning)  # of the second gradient
        for factor in (float("inf"), 0.0):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batches(model, 1)[0]) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert all(torch.equal(w, b * (1 - LR * λ)) for w, b in zip(weights(model), before, strict=True))


def test_no_decay_of_a_step_that_overflowed() -> None:
    """With found_inf set, decoupled decay before a fused step multiplies by one: to the last bit."""
    model = perceptron()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        scaler.scale(loss_of(model, batches(model, 1)[0]) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    same: list[bool] = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(same)


def test_the_scale_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU the hook reads no number from the scale: nothing in the backward synchronises."""
    from wdhook import _arithmetic

    monkeypatch.setattr(_arithmetic, "is_on_cpu", lambda scale: False)
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, λ, scaler=scaler):
        loss = scaler.scale(loss_of(model, batches(model, 1)[0]))
        monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a synchronisation"))
        loss.backward()
