"""How far a parameter has come outlives its optimizers and its replacement."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from field import DECAY, LR, both_moments, chain, check, everywhere, lines, pull, sgd, train_step
from torch import nn

import wdhook


def ramp(step: int) -> float:
    """λ of a schedule: 1/8, 2/8, ..."""
    return (step + 1) / 8


def assign(model: nn.Module) -> None:
    """New parameters of the same values."""
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def convert(model: nn.Module) -> None:
    """Other objects under the same names, as sharding makes them."""
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.detach().clone())


def rewrap(model: nn.Module) -> None:
    """The same tensors in other modules, under other names."""
    model.append(nn.Sequential(*(model.pop(0) for _ in range(len(model)))))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "the optimizer alone": lambda model: None,
    "load_state_dict(assign=True)": assign,
    "parameters replaced one by one": convert,
    "layers moved into another module": rewrap,
}


@everywhere
@pytest.mark.parametrize("change", CHANGES)
def test_a_schedule_and_an_optimizer_that_is_made_anew(mode: str, at: str, change: str) -> None:
    """After two of four steps the optimizer is made anew, and the old one is collected.

    Phases of a fine-tuning, rounds of federated learning, sharding after a warm-up: the schedule
    goes on with the third step, whatever was replaced with the optimizer.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, ramp, mode=mode, at=at, optimizer=optimizer, given=at == "backward")
        yield model
        for step in range(4):
            if step == 2:
                CHANGES[change](model)
                del optimizer
                gc.collect()
                optimizer = sgd(model.parameters())
            decay.weights = list(model.parameters())
            train_step(decay, model, optimizer, weight_decay=ramp(step))
            yield model

    check(loop)


@both_moments
@pytest.mark.parametrize("change", CHANGES)
def test_a_peak_and_an_optimizer_that_is_made_anew(at: str, change: str) -> None:
    """Independent, a new optimizer has an eighth of the learning rate: the first has the peak."""

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode="independent", at=at, optimizer=optimizer)
        yield model
        for step in range(4):
            lr = LR if step < 2 else LR / 8
            if step == 2:
                CHANGES[change](model)
                del optimizer
                gc.collect()
                optimizer = sgd(model.parameters(), lr=lr)
            decay.weights = list(model.parameters())
            train_step(decay, model, optimizer, lr=lr, peak=LR)
            yield model

    check(loop)


@both_moments
def test_a_state_that_is_saved_when_no_optimizer_is_left(at: str) -> None:
    """The optimizer was deleted, and the state of the handle says how many steps were finished."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    with wdhook.attach(model, ramp, at=at) as handle:
        for _ in range(3):
            pull(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        del optimizer
        gc.collect()
        state = handle.state_dict()
    assert state["finished_steps"] == ({"0.weight": 3, "1.weight": 3},)


@both_moments
def test_a_state_that_is_saved_after_a_layer_was_deleted(at: str) -> None:
    """The state of a handle speaks of the parameters that there are."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    with wdhook.attach(model, ramp, at=at) as handle:
        pull(model).backward()
        optimizer.step()
        del model[1], optimizer
        gc.collect()
        assert handle.state_dict()["finished_steps"] == ({"0.weight": 1},)


@both_moments
def test_nothing_keeps_a_deleted_layer_alive(at: str) -> None:
    """A parameter that has left the model is collected, although its decision is remembered."""
    model = chain(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = sgd(model.parameters())
    with wdhook.attach(model, DECAY, at=at):
        pull(model).backward()
        optimizer.step()
        storage = torch.UntypedStorage._weak_ref(model[1].weight.untyped_storage())
        assert not torch.UntypedStorage._expired(storage)
        del model[1], optimizer
        gc.collect()
        assert torch.UntypedStorage._expired(storage)
        torch.UntypedStorage._free_weak_ref(storage)
