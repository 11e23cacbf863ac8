"""`decay.dose`: the decay that was counted is the decay that was done; counting reads nothing."""

from __future__ import annotations

import gc
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from field import Wrapper
from torch import Tensor, nn
from twins import LR, NoReading, batches, calls, loss_of, perceptron, train, zero, λ

import wdhook
from wdhook._decay.tally import Tally

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
MOMENTS = ("backward", "step")
SECOND = pytest.mark.filterwarnings("ignore:A parameter got a second gradient")
SHRINKING = ("decoupled", "independent", "corrected")
CLOSE = {
    "rel": 1e-9
}  # float64: 1 − lr·λ is rounded once in each of a few steps, lr·λ is above 1e-6


def net(count: int = 2) -> nn.Sequential:
    """Decayed weights in double precision, and nothing else."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(count))).double()


def still(model: nn.Module) -> Tensor:
    """A loss whose gradients are there, and zero: what a step changes is the decay alone."""
    return sum(((p * 0).sum() for p in model.parameters()), torch.zeros(()))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """One step of a training."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    still(model).backward()
    for optimizer in optimizers:
        optimizer.step()


class Started:
    """A model with its values at the start: the dose by what is left of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def doses(self) -> dict[str, Any]:
        """Name → −log(p now / p at the start)."""
        found = {}
        for name, param in self.model.named_parameters():
            share = (param.detach() / self.before[name]).mean().item()
            found[name] = pytest.approx(-math.log(share), **CLOSE)
        return found


def rates() -> Iterator[float]:
    """Learning rates of a warm-up and a decline."""
    yield from (0.1, 0.3, 0.4, 0.2, 0.05)


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("mode", SHRINKING)
def test_the_dose_is_what_was_taken(mode: str, at: str) -> None:
    """With a schedule of lr in two groups, a schedule of λ, and an absolute λ."""
    model = net(3)
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = SGD(groups, lr=LR)
    schedule = wdhook.schedules.linear(0.1, 0.3, steps=4)
    overrides = {"1.weight": 0.01}
    started = Started(model)
    with wdhook.attach(
        model, schedule, mode=mode, at=at, optimizer=optimizer, overrides=overrides
    ) as handle:
        assert dict(handle.dose) == dict.fromkeys(started.before, 0.0)
        for lr in rates():
            optimizer.param_groups[0]["lr"] = lr
            optimizer.param_groups[1]["lr"] = lr / 2
            step(model, optimizer)
        assert handle.dose == started.doses()
        assert handle.dose.steps == 5
        λs = {name: one.weight_decay for one in handle.dose.classes for name in one.parameters}
    assert λs == {"0.weight": λs["2.weight"], "1.weight": 0.01, "2.weight": pytest.approx(0.3)}


@pytest.mark.parametrize("at", MOMENTS)
def test_coupled_decay_under_plain_sgd(at: str) -> None:
    """The update is lr times the gradient, so λ·p in the gradient takes lr·λ of p."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR)
    started = Started(model)
    with wdhook.attach(model, λ, at=at) as handle:
        for lr in rates():
            optimizer.param_groups[0]["lr"] = lr
            step(model, optimizer)
        assert handle.dose == started.doses()
        assert len(handle.dose.classes) == 1


@pytest.mark.parametrize("more", [{}, {"nesterov": True}, {"dampening": 0.5}])
def test_coupled_decay_under_momentum(more: dict[str, Any]) -> None:
    """To first order each gradient acts (1 − dampening)/(1 − momentum) times."""
    model = net()
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=0.9, **more)
    started = Started(model)
    with wdhook.attach(model, λ, at="step") as handle:
        for _ in range(2000):
            step(model, optimizer)
        gain = (1 - more.get("dampening", 0)) / (1 - 0.9)
        assert handle.dose["0.weight"] == pytest.approx(2000 * 1e-4 * λ * gain, rel=1e-3)
        measured = -math.log((model[0].weight / started.before["0.weight"]).mean().item())
    # The first 1/(1 − momentum) of the steps act less, and so do the last: 10 of 2,000, doubled.
    assert handle_dose(2000, gain) == pytest.approx(measured, rel=1e-2)


