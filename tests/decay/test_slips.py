"""Slips in calls of `attach` and `adopt`: each is answered by a sentence with the right call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wdhook
from wdhook._decay import step_listener

MODEL = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1, weight_decay=0.5)
attach: Any = wdhook.attach  # a type checker refuses these calls, as it should
adopt: Any = wdhook.adopt
SLIPS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "adopt swapped": (
        lambda: adopt(OPTIMIZER, MODEL),
        ["`model`", "got: SGD", "wdhook.adopt(model, optimizer)"],
    ),
    "adopt a list": (
        lambda: adopt(MODEL, [OPTIMIZER]),
        ["one optimizer", "got: list", "one by one"],
    ),
    "attach swapped": (
        lambda: attach(1e-4, MODEL),
        ["`model`", "got: float", "wdhook.attach(model, weight_decay)"],
    ),
    "attach an optimizer": (lambda: attach(OPTIMIZER, 1e-4), ["The model comes first"]),
    "parameters": (lambda: attach(MODEL.parameters(), 1e-4), ["`model`", "got: generator"]),
    "an optimizer by position": (
        lambda: attach(MODEL, 1e-4, OPTIMIZER),
        ["by name", "third argument: SGD", "finds the optimizer by itself", "optimizer=optimizer"],
    ),
    "a mode by position": (
        lambda: attach(MODEL, 1e-4, "decoupled"),
        ["by name", "third argument: str", "attach(model, weight_decay, mode='decoupled')"],
    ),
    "something by position": (lambda: attach(MODEL, 1e-4, 3), ["by name", "mode=..., at=..."]),
    "a factory of schedules": (
        lambda: attach(MODEL, wdhook.schedules.cosine),
        ["makes schedules", "wdhook.schedules.cosine(...)"],
    ),
    "a mode": (
        lambda: attach(MODEL, 1e-4, mode="decupled"),
        ["got: 'decupled'. Did you mean 'decoupled'"],
    ),
    "a moment": (lambda: attach(MODEL, 1e-4, at="steps"), ["got: 'steps'. Did you mean 'step'?"]),
    "a precision": (
        lambda: attach(MODEL, 1e-4, mode="decoupled", at="step", low_precision="rond"),
        ["`low_precision`", "got: 'rond'. Did you mean 'round'?"],
    ),
    "a mode of one shot": (
        lambda: wdhook.apply_weight_decay(MODEL, weight_decay=0.1, mode="copled"),
        ["got: 'copled'. Did you mean 'coupled'"],
    ),
    "one shot without λ": (
        lambda: wdhook.apply_weight_decay(MODEL),
        ["weight_decay: not given\n  Write apply_weight_decay(model, weight_decay=1e-4)"],
    ),
    "a mode in capitals": (
        lambda: attach(MODEL, 1e-4, mode="Decoupled"),
        ["Did you mean 'decoupled'"],
    ),
    "a mode by the name of an optimizer": (
        lambda: attach(MODEL, 1e-4, mode="AdamW"),
        ["got: 'AdamW'. Did you mean 'decoupled'?"],
    ),
    "a mode by another name": (
        lambda: attach(MODEL, 1e-4, mode="l2"),
        ["Did you mean 'coupled'?"],
    ),
    "a class": (
        lambda: attach(nn.Linear, 1e-4),
        ["got: type", "not its class: wdhook.attach(Linear(...), weight_decay)"],
    ),
    "a mode of another kind": (lambda: attach(MODEL, 1e-4, mode=3), ["one of", "got: 3"]),
    "a recipe": (
        lambda: attach(MODEL, 1e-4, recipe="tim"),
        ["`recipe`", "got: 'tim'. Did you mean 'timm'?"],
    ),
    "a list of overrides": (lambda: attach(MODEL, 1e-4, overrides=["bias"]), ["mapping", "list"]),
    "a model as optimizer": (lambda: attach(MODEL, 1e-4, optimizer=MODEL), ["param_groups"]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_answered(slip: str) -> None:
    """The message names the argument, what was given, and what is right; nothing is attached."""
    call, pieces = SLIPS[slip]
    before = step_listener.attached()
    with pytest.raises(wdhook.ArgumentError) as caught:
        call()
    for piece in pieces:
        assert piece in str(caught.value)
    assert step_listener.attached() == before
    assert OPTIMIZER.param_groups[0]["weight_decay"] == 0.5


def test_a_module_is_a_selector() -> None:
    """A key of `overrides` may be a module of the model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with wdhook.attach(model, 0.5, overrides={model[1]: 0.25}) as decay:
        assert decay.plan["0.weight"].weight_decay == 0.5
        assert decay.plan["1.weight"].weight_decay == 0.25
