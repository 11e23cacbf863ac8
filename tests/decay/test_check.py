"""`decay.check()`: the facts of the last step, in numbers and in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wdhook


def net() -> nn.Sequential:
    """Two eligible tensors, of 12 and 8 elements."""
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of a training."""
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> float:
    """The multiple of a parameter that a step with a loss of gradient 0 takes away or adds: the
    decay alone."""
    param = model.get_parameter(name)
    before = param.detach().clone()
    optimizer.zero_grad()
    (model(torch.ones(2, 3)) * 0).sum().backward()
    optimizer.step()
    change: Tensor = (before - param.detach()) / before
    return float(change.mean())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_coupled(at: str) -> None:
    """λ·p was added to the gradient: what plain SGD subtracts is lr·λ·p."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with wdhook.attach(model, 0.25, at=at) as decay:  # type: ignore[arg-type]
        # 0.5·0.25 of each weight, to three roundings of 2⁻²⁴ of one element.
        assert measured(model, optimizer, "0.weight") == pytest.approx(0.125, rel=1e-5)
        check = decay.check()
        assert check.decayed == {"0.weight": 0.25, "1.weight": 0.25}
        assert check.ok
        assert check.steps == 1
        assert check.numel == 20
        assert str(check) == (
            "Decay works: step 1 decayed 2 of 2 eligible tensors, 20 elements; "
            "λ·p = 0.25·p added to the gradient."
        )
        assert str(decay) == str(check)


@pytest.mark.parametrize("at", ["backward", "step"])
def test_decoupled(at: str) -> None:
    """lr·λ·p was subtracted from the parameter, with the learning rate of that step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    arguments = {"mode": "decoupled", "at": at, "optimizer": optimizer}
    with wdhook.attach(model, 0.25, **arguments) as decay:  # type: ignore[arg-type]
        step(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.25
        assert measured(model, optimizer, "0.weight") == pytest.approx(0.0625, rel=1e-5)  # as above
        assert decay.check().decayed == {"0.weight": 0.0625, "1.weight": 0.0625}
        assert "step 2" in decay.check().sentence
        assert decay.check().sentence.endswith(
            "elements; lr·λ·p = 0.0625·p subtracted from the parameter; λ is 0.25."
        )


def test_several_numbers() -> None:
    """Each λ with its number of weights; of many the range."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5, overrides={"0.weight": 0.25}) as decay:
        step(model, optimizer)
        assert "added to the gradient: 0.25·p (1), 0.5·p (3)" in decay.check().sentence
    overrides = {f"{i}.weight": 0.125 * (i + 1) for i in range(4)}
    with wdhook.attach(model, 0.5, overrides=overrides) as decay:
        step(model, optimizer)
        assert "0.125·p to 0.5·p" in decay.check().sentence


def test_frozen_weights_do_not_count() -> None:
    """A frozen weight is named as frozen, in the check and in the repr."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5) as decay:
        step(model, optimizer)
        check = decay.check()
        assert check.ok
        assert check.decayed.keys() == {"1.weight"}
        assert check.frozen == ["0.weight"]
        assert "1 of 1 eligible tensors, 8 elements" in str(check)
        assert "  frozen: 1: 0.weight" in str(check)
        assert "decayed=1 of 4 tensors, frozen=1, steps=1" in repr(decay)
        model[0].requires_grad_(True)
        assert "decayed=2 of 4 tensors, steps=1" in repr(decay)
    model.requires_grad_(False)
    with wdhook.attach(model, 0.5) as decay:
        assert decay.check().sentence == (
            "Nothing is decayed: all parameters of the plan are frozen."
        )


def test_a_weight_without_a_gradient_is_named() -> None:
    """A module that the forward pass leaves out gets no decay, and the check is not ok."""
    model = net()
    model.add_module("spare", nn.Identity())
    model.spare.weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5, overrides={"spare.weight": True}) as decay:
        step(model, optimizer)
        check = decay.check()
        assert not check.ok
        assert check.undecayed == ["spare.weight"]
        assert check.sentence.startswith(
            "Decay is incomplete: step 1 decayed 2 of 3 eligible tensors"
        )
        assert "  no decay so far: 1: spare.weight\n" in str(check)
        assert "doctor" in str(check)
        optimizer.zero_grad()
        model.spare.weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert decay.check().undecayed == []


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_weight_that_no_optimizer_owns_is_named(at: str) -> None:
    """Its gradient holds decay, perhaps, but nothing steps it."""
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with wdhook.attach(model, 0.5, at=at) as decay:  # type: ignore[arg-type]
        for _ in range(2):
            step(model, optimizer)
            model[1].zero_grad()
        assert not decay.check().ok
        assert decay.check().undecayed == ["1.weight"]
        assert decay.check().decayed.keys() == {"0.weight"}