def handle_dose(steps: int, gain: float) -> float:
    """By the formula."""
    return -steps * math.log1p(-1e-4 * λ * gain)


def test_coupled_decay_under_another_optimizer_is_not_known() -> None:
    """Adam divides the decay by the size of the gradient; the sentence says so."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="coupled") as handle:
        step(model, optimizer)
        dose = handle.dose
    assert dict(dose) == {"0.weight": None, "1.weight": None}
    assert dose.largest is None
    assert "λ 0.05, 2 weights: not known" in str(dose)
    assert "torch.optim.SGD alone" in str(dose)


@SECOND
@pytest.mark.parametrize("at", MOMENTS)
def test_accumulation_counts_once(at: str) -> None:
    """One optimizer step is one step, of however many micro-batches."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR)
    started = Started(model)
    with wdhook.attach(model, λ, mode="decoupled", at=at, optimizer=optimizer) as handle:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                still(model).backward()
            optimizer.step()
        assert handle.dose == started.doses()


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_paused_steps_do_not_count(mode: str, at: str) -> None:
    """Neither a whole paused step nor the parts of one."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR)
    started = Started(model)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer) as handle:
        step(model, optimizer)
        with handle.paused():
            step(model, optimizer)
        step(model, optimizer)
        assert handle.dose == started.doses()
        assert handle.dose["0.weight"] == pytest.approx(-2 * math.log1p(-LR * λ), **CLOSE)


@SECOND
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_skipped_steps_do_not_count(mode: str, at: str, fused: bool) -> None:
    """A GradScaler skips a step: by itself, or inside of the kernel of a fused optimizer."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    started = Started(model)
    given = scaler if mode == "coupled" and at == "backward" else None
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer, scaler=given) as handle:
        for batch in range(4):
            optimizer.zero_grad()
            scaler.scale(still(model)).backward()
            if batch == 1:
                model[0].weight.grad.fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
        assert handle.dose == started.doses()
        assert handle.dose["0.weight"] == pytest.approx(-3 * math.log1p(-LR * λ), **CLOSE)


def test_several_optimizers() -> None:
    """Each counts its own steps."""
    model = net()
    first, second = (SGD(layer.parameters(), lr=LR) for layer in model)
    started = Started(model)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        step(model, first, second)
        step(model, first)
        assert handle.dose == started.doses()
        assert len(handle.dose.classes) == 2


def test_two_optimizers_of_one_parameter() -> None:
    """The steps of both count, whatever else each of them owns."""
    model = net()
    both, second = SGD(model.parameters(), lr=LR), SGD(model[1].parameters(), lr=LR / 2)
    started = Started(model)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        for _ in range(3):
            step(model, both)
            step(model, second)
        assert handle.dose == started.doses()


@pytest.mark.parametrize("at", MOMENTS)
def test_a_wrapper_counts_once(at: str) -> None:
    """The step of the optimizer inside is the step."""
    model = net()
    inside = SGD(model.parameters(), lr=LR)
    optimizer = Wrapper(inside)
    started = Started(model)
    with wdhook.attach(model, λ, mode="independent", at=at, optimizer=optimizer) as handle:
        for _ in range(3):
            step(model, optimizer)
        assert handle.dose == started.doses()


