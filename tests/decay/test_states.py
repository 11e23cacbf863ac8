"""States of handles and rules of plans in odd hands: groups that part, models that are wrapped, cut
or gone, states that are broken."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from twins import assert_bit_equal, zero_step, λ

import wdhook

SGD = torch.optim.SGD
HOW: dict[str, Any] = {"mode": "independent", "at": "step"}


def tower(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(count)))


def factors(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[float]:
    """What one step multiplies each parameter with."""
    before = [p.detach().clone() for p in model.parameters()]
    zero_step(model, *optimizers)
    pairs = zip(model.parameters(), before, strict=True)
    return [(p.detach() / b).mean().item() for p, b in pairs]


# ---------------------------------------------------------------- the largest learning rate


@pytest.mark.parametrize("at", ["step", "backward"])
@pytest.mark.parametrize("mode", ["independent", "corrected"])
def test_groups_whose_peaks_are_equal_are_not_one_after_a_load(mode: str, at: str) -> None:
    """The learning rate of the first group grows afterwards, that of the second does not."""

    def run(resumes: bool) -> nn.Module:
        model = tower()

        def parts() -> tuple[torch.optim.Optimizer, wdhook.WeightDecay]:
            optimizer = SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
            return optimizer, wdhook.attach(model, 0.5, mode=mode, at=at, optimizer=optimizer)

        optimizer, decay = parts()
        zero_step(model, optimizer)
        if resumes:
            states = optimizer.state_dict(), decay.state_dict()
            decay.remove()
            optimizer, decay = parts()
            optimizer.load_state_dict(states[0])
            decay.load_state_dict(states[1])
        optimizer.param_groups[0]["lr"] = 0.4
        for _ in range(2):
            zero_step(model, optimizer)
        decay.remove()
        return model

    assert_bit_equal(run(True).state_dict(), run(False).state_dict())


@pytest.mark.parametrize("way", ["a group is split", "two optimizers"])
def test_parameters_that_part_have_peaks_of_their_own(way: str) -> None:
    """From then on: both have seen 0.1, and one of them 0.4."""
    model = tower()
    optimizer = SGD(model.parameters(), lr=0.1)
    decay = wdhook.attach(model, 0.5, **HOW)
    zero_step(model, optimizer)
    if way == "a group is split":
        last = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [last], "lr": 0.1})
        optimizer.param_groups[0]["lr"] = 0.4
        optimizers: list[torch.optim.Optimizer] = [optimizer]
    else:
        optimizers = [SGD(model[0].parameters(), lr=0.4), SGD(model[1].parameters(), lr=0.1)]
    zero_step(model, *optimizers)
    # Half of each: exact to the rounding of one product of numbers near 1.
    assert factors(model, *optimizers) == pytest.approx([0.5, 0.5], rel=1e-6)
    decay.remove()


def test_a_step_without_decay_has_a_learning_rate_all_the_same() -> None:
    """λ begins at 0, while the learning rate is at its peak."""
    model = tower(1)
    optimizer = SGD(model.parameters(), lr=1.0)
    decay = wdhook.attach(model, lambda step: 0.0 if step < 2 else 0.5, **HOW)
    for _ in range(2):
        zero_step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    assert factors(model, optimizer) == pytest.approx([0.95], rel=1e-6)
    decay.remove()


# ---------------------------------------------------------------- a model that has changed


def test_progress_goes_to_the_tensor_that_carries_the_weight() -> None:
    """Weight norm makes a direction and a length of one weight; its removal makes one of them."""
    schedule = wdhook.schedules.linear(0.1, 1.0, steps=100)
    model = tower(1)
    decay = wdhook.attach(model, schedule, **HOW)

    def step(lr: float) -> list[float]:
        return factors(model, SGD(model.parameters(), lr=lr))

    step(1.0)
    parametrizations.weight_norm(model[0])
    step(0.5)
    assert list(decay.state_dict()["lr_peaks"][0]) == ["0.parametrizations.weight.original1"]
    parametrize.remove_parametrizations(model[0], "weight")
    assert step(0.5) == pytest.approx([1 - 0.5 * schedule(2)], rel=1e-6)
    assert decay.weight_decay == schedule(3)
    decay.remove()


def test_back_to_a_state_of_before_the_model_was_cut() -> None:
    """Names have passed on to other tensors since: each tensor goes back by itself."""
    model = tower(3)
    optimizer = SGD(
        [{"params": layer.parameters(), "lr": 0.1 * (i + 1)} for i, layer in enumerate(model)],
        lr=0.1,
    )
    decay = wdhook.attach(model, wdhook.schedules.linear(0.1, 1.0, steps=10), **HOW)
    zero_step(model, optimizer)
    state = decay.state_dict()
    for group in optimizer.param_groups:
        group["lr"] *= 10
    model.insert(0, nn.Linear(3, 3, bias=False))
    zero_step(model, optimizer)
    decay.load_state_dict(state)
    peaks = decay.state_dict()["lr_peaks"][0]
    assert peaks == pytest.approx({"1.weight": 0.1, "2.weight": 0.2, "3.weight": 0.3})
    assert decay.state_dict()["finished_steps"][0]["3.weight"] == 1
    decay.remove()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_layer_that_joins_after_the_load(wrapped: bool) -> None:
    """It goes on where it was when the state was saved, also in a wrapped model."""
    schedule = wdhook.schedules.linear(0.0, 1.0, steps=100)
    whole = tower()
    start = whole[1].weight.detach().clone()

    def attach(model: nn.Module) -> wdhook.WeightDecay:
        module = nn.DataParallel(model) if wrapped else model
        return wdhook.attach(module, schedule, toward="init", **HOW)

    with attach(whole) as decay:
        optimizer = SGD(whole.parameters(), lr=0.4)
        for lr in (0.4, 0.4, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            zero_step(whole, optimizer)
        state = decay.state_dict()
    last = whole[1]
    model = nn.Sequential(whole[0])
    holder = nn.DataParallel(model) if wrapped else model
    optimizer = SGD(model.parameters(), lr=0.1)
    with wdhook.attach(holder, schedule, toward="init", **HOW) as decay:
        decay.load_state_dict(state)
        model.append(last)
        optimizer.add_param_group({"params": last.parameters()})
        with torch.no_grad():
            last.weight.add_(1.0)
        zero_step(model, optimizer)
        after = decay.state_dict()
    assert after["lr_peaks"] == state["lr_peaks"]
    assert after["finished_steps"] == ({"0.weight": 4, "1.weight": 4},)
    assert torch.equal(after["targets"]["1.weight"], start)


@pytest.mark.parametrize("tied_first", [0, 1])
def test_a_tied_weight_is_found_under_its_other_name(tied_first: int) -> None:
    """Two modules that share it are registered in another order by the script that resumes."""
    schedule = wdhook.schedules.linear(0.1, 1.0, steps=10)
    layer = nn.Linear(3, 3, bias=False)

    def named(first: str, second: str) -> nn.Module:
        model = nn.Module()
        model.add_module(first, layer)
        other = nn.Linear(3, 3, bias=False)
        other.weight = layer.weight
        model.add_module(second, other)
        return model

    model = named("a", "b")
    with wdhook.attach(model, schedule, **HOW) as decay:
        zero_step(model, SGD(model.parameters(), lr=0.1))
        state = decay.state_dict()
    again = named(*(("a", "b") if tied_first == 0 else ("b", "a")))
    with wdhook.attach(again, schedule, **HOW) as decay:
        decay.load_state_dict(state)
        zero_step(again, SGD(again.parameters(), lr=0.1))
        assert decay.weight_decay == schedule(2)


# ---------------------------------------------------------------- states that do not fit


def test_a_state_of_other_names_is_an_error() -> None:
    """The whole model was attached, and now a part of it is."""
    schedule = wdhook.schedules.linear(0.1, 1.0, steps=10)
    whole = nn.ModuleDict({"body": tower(1)})
    with wdhook.attach(whole, schedule, **HOW) as decay:
        zero_step(whole, SGD(whole.parameters(), lr=0.1))
        state = decay.state_dict()
    with wdhook.attach(whole["body"], schedule, **HOW) as decay:
        with pytest.raises(wdhook.ArgumentError, match=r"(?s)other names.*body\.0\.weight"):
            decay.load_state_dict(state)
        assert decay.weight_decay == schedule(0)


@pytest.mark.parametrize("how", [{"mode": "independent"}, {"toward": "init"}, {"schedule": True}])
def test_a_state_of_after_remove_is_an_error_where_more_than_λ_counts(how: dict[str, Any]) -> None:
    weight_decay: Any = wdhook.schedules.constant(λ) if how.pop("schedule", False) else λ
    arguments = {"mode": "decoupled", "at": "step", **how}
    model = tower(1)
    with wdhook.attach(model, weight_decay, **arguments) as decay:
        zero_step(model, SGD(model.parameters(), lr=0.1))
    other = wdhook.attach(model, weight_decay, **arguments)
    with other, pytest.raises(wdhook.ArgumentError, match="after remove"):
        other.load_state_dict(decay.state_dict())


def test_a_state_of_after_remove_has_the_λ_of_a_plain_handle() -> None:
    model = tower(1)
    with wdhook.attach(model, 0.25) as decay:
        pass
    with wdhook.attach(model, λ) as other:
        other.load_state_dict(decay.state_dict())
        assert other.weight_decay == 0.25


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {"weight_decay": -1.0},
        {"lr_peaks": ("x",)},
        {"lr_peaks": 3},
        {"doses": ({}, 1)},
        {"memory": ([],)},
    ],
    ids=str,
)
def test_a_broken_state_changes_nothing(broken: Any) -> None:
    model = tower(1)
    with wdhook.attach(model, λ, **HOW) as decay:
        zero_step(model, SGD(model.parameters(), lr=0.1))
        before = decay.state_dict()
        state = None if broken is None else {**copy.deepcopy(before), "weight_decay": 0.9, **broken}
        with pytest.raises(wdhook.ArgumentError):
            decay.load_state_dict(state)  # type: ignore[arg-type]
        assert decay.state_dict() == before


def test_first_values_that_a_checkpoint_has_dropped() -> None:
    """torch.distributed.checkpoint loads the keys of the fresh state: none for a frozen layer."""
    how: dict[str, Any] = {"mode": "decoupled", "at": "step", "toward": "init"}
    model = tower()
    with wdhook.attach(model, λ, **how) as decay:
        zero_step(model, SGD(model.parameters(), lr=0.1))
        state = decay.state_dict()
    del state["targets"]["1.weight"]
    decay = wdhook.attach(model, λ, **how)
    with decay, pytest.raises(wdhook.ArgumentError, match=r"(?s)lost values.*1\.weight"):
        decay.load_state_dict(state)


def test_a_source_with_nan_is_the_same_source() -> None:
    source = {"0.weight": torch.full((3, 3), float("nan"))}
    model = tower(1)
    how: dict[str, Any] = {"mode": "decoupled", "at": "step", "toward": wdhook.Anchor(source)}
    with wdhook.attach(model, λ, **how) as decay:
        state = decay.state_dict()
    with wdhook.attach(model, λ, **how) as decay:
        decay.load_state_dict(state)


# ---------------------------------------------------------------- the rules of a plan


def test_rules_are_those_of_when_the_plan_was_made() -> None:
    """A mapping that the caller changes afterwards changes nothing."""
    model, overrides = tower(1), {"*": 0.25}
    with wdhook.attach(model, λ, overrides=overrides) as decay:
        overrides["*"] = 0.0
        model.append(nn.Linear(3, 3, bias=False))
        assert decay.plan["1.weight"].weight_decay == 0.25


@pytest.mark.parametrize("by", ["attach", "plan", "toward"])
def test_a_selector_does_not_keep_its_module_alive(by: str) -> None:
    model: Any = tower()
    rules: dict[str, Any] = {"overrides": {model[1]: 0.25}}
    if by == "toward":
        rules = {"toward": {model[1]: 1.0}}
    plan = wdhook.plan(model, λ, **rules) if by == "plan" else None
    decay = wdhook.attach(model, λ, **rules) if plan is None else wdhook.attach(model, plan)
    assert decay.plan["1.weight"].weight_decay in (0.25, λ)
    gone = weakref.ref(model[1])
    del model, rules
    gc.collect()
    assert gone() is None
