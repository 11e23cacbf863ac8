"""fp16-style loss scaling with a GradScaler, on the CPU: the decay is that of an unscaled run."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    zero,
    λ,
)

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
                nn.utils.clip_grad_norm_(
                    model.parameters(), 0.05 if loop["clip"] == "hard" else 1e9
                )
            scaler.step(optimizer)
            scaler.update()
            zero(model, loop["to_none"])


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
@pytest.mark.parametrize("clip", [None, "soft"])
@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("enabled", [True, False], ids=["scaled", "disabled"])
def test_scaled_with_skipped_steps(at: str, clip: str | None, to_none: bool, enabled: bool) -> None:
    """S·λ·p is added to scaled gradients; skipped steps, growth and un-scaling change no bit of
    the result."""
    # A disabled scaler skips nothing.
    loop = {
        "micro": 1,
        "clip": clip,
        "to_none": to_none,
        "overflows": {3, 4, 9} if enabled else set(),
    }
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
    """At "step" the decay comes after accumulation, un-scaling and clipping, and not at all for a
    skipped step."""
    kind = SGD if mode == "coupled" else AdamW
    loop = {"micro": 2, "clip": "hard", "to_none": True, "overflows": {2, 7}}
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, mode=mode, at="step"):
        play(
            model,
            kind(model.parameters(), lr=LR, weight_decay=0),
            torch.amp.GradScaler("cpu"),
            **loop,
        )
    play(twin, kind(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu"), **loop)
    assert_bit_equal(model.state_dict(), twin.state_dict())


# Decoupled decay in the backward cannot know that the step will be skipped.
FUSED = [
    *(
        (kind, "coupled", at)
        for kind in (SGD, torch.optim.Adam, torch.optim.Adagrad)
        for at in ("backward", "step")
    ),
    (AdamW, "decoupled", "step"),
]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("clip", [None, "soft"])
@pytest.mark.parametrize(("kind", "mode", "at"), FUSED)
def test_fused_optimizers(kind: Any, mode: str, at: str, clip: str | None, micro: int) -> None:
    """A fused optimizer un-scales and skips inside its kernel; the decay knows both."""
    loop = {"micro": micro, "clip": clip, "to_none": True, "overflows": {3, 4}}
    model, twin = twins(perceptron(torch.float64))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with wdhook.attach(model, λ, mode=mode, at=at, scaler=scaler if mode == "coupled" else None):
        play(model, kind(model.parameters(), lr=LR, weight_decay=0, fused=True), scaler, **loop)
    # The reference is not fused: the kernel of fused AdamW subtracts lr·λ·p where the others
    # multiply.
    play(
        twin, kind(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu", init_scale=1024.0), **loop
    )
    # The fused kernels, and the hook between two micro-batches, order a few float64 operations
    # differently: 14 steps
    # of some units in the last place (1e-16), and Adam divides by roots of second moments near
    # 1e-3.
    assert_close(model.state_dict(), twin.state_dict(), 1e-12)


def test_the_fused_test_can_fail() -> None:
    """A missing decay is far outside the tolerance above."""
    model, twin = twins(perceptron(torch.float64))
    loop = {"micro": 1, "clip": None, "to_none": True, "overflows": set()}
    play(model, SGD(model.parameters(), lr=LR, fused=True), torch.amp.GradScaler("cpu"), **loop)
    play(twin, SGD(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu"), **loop)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(model.state_dict(), twin.state_dict(), 1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_decoupled_in_the_backward_once_per_step_that_is_taken(fused: bool) -> None:
    """A step that overflowed does not end the window: parameters shrink once for the step that
    comes after it."""
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
    assert all(
        torch.equal(w, b * (1 - LR * λ)) for w, b in zip(weights(model), before, strict=True)
    )


def test_no_decay_of_a_step_that_overflowed() -> None:
    """With found_inf set, decoupled decay before a fused step multiplies by one: to the last
    bit."""
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
    from wdhook._decay import tensors as _arithmetic

    monkeypatch.setattr(_arithmetic, "is_on_cpu", lambda scale: False)
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, λ, scaler=scaler):
        loss = scaler.scale(loss_of(model, batches(model, 1)[0]))
        monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a synchronisation"))
        loss.backward()


def half_precision(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, by_hand: bool
) -> list[float]:
    """Two micro-batches a step in real float16, un-scaled and clipped; the scale after each step.

    Args:
        by_hand: the first micro-batch of a step is followed by S·λ·p on the gradients of the
        weights.
    """
    scales = []
    for i, batch in enumerate(batches(model, 60)):
        if i % 2 == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        if by_hand and i % 2 == 0:
            for weight in weights(model):
                weight.grad.add_(weight.detach(), alpha=scaler.get_scale() * λ)
        if i % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_scale_that_grows_and_shrinks(at: str) -> None:
    """float16 under autocast overflows by itself, again and again; accumulated, un-scaled and
    clipped all the same."""
    model, twin = twins(perceptron())
    scaler, own = (torch.amp.GradScaler("cpu", growth_interval=2) for _ in range(2))
    with wdhook.attach(model, λ, at=at, scaler=scaler if at == "backward" else None):
        scales = half_precision(model, SGD(model.parameters(), lr=LR), scaler, by_hand=False)
    groups = own_groups(twin) if at == "step" else twin.parameters()
    assert scales == half_precision(twin, SGD(groups, lr=LR), own, by_hand=at == "backward")
    steps = list(pairwise(scales))
    assert sum(b > a for a, b in steps) >= 3
    assert sum(b < a for a, b in steps) >= 3
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_scale_that_is_no_power_of_two(at: str) -> None:
    """Growth by 1.7 and back-off by 0.3: only the rounding of 1/S to float32 is in the decay
    too."""
    loop = {"micro": 1, "clip": "soft", "to_none": True, "overflows": {3, 4, 9}}
    arguments = {
        "init_scale": 1000.0,
        "growth_factor": 1.7,
        "backoff_factor": 0.3,
        "growth_interval": 2,
    }
    model, twin = twins(perceptron(torch.float64))
    scaler = torch.amp.GradScaler("cpu", **arguments)
    with wdhook.attach(model, λ, at=at, scaler=scaler):
        play(model, SGD(model.parameters(), lr=LR), scaler, **loop)
    play(twin, SGD(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu", **arguments), **loop)
    # Un-scaling multiplies with 1/S in float32, off by at most 2**-24 of it. So each of 11 steps
    # may add
    # lr·λ·|p|·2**-24, with |p| < 1, to what differs; the gradients of this loss do not make that
    # grow tenfold. At "step" the decay comes after un-scaling, and no bit differs.
    assert_close(
        model.state_dict(), twin.state_dict(), 0.0 if at == "step" else 10 * 11 * LR * λ * 2**-24
    )


@pytest.mark.parametrize("at", ["backward", "step"])
def test_several_optimizers_with_one_scaler(at: str) -> None:
    """The scaler skips the step of one optimizer and takes that of the other: each ends its own
    windows."""

    def run(
        model: nn.Module, first: torch.optim.Optimizer, second: torch.optim.Optimizer, scaler: Any
    ) -> None:
        for i, batch in enumerate(batches(model, 8)):
            model.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if i % 3 == 1:
                model[0].weight.grad[0, 0] = float("inf")
            for optimizer in (first, second):
                scaler.step(optimizer)
            scaler.update()

    model, twin = twins(perceptron())
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, λ, at=at, scaler=scaler):
        run(
            model,
            SGD(model[0].parameters(), lr=LR),
            torch.optim.Adam(model[2:].parameters(), lr=0.01),
            scaler,
        )
    first, second = SGD(own_groups(twin[0]), lr=LR), torch.optim.Adam(own_groups(twin[2:]), lr=0.01)
    run(twin, first, second, torch.amp.GradScaler("cpu"))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("given", [True, False])
def test_a_disabled_scaler_need_not_be_given(given: bool) -> None:
    """GradScaler(enabled=False), as scripts write it for float32 and bfloat16, scales nothing:
    given or not."""
    loop = {"micro": 1, "clip": None, "to_none": True, "overflows": set()}
    model, twin = twins(perceptron())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with wdhook.attach(model, λ, scaler=scaler if given else None):
        play(model, SGD(model.parameters(), lr=LR), scaler, **loop)
    play(twin, SGD(own_groups(twin), lr=LR), torch.amp.GradScaler("cpu", enabled=False), **loop)
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_an_optimizer_that_was_told_the_scale_by_hand() -> None:
    """`grad_scale` on a fused optimizer, without a GradScaler: an error at "backward", and right
    at "step"."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float) -> None:
        (loss_of(model, batches(model, 1)[0]) * scale).backward()
        optimizer.step()

    model, twin = twins(perceptron(torch.float64))
    optimizer = SGD(model.parameters(), lr=LR, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    before = model[0].weight.detach().clone()
    with (
        wdhook.attach(model, λ),
        pytest.raises(wdhook.LossScaleError, match=r'(?s)its `grad_scale`.*at="step"'),
    ):
        step(model, optimizer, 4.0)
    assert torch.equal(model[0].weight, before)
    optimizer.zero_grad()
    with wdhook.attach(model, λ, at="step"):
        step(model, optimizer, 4.0)
    step(twin, SGD(own_groups(twin), lr=LR, fused=True), 1.0)
    assert_close(
        model.state_dict(), twin.state_dict(), 1e-15
    )  # another order of two operations on numbers below 1