def test_an_optimizer_for_each_parameter_in_the_backward_pass() -> None:
    """Each counts its own steps, also after a checkpoint in which all doses are one number."""
    model = net(4)
    optimizers = {param: SGD([param], lr=LR) for param in model.parameters()}

    def take(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    started = Started(model)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        for param in optimizers:
            param.register_post_accumulate_grad_hook(take)
        for _ in range(3):
            still(model).backward()
        assert handle.dose == started.doses()
        handle.load_state_dict(handle.state_dict())
        for _ in range(2):
            still(model).backward()
        assert handle.dose == started.doses()


def test_cautious_decay_is_a_bound() -> None:
    """What the mask spares is counted as if it had been taken."""
    model = perceptron(torch.float64)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0)
    with wdhook.attach(model, λ, mode="decoupled", at="step", cautious=True) as handle:
        train(model, optimizer, batches(model, 3))
        assert handle.dose.largest == pytest.approx(-3 * math.log1p(-LR * λ), **CLOSE)


def test_deferred_decay_counts_in_its_step() -> None:
    """In bfloat16 nothing is written for many steps, and each of them is counted."""
    model = net().bfloat16()
    optimizer = SGD(model.parameters(), lr=1e-3)
    started = Started(model)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        for _ in range(50):
            step(model, optimizer)
        assert torch.equal(model[0].weight, started.before["0.weight"])
        assert handle.dose["0.weight"] == pytest.approx(-50 * math.log1p(-1e-3 * λ), **CLOSE)


def test_a_rate_that_takes_everything() -> None:
    """lr·λ of 1 leaves nothing: an infinite dose, and a share of 0."""
    model = net()
    optimizer = SGD(model.parameters(), lr=1.0)
    with wdhook.attach(model, 1.0, mode="decoupled", at="step") as handle:
        step(model, optimizer)
        dose = handle.dose
    assert dose.largest == math.inf
    assert dose.classes[0].share == 0.0
    assert "less than 0.1 %" in str(dose)


# -- tensors come and go ---------------------------------------------------------------------------


