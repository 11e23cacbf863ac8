"""Helpers that choose a λ: each against the training, or the equation, that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import wdhook
from wdhook.schedules import cosine, dose, half_life, linear, timescale, transfer


def decayed_alone(λ: float, lr: Any, steps: int) -> float:
    """The factor by which decoupled decay changes a weight whose gradient is zero, in float64."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr if isinstance(lr, float) else lr(0))
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        for step in range(steps):
            if not isinstance(lr, float):
                optimizer.param_groups[0]["lr"] = lr(step)
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
    return model.weight.item()


@pytest.mark.parametrize(("steps", "lr"), [(1, 0.5), (10, 0.1), (1000, 1e-3)])
def test_half_of_a_weight_is_left_after_its_half_life(steps: int, lr: float) -> None:
    """A training of so many steps, without gradients, halves a weight."""
    # Each step rounds by at most half an ulp of float64: 1000 steps leave less than 1e-12.
    assert decayed_alone(half_life(steps, lr=lr), lr, steps) == pytest.approx(0.5, rel=1e-12)


def test_a_half_life_of_many_steps_keeps_its_digits() -> None:
    """For h steps lr·λ is log 2/h·(1 − log 2/(2h) + …), where 1 − 2^(−1/h) has no digits left."""
    h = 1e15
    # The second term of the series is 3.5e-16 of the first: less than a rounding of float64.
    assert half_life(h, lr=1.0) == pytest.approx(math.log(2) / h, rel=1e-15, abs=0)
    assert 1 - 2 ** (-1 / h) != pytest.approx(math.log(2) / h, rel=1e-3, abs=0)


@pytest.mark.parametrize(("steps", "lr"), [(1, 1.0), (10_000, 1e-3), (250.5, 3e-4)])
def test_the_timescale_is_one_over_the_product(steps: float, lr: float) -> None:
    """τ = 1/(lr·λ)."""
    # Two products and two quotients: less than four roundings.
    assert 1 / (lr * timescale(steps, lr=lr)) == pytest.approx(steps, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("λ", "lr"),
    [(0.1, 1e-2), (0.1, cosine(1e-2, 0.0, 200)), (linear(0.0, 1.0, 50), 1e-2)],
    ids=["constant", "lr", "λ"],
)
def test_the_dose_is_the_logarithm_of_what_is_left(λ: Any, lr: Any) -> None:
    """e^(−dose) is the factor of a training without gradients, also where λ or lr is scheduled."""
    # 200 factors in float64, each rounded once.
    left = decayed_alone(λ, lr, 200)
    assert math.exp(-dose(λ, lr, steps=200)) == pytest.approx(left, rel=1e-13)
    assert left < 0.99


def test_half_lives_add_up_in_a_dose() -> None:
    """The dose of three half-lives is 3·log 2."""
    found = dose(half_life(100, lr=1e-2), 1e-2, steps=300)
    assert found == pytest.approx(3 * math.log(2), rel=1e-12)  # a sum of 300 rounded terms


def test_a_transfer_keeps_the_timescale_as_a_share_of_the_run() -> None:
    """τ in samples over samples of the run: B/(lr·λ)/D is the same in both runs."""
    λ = transfer(0.1, batch=(256, 1024), lr=(1e-3, 4e-3), tokens=(1e9, 3e9))
    share = lambda λ, batch, lr, data: batch / (lr * λ) / data  # noqa: E731
    # A few products and quotients of float64.
    assert share(λ, 1024, 4e-3, 3e9) == pytest.approx(share(0.1, 256, 1e-3, 1e9), rel=1e-14)
    assert transfer(0.1) == 0.1
    assert transfer(0.1, batch=(1, 2)) == 0.2
    assert transfer(0.1, lr=(1, 2)) == transfer(0.1, tokens=(1, 2)) == 0.05


@pytest.mark.parametrize(
    ("call", "pieces"),
    [
        (lambda: half_life(0, lr=0.1), ["`steps` must be a finite number above 0", "got: 0"]),
        (lambda: half_life(10, lr=0.0), ["`lr` must be a finite number above 0"]),
        (lambda: half_life(10, lr=float("nan")), ["`lr` must be", "got: nan"]),
        (lambda: half_life(True, lr=0.1), ["`steps` must be", "got: True"]),
        (lambda: timescale(0.5, lr=0.1), ["`steps` must be at least 1", "got: 0.5"]),
        (lambda: timescale(10, lr="0.1"), ["`lr` must be", "got: '0.1'"]),
        (lambda: transfer(-0.1), ["finite and not negative"]),
        (lambda: transfer(0.1, batch=1024), ["`batch` must be a pair", "batch=(256, 1024)"]),
        (lambda: transfer(0.1, lr=(0.1, 0.0)), ["`lr` must be a finite number above 0"]),
        (lambda: dose(0.1, 0.1, steps=0), ["`steps` must be a whole number"]),
        (lambda: dose(-1.0, 0.1, steps=1), ["`weight_decay` must be finite and not negative"]),
        (lambda: dose(0.1, -1.0, steps=1), ["`lr` must be finite and not negative"]),
        (lambda: dose(10.0, 0.1, steps=2), ["lr·λ must be below 1", "step: 0", "lr: 0.1"]),
    ],
)
def test_numbers_without_a_meaning_are_errors(call: Callable[[], Any], pieces: list[str]) -> None:
    """Each error names the argument and the number that was given."""
    with pytest.raises(wdhook.ArgumentError) as caught:
        call()
    for piece in pieces:
        assert piece in str(caught.value)


def test_a_learning_rate_has_to_be_given() -> None:
    """Without it λ would be too small by the factor lr, in silence."""
    with pytest.raises(TypeError, match="lr"):
        half_life(1000)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="lr"):
        timescale(1000)  # type: ignore[call-arg]