def test_a_weight_that_the_last_step_left_out() -> None:
    """It was decayed before, which is no mistake."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5) as decay:
        step(model, optimizer)
        optimizer.zero_grad()
        model[1](torch.ones(1, 4)).sum().backward()
        optimizer.step()
        check = decay.check()
        assert check.ok
        assert check.absent == ["0.weight"]
        assert check.decayed.keys() == {"1.weight"}


def test_a_model_that_is_not_trained() -> None:
    """Steps of a copy of the model are not steps of this handle."""
    model, twin = net(), net()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5) as decay:
        step(twin, optimizer)
        check = decay.check()
        assert not check.ok
        assert check.steps == 0
        assert check.undecayed == ["0.weight", "1.weight"]
        assert "no optimizer has stepped" in check.sentence


def test_before_the_first_step() -> None:
    """After a backward pass the gradients hold their decay, and no step has read them."""
    model = net()
    with wdhook.attach(model, 0.5) as decay:
        model(torch.ones(2, 3)).sum().backward()
        check = decay.check()
        assert not check.ok
        assert check.decayed.keys() == {"0.weight", "1.weight"}
        assert check.sentence.startswith("No optimizer step yet: the last backward pass decayed 2")


def test_between_backward_and_step() -> None:
    """The payment of the step to come has taken the place of the last one."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5) as decay:
        step(model, optimizer)
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        assert decay.check().ok


def test_paused() -> None:
    """A step inside of a pause decays nothing, and the check says so."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 0.5, at="step") as decay:
        step(model, optimizer)
        with decay.paused():
            step(model, optimizer)
            check = decay.check()
            assert not check.ok
            assert check.absent == ["0.weight", "1.weight"]
            assert (
                check.sentence
                == "Nothing was decayed by step 2 (decay is paused): 0 of 2 eligible tensors."
            )
        step(model, optimizer)
        assert decay.check().ok


def test_no_decay_to_do() -> None:
    """λ = 0."""
    model = net()
    with wdhook.attach(model, 0.5) as decay:
        decay.weight_decay = 0.0
        assert decay.check().sentence == "Nothing is decayed: λ is 0."


def test_removed() -> None:
    """A removed handle, and one whose model is gone."""
    model = net()
    decay = wdhook.attach(model, 0.5)
    decay.remove()
    assert decay.check().removed
    assert not decay.check().ok
    assert str(decay).startswith("Nothing is decayed: the handle is removed")
    model = net()
    decay = wdhook.attach(model, 0.5)
    del model
    assert decay.check().removed


class Plain:
    """An optimizer that torch does not announce: no `torch.optim.Optimizer`."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.1}]

    def step(self) -> None:
        """Plain gradient descent."""
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param -= 0.1 * param.grad


@pytest.mark.parametrize("given", [True, False])
def test_steps_that_nobody_announces(given: bool) -> None:
    """The last backward pass speaks, or the steps that were inferred."""
    model = net()
    optimizer = Plain(model)
    arguments = {"optimizer": optimizer} if given else {}
    with wdhook.attach(model, 0.5, **arguments) as decay:
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        check = decay.check()
        assert check.decayed == {"0.weight": 0.5, "1.weight": 0.5}
        assert check.ok


def test_a_check_changes_nothing() -> None:
    """Training with a check after each step gives the same bits."""
    results = []
    looks: list[Callable[[wdhook.WeightDecay], object]] = [str, lambda _: None]
    for look in looks:
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with wdhook.attach(model, 0.5) as decay:
            for _ in range(3):
                look(decay)
                step(model, optimizer)
                look(decay)
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