def by_itself(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer is made anew."""
    return SGD(model.parameters(), lr=LR)


def split(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """One of the layers gets a learning rate of its own."""
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": LR / 2})
    return optimizer


def assign(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """New parameters of the same values, in a new optimizer."""
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return SGD(model.parameters(), lr=LR)


@pytest.mark.parametrize("change", [by_itself, split, assign])
def test_the_dose_belongs_to_the_parameter(change: Callable[..., Any]) -> None:
    """It goes on, whatever becomes of the optimizer, the group and the tensor."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR)
    started = Started(model)
    with wdhook.attach(model, λ, mode="corrected", at="step") as handle:
        step(model, optimizer)
        optimizer = change(model, optimizer)
        gc.collect()
        step(model, optimizer)
        step(model, optimizer)
        assert handle.dose == started.doses()


def test_a_new_layer_begins_at_0() -> None:
    """A head that comes later has its own dose."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        step(model, optimizer)
        model.append(nn.Linear(3, 3, bias=False).double())
        optimizer.add_param_group({"params": model[2].parameters()})
        started = Started(model)
        step(model, optimizer)
        assert handle.dose["2.weight"] == started.doses()["2.weight"]
        assert handle.dose["0.weight"] == pytest.approx(-2 * math.log1p(-LR * λ), **CLOSE)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_dose() -> None:
    """3 steps, a checkpoint, 2 steps: the dose of 5, of parameters that had different ones."""
    model = net()
    started = Started(model)
    first = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        step(model, first, SGD(model[1].parameters(), lr=LR))
        step(model, first)
        state = pickle.loads(pickle.dumps(handle.state_dict()))
    second = SGD(model.parameters(), lr=LR / 2)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        handle.load_state_dict(state)
        assert handle.dose == started.doses()
        assert handle.state_dict()["doses"] == state["doses"]
        for _ in range(2):
            step(model, second)
        assert handle.dose == started.doses()
        handle.load_state_dict(state)  # training goes back
        assert handle.state_dict()["doses"] == state["doses"]


def test_a_state_of_before_doses_says_nothing_of_them() -> None:
    """It loads, and the dose is not known: no number in place of one."""
    model = net()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        step(model, optimizer)
        state = handle.state_dict()
        del state["doses"]
        handle.load_state_dict(state)
        step(model, optimizer)
        assert set(handle.dose.values()) == {None}
        assert "checkpoint" in str(handle.dose)
        state = handle.state_dict()
        handle.load_state_dict(state)
        assert set(handle.dose.values()) == {None}


# -- what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["coupled", *SHRINKING])
def test_nothing_is_read_in_a_step(mode: str) -> None:
    """A learning rate on a device stays there; what was counted there is read when asked."""
    model = net()
    optimizer = SGD(model.parameters(), lr=torch.tensor(LR, dtype=torch.float64), foreach=False)
    with wdhook.attach(model, λ, mode=mode, at="step", optimizer=optimizer) as handle:
        started = Started(model)
        step(model, optimizer)
        view = handle._engine.state.optimizers.views()[0]
        before = handle.dose["0.weight"]
        assert before == started.doses()["0.weight"]
        tally = next(view.all_buckets())[0].tally
        with NoReading():
            tally.count(torch.tensor(0.5), torch.device("cpu"), replayed=False)
        assert handle.dose["0.weight"] == pytest.approx(before + math.log(2), **CLOSE)


def test_counting_costs_a_param_group_and_no_tensor() -> None:
    """A hundred parameters cost as many calls as one."""

    def cost(layers: int) -> int:
        model = net(layers)
        optimizer = SGD(model.parameters(), lr=LR)
        with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
            step(model, optimizer)
            still(model).backward()
            (view,) = handle._engine.state.optimizers.views()
            for _, entry in view.pairs():
                entry.stamp = view.clock.steps
            from wdhook._decay.steps import Part

            part = Part(handle._engine, optimizer)
            return calls(part._count)

    assert cost(100) == cost(1)


def test_a_graph_that_is_replayed_hides_its_steps() -> None:
    """Python's numbers do not count in a replay; the dose is not known then."""
    tally = Tally()
    tally.count(0.5, None, replayed=False)
    tally.count(0.5, torch.device("cpu"), replayed=True)  # not captured now: this number stays
    assert tally.read() == pytest.approx(2 * math.log(2))
    tally.count(0.5, None, replayed=True)
    assert tally.read() is None


# -- words -----------------------------------------------------------------------------------------


def test_unannounced_steps_are_not_known() -> None:
    """A loop without an optimizer: the decay is done, and nobody hears of a step."""
    model = net()
    with wdhook.attach(model, λ, mode="decoupled", at="backward", lr=LR) as handle:
        for _ in range(2):
            zero(model, to_none=True)
            loss_of_lines(model).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad * LR)
        assert set(handle.dose.values()) == {None}


def loss_of_lines(model: nn.Module) -> Tensor:
    """A loss that moves every parameter."""
    return sum(((p - 1).square().sum() for p in model.parameters()), torch.zeros(()))


def test_words_and_json() -> None:
    """One line where there is one class; what is frozen, and what has no λ, is not in it."""
    model = perceptron(torch.float64)
    model[0].weight.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=1e-5)
    with wdhook.attach(
        model, λ, mode="decoupled", at="step", overrides={"5.weight": 0.0}
    ) as handle:
        assert str(handle.dose).startswith("Dose so far: λ 0.05, 1 weight: 0; ")
        zero(model, to_none=True)
        loss_of(model, batches(model, 1)[0]).backward()
        optimizer.step()
        dose = handle.dose
    assert list(dose) == ["3.weight"]
    assert str(dose) == (
        "Dose so far: λ 0.05, 1 weight: 5e-07; decay alone leaves 100 %: decay has no effect"
    )
    assert dose.to_dict()["classes"][0]["half_lives"] == pytest.approx(5e-7 / math.log(2), rel=1e-6)
    with pytest.raises(wdhook.WdhookError, match="removed"):
        _ = handle.dose
