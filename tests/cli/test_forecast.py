"""`doctor --steps`: the dose that is forecast is the dose that the run has had."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

import wdhook
from wdhook import cli
from wdhook._commands.forecast import Forecast
from wdhook._commands.training import Training

STEPS = 60


def model() -> nn.Sequential:
    """Two decayed weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))


def loss(net: nn.Module) -> Tensor:
    value: Tensor = net(torch.ones(2, 3)).square().sum()
    return value


def groups(net: nn.Sequential) -> list[dict[str, Any]]:
    """Two param groups with a learning rate each."""
    return [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.02}]


# -- against real runs -----------------------------------------------------------------------------


def warm_up_and_cosine(optimizer: Optimizer) -> Any:
    """Two schedulers in one, as language models have them."""
    parts = [schedulers.LinearLR(optimizer, 0.1, 1.0, total_iters=10)]
    parts.append(schedulers.CosineAnnealingLR(optimizer, STEPS - 10))
    return schedulers.SequentialLR(optimizer, parts, [10])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, STEPS),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1),
    "warm-up and cosine": warm_up_and_cosine,
    "a function": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("mode", ["coupled", "decoupled", "independent", "corrected"])
@pytest.mark.parametrize("λ", [0.1, wdhook.schedules.linear(0.0, 0.2, steps=40)], ids=str)
def test_the_forecast_is_the_dose_of_the_run(mode: str, name: str, λ: Any) -> None:
    """After one step the dose of all steps is known, to the last digits."""
    net = model()
    optimizer = SGD(groups(net), lr=0.01)
    scheduler = SCHEDULERS[name](optimizer)
    given = [] if scheduler is None else [scheduler]
    with wdhook.attach(net, λ, mode=mode, at="step") as decay:
        training = Training(net, [optimizer], lambda: loss(net), None, given)
        forecast = Forecast(training, STEPS, every=1)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()
            if step == 0:
                assert decay._engine is not None
                forecast.look([decay._engine])
            if scheduler is not None:
                scheduler.step()
        found = {name: one.dose for one in forecast.strands for name in one.names}
        # Without schedules one product stands for 60 sums.
        assert found == pytest.approx(dict(decay.dose), rel=1e-12)


def test_a_scheduler_that_is_stepped_once_an_epoch() -> None:
    """Ten steps of the optimizer for each of the scheduler."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    with wdhook.attach(net, 0.1, mode="decoupled", at="step") as decay:
        forecast = Forecast(
            Training(net, [optimizer], lambda: loss(net), None, [scheduler]), 30, every=10
        )
        loss(net).backward()
        optimizer.step()
        assert decay._engine is not None
        forecast.look([decay._engine])
    rates = [0.1, 0.05, 0.025]
    expected = -10 * sum(math.log1p(-lr * 0.1) for lr in rates)
    assert forecast.strands[0].dose == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == 0.1  # a copy was stepped
    assert scheduler.last_epoch == 0


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Runs the command on a function; gives the exit status and what was printed."""
    module = types.ModuleType("its_run")
    sys.modules["its_run"] = module

    def run(make: Callable[[], Any], *arguments: str) -> tuple[int, str]:
        module.make = make  # type: ignore[attr-defined]
        status = cli.main(["doctor", "its_run:make", *arguments])
        streams = capsys.readouterr()
        return status, streams.out + streams.err

    yield run
    del sys.modules["its_run"]


def fine_tuning() -> Any:
    """lr 2e-5 falls to 0 in 3,000 steps."""
    net = model()
    optimizer = AdamW(net.parameters(), lr=2e-5, weight_decay=0)
    scheduler = schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=3000)
    return net, optimizer, scheduler, lambda: loss(net)


DECOUPLED = ("--mode", "decoupled", "--weight-decay", "0.01", "--steps", "3000")


def test_decay_that_does_nothing(doctor: Callable[..., Any]) -> None:
    """A note says so, and which λ would do something; the exit status is that of a healthy run."""
    status, text = doctor(fine_tuning, *DECOUPLED)
    assert status == 0
    assert "dose of 3,000 optimizer steps (LinearLR: a step for each of them):" in text
    assert "λ 0.01, lr 2e-5, 2 weights: 0.0003; decay alone leaves 99.97 %" in text
    assert "note: Decay has no effect in 3,000 steps" in text
    assert "λ = 3.3 would leave 90.5 %; λ = 33 would leave 36.8 %" in " ".join(text.split())
    assert "docs/how-much.md" in text


