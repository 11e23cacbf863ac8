"""Models that change their dtype in mid-run, by either of the ways that torch has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from phases import MODES, Optimize, compare
from torch import nn
from twins import LR, batches, loss_of, perceptron, train, weights, λ

import wdhook

SGD = torch.optim.SGD


@pytest.fixture(params=[False, True], ids=["set data", "swap tensors"])
def swap(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways in which torch converts a module."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_converted_in_mid_run(swap: None, dtype: torch.dtype, mode: str, at: str) -> None:
    """`model.to(dtype)` between two steps, gradients and all, with the same optimizer: the decay
    goes on."""

    def script(model: nn.Module, optimize: Optimize) -> None:
        optimizer = optimize(model)
        for to in (torch.float32, dtype, torch.float32):
            model.to(to)
            # Adam's moments are of the dtype of the first gradient.
            optimizer.state.clear()
            train(model, optimizer, batches(model, 3))

    compare(perceptron(), mode, at, script)


def test_a_conversion_after_which_decay_rounds_away(swap: None) -> None:
    """float32 that becomes bfloat16 in mid-run is warned about as if it had been bfloat16 from the
    start."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 1e-4, mode="decoupled", at="step", low_precision="round"):
        train(model, optimizer, batches(model, 2))
        model.bfloat16()
        with pytest.warns(wdhook.WdhookWarning, match=r"rounds away[\s\S]*bfloat16"):
            train(model, optimizer, batches(model, 2))


def test_swapping_tensors_between_backward_and_step_is_an_error_of_torch() -> None:
    """A gradient whose decay is noted cannot be swapped, and torch says so; without gradients, the
    model can."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with wdhook.attach(model, λ):
            loss_of(model, batches(model, 1)[0]).backward()
            with pytest.raises(RuntimeError, match="Couldn't swap"):
                model.double()
            optimizer.zero_grad()
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(w.dtype == torch.float64 for w in weights(model))
