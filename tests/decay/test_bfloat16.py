"""bfloat16 and float16: parameters in them, autocast around float32 ones, and decay that rounds
away."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

# lr·λ = 0.005 is more than half a unit in the last place, so nothing is warned about.


@LOW
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW], ids=["SGD", "Adam", "AdamW"])
def test_parameters_of_low_precision(
    kind: Any, at: str, foreach: bool | None, dtype: torch.dtype
) -> None:
    """As torch.optim decays them with param groups, to the last bit, with and without foreach."""
    mode = "decoupled" if kind is AdamW else "coupled"
    # On the CPU foreach rounds the factor 1 - lr·λ to the precision of the tensors, and a single
    # product does not.
    options = {"lr": LR} if kind is SGD else {"lr": LR, "eps": 1e-3}  # float16 has no 1e-8
    model, twin = twins(perceptron(dtype))
    optimizer = kind(model.parameters(), weight_decay=0, foreach=foreach, **options)
    rounded = {"foreach": foreach, "low_precision": "round"}
    with wdhook.attach(model, 0.3, mode=mode, at=at, optimizer=optimizer, **rounded):
        train(model, optimizer, batches(model, 8))
    reference = kind(own_groups(twin, 0.3), foreach=foreach, **options)
    train(twin, reference, batches(twin, 8))
    assert all(p.isfinite().all() for p in model.parameters())
    assert_bit_equal(model.state_dict(), twin.state_dict())


@LOW
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_decay_written_by_hand(mode: str, dtype: torch.dtype) -> None:
    """One backward pass against the formula in float64, rounded to the precision of the tensor."""
    model, twin = twins(perceptron(dtype))
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode=mode, optimizer=optimizer, low_precision="round"):
        loss_of(model, batches(model, 1)[0]).backward()
    loss_of(twin, batches(twin, 1)[0]).backward()
    for weight, other in zip(weights(model), weights(twin), strict=True):
        p, g = other.detach().double(), other.grad.double()
        if mode == "decoupled":
            assert torch.equal(weight, (p * (1 - LR * λ)).to(dtype))
            continue
        # torch rounds λ, then λ·p (in some elements), then the sum: half a unit in the last place
        # each. Numbers below the smallest normal one are further apart than that.
        half = torch.finfo(dtype).eps / 2
        total = g + λ * p
        bound = (
            half * (2.01 * (λ * p).abs() + 1.01 * total.abs())
            + torch.finfo(dtype).smallest_normal * half
        )
        assert ((weight.grad.double() - total).abs() <= bound).all()


def test_the_comparisons_can_fail() -> None:
    """Without decay, bfloat16 parameters end elsewhere."""
    model, twin = twins(perceptron(torch.bfloat16))
    train(model, SGD(model.parameters(), lr=LR), batches(model, 8))
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 8))
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_autocast_to_bfloat16(mode: str, at: str) -> None:
    """float32 parameters under autocast are decayed in float32, as torch.optim does it, and
    nothing is warned about."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in batches(model, 8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()

    kind = SGD if mode == "coupled" else AdamW
    model, twin = twins(perceptron())
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0)
    with wdhook.attach(model, 1e-4, mode=mode, at=at, optimizer=optimizer):
        run(model, optimizer)
    run(twin, kind(own_groups(twin, 1e-4), lr=0.01))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@contextmanager
def rounding_warned(expected: bool) -> Iterator[None]:
    """Expect the warning of a decay that rounds away, or none (warnings are errors)."""
    if not expected:
        yield
        return
    with pytest.warns(wdhook.WdhookWarning, match="rounds away"):
        yield


@LOW
@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_the_warning_comes_where_decay_rounds_away(mode: str, at: str, dtype: torch.dtype) -> None:
    """Below half a unit in the last place of 1 there is a warning, above it none; a quarter is
    lost everywhere."""
    half = torch.finfo(dtype).eps / 2
    for factor, warned in ((0.49, True), (0.99, True), (1.01, False)):
        model = perceptron(dtype)
        before = [w.detach().clone() for w in weights(model)]
        optimizer = SGD(model.parameters(), lr=LR)
        rounded = {"at": at, "optimizer": optimizer, "low_precision": "round"}
        with wdhook.attach(model, factor * half / LR, mode=mode, **rounded):
            for weight in weights(model):
                weight.grad = torch.zeros_like(weight)
            with rounding_warned(warned):
                optimizer.step()
        unchanged = [torch.equal(w, b) for w, b in zip(weights(model), before, strict=True)]
        # Numbers just below a power of two have half the relative spacing of those just above it.
        assert all(unchanged) == (factor < 0.5)


@pytest.mark.parametrize("own", [0.0, λ, None], ids=["nobody", "torch.optim", "wdhook"])
def test_coupled_decay_can_be_lost_in_a_larger_gradient(own: float | None) -> None:
    """λ·p below half a unit of g adds nothing to it, for torch.optim as for us: the step is that
    of no decay."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    model.weight.grad = torch.full_like(model.weight, 100.0)  # its neighbours are 0.5 away
    optimizer = SGD(model.parameters(), lr=LR, weight_decay=own or 0.0)
    with nullcontext() if own is not None else wdhook.attach(model, λ):
        optimizer.step()
    assert torch.equal(model.weight, torch.full_like(model.weight, 1.0 - 100.0 * LR))


def test_float16_gradients_and_a_scaler_are_refused_by_torch() -> None:
    """A GradScaler does not un-scale float16 gradients: its error comes before any step, and
    nothing was stepped."""
    model = perceptron(torch.float16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SGD(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with wdhook.attach(model, λ, scaler=scaler):
        scaler.scale(loss_of(model, batches(model, 1)[0])).backward()
        with pytest.raises(ValueError, match="unscale FP16 gradients"):
            scaler.step(optimizer)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize(("size", "told"), [(100.0, True), (0.01, False)])
def test_coupled_decay_that_gradients_lose_is_told(size: float, told: bool, at: str) -> None:
    """A gradient is sampled early; the warning comes once, later, where most values lose λ·p."""
    model = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=1e-6)
    messages = []
    # lr·λ is below half a unit too, which is another warning, at the first step.
    with warnings.catch_warnings(record=True) as caught, wdhook.attach(model, λ, at=at):
        warnings.simplefilter("always")
        for step in range(40):
            optimizer.zero_grad()
            (model.weight * size).sum().backward()
            optimizer.step()
            messages += [(step, str(w.message)) for w in caught]
            caught.clear()
    lost = [step for step, message in messages if "lost in the gradients" in message]
    assert lost == ([24] if told else [])