def test_the_json(doctor: Callable[..., Any]) -> None:
    """The numbers of the forecast, and null without `--steps`."""
    _, text = doctor(fine_tuning, *DECOUPLED, "--json")
    found = json.loads(text)
    assert {key: found["dose"][key] for key in ("steps", "schedulers", "scheduler_every")} == {
        "steps": 3000,
        "schedulers": ["LinearLR"],
        "scheduler_every": 1,
    }
    (one,) = found["dose"]["classes"]
    assert one["parameters"] == ["0.weight", "1.weight"]
    assert one["dose"] == pytest.approx(0.01 * 2e-5 * 3001 / 2, rel=1e-6)
    assert one["share"] == math.exp(-one["dose"])
    assert one["half_life"] == pytest.approx(3000 * math.log(2) / one["dose"])
    (note,) = found["findings"]
    assert (note["severity"], note["kind"], note["rule"]) == ("note", "dose", "")
    _, text = doctor(fine_tuning, *DECOUPLED[:4], "--json")
    assert json.loads(text)["dose"] is None


def test_decay_that_acts_gets_no_note(doctor: Callable[..., Any]) -> None:
    """From scratch: a line, and no finding."""

    def make() -> Any:
        net = model()
        return net, SGD(net.parameters(), lr=0.1), lambda: loss(net)

    status, text = doctor(make, *DECOUPLED)
    assert status == 0
    assert "2 weights: 3; decay alone leaves 4.97 %, half-life 693 steps" in text
    assert "0 errors, 0 warnings, 0 notes" in text


def test_decay_of_the_optimizer_itself(doctor: Callable[..., Any]) -> None:
    """Without a handle the numbers are those of the param groups."""

    def own(kind: Any, **more: Any) -> Callable[[], Any]:
        def make() -> Any:
            net = model()
            optimizer = kind(net.parameters(), lr=0.01, weight_decay=0.1, **more)
            return net, optimizer, lambda: loss(net)

        return make

    _, text = doctor(own(AdamW), "--steps", "1000")
    assert "param_groups[0]: 2 tensors: 1; decay alone leaves 36.8 %" in text
    _, text = doctor(own(SGD, momentum=0.9), "--steps", "100")
    assert "param_groups[0]: 2 tensors: 1; decay alone leaves 36.6 %" in text
    _, text = doctor(own(Adam), "--steps", "1000")
    assert "not known: under Adam coupled decay has no dose" in text
    if hasattr(torch.optim, "Adafactor"):  # since torch 2.5
        _, text = doctor(own(torch.optim.Adafactor), "--steps", "1000")
        assert "not known: its formula of decay is not known" in text


def test_schedulers_that_cannot_be_followed(doctor: Callable[..., Any]) -> None:
    """One that waits for a metric, and one of another library: said, and lr is taken as it is."""

    class Strange:
        def step(self) -> None: ...

        def get_last_lr(self) -> list[float]:
            return [0.0]

    def make() -> Any:
        net = model()
        optimizer = SGD(net.parameters(), lr=0.1)
        return net, optimizer, schedulers.ReduceLROnPlateau(optimizer), Strange(), lambda: loss(net)

    _, text = doctor(make, *DECOUPLED)
    text = " ".join(text.split())
    assert "ReduceLROnPlateau cannot be stepped without training" in text
    assert "Strange is unknown: its learning rate is taken as constant" in text
    assert "half-life 693 steps" in text


def test_coupled_decay_under_adam_has_no_dose(doctor: Callable[..., Any]) -> None:
    """The reason comes in place of a number."""
    _, text = doctor(fine_tuning, "--mode", "coupled", "--steps", "10")
    assert "not known: under AdamW coupled decay has no dose" in " ".join(text.split())


def test_a_step_that_fails_has_no_dose(doctor: Callable[..., Any]) -> None:
    """Double decay is an error before the dose is asked for."""

    def make() -> Any:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        return net, AdamW(net.parameters(), lr=0.1), lambda: loss(net)

    status, text = doctor(make, "--steps", "10", "--mode", "decoupled")
    assert status == 1
    assert "error: The optimizer decays a parameter that wdhook decays too." in " ".join(
        text.split()
    )


@pytest.mark.parametrize("number", ["0", "-1", "3e3", "x"])
def test_numbers_of_steps(
    number: str, doctor: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole, and above 0."""
    with pytest.raises(SystemExit):
        doctor(fine_tuning, f"--steps={number}")
    assert f"must be a whole number above 0, got '{number}'" in capsys.readouterr().err
