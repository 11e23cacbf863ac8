"""λ as a function of the step: by the steps of the optimizer that owns a parameter, and on after a
resume."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
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
    zero,
)

import wdhook
from wdhook import schedules

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
STEPS = 6


def bent(step: int) -> float:
    """Any callable will do."""
    return (0.0, 0.1, 0.4, 0.2, 0.0, 0.3)[step % STEPS]


def dino(base: float, final: float, total: int) -> list[float]:
    """DINOv2's `CosineScheduler` without warm-up and freezing, by the book."""
    return [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * (i / total))) for i in range(total)
    ]


def test_the_schedules_that_are_there() -> None:
    """Constant, a line and half a cosine; each stays at its end."""
    assert [schedules.constant(0.1)(step) for step in (0, 1, 10)] == [0.1] * 3
    assert [schedules.linear(0.5, 0.0, 4)(step) for step in range(7)] == [
        0.5,
        0.375,
        0.25,
        0.125,
        0.0,
        0.0,
        0.0,
    ]
    assert [schedules.cosine(0.04, 0.4, 10)(step) for step in range(10)] == dino(0.04, 0.4, 10)
    assert schedules.cosine(0.04, 0.4, 10)(10) == schedules.cosine(0.04, 0.4, 10)(99) == 0.4


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: schedules.constant(-1.0), ["`weight_decay`", "-1.0"]),
        (lambda: schedules.linear(float("nan"), 0.1, 5), ["`start`", "nan"]),
        (lambda: schedules.cosine(0.1, "much", 5), ["`end`", "much"]),  # type: ignore[arg-type]
        (lambda: schedules.linear(0.0, 0.1, 0), ["`steps`", "0"]),
        (lambda: schedules.cosine(0.0, 0.1, 2.5), ["`steps`", "2.5"]),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_schedule(make: Callable[[], Any], parts: list[str]) -> None:
    """Errors name the argument and what was given."""
    with pytest.raises(wdhook.ArgumentError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts)


def test_schedules_can_be_pickled_and_read() -> None:
    """They travel to other processes in callbacks, and say what they are."""
    schedule = schedules.cosine(0.04, 0.4, 10)
    assert [pickle.loads(pickle.dumps(schedule))(step) for step in range(12)] == [
        schedule(step) for step in range(12)
    ]
    assert "start=0.04, end=0.4, steps=10" in repr(schedule)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (SGD, {"at": "step"}),
        (SGD, {"at": "backward"}),
        (AdamW, {"at": "step", "mode": "decoupled"}),
        (AdamW, {"at": "backward", "mode": "decoupled"}),
    ],
)
def test_equals_a_weight_decay_that_is_set_by_hand(
    kind: Any, how: dict[str, str], micro: int
) -> None:
    """Bit for bit the optimizer's own decay, whose param group gets the λ of each step before
    it."""
    if micro > 1 and how["at"] == "backward":
        how = {**how, "at": "step"}  # sums of micro-batches in another order are not bit-equal
    ours, own = twins(perceptron())
    optimizer, reference = (
        kind(ours.parameters(), lr=LR, weight_decay=0.0),
        kind(own_groups(own), lr=LR),
    )
    done = 0

    def set_by_hand() -> None:
        nonlocal done
        done += 1
        reference.param_groups[0]["weight_decay"] = bent(done)

    reference.param_groups[0]["weight_decay"] = bent(0)
    with wdhook.attach(ours, bent, optimizer=optimizer, **how) as handle:
        assert handle.weight_decay == handle.plan["0.weight"].weight_decay == bent(0)
        train(ours, optimizer, batches(ours, micro * STEPS), micro=micro)
        assert handle.weight_decay == handle.plan["0.weight"].weight_decay == bent(STEPS)
    train(own, reference, batches(own, micro * STEPS), micro=micro, after_step=set_by_hand)
    assert_bit_equal(ours.state_dict(), own.state_dict())


def test_obeys_exclusions_and_absolute_λ() -> None:
    """What does not follow λ keeps its own."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(
        model, bent, overrides={"0.weight": 0.7, "3.weight": 0.0, "5.bias": True}
    ) as handle:
        train(model, optimizer, batches(model, 2))
        λs = {
            name: decision.weight_decay
            for name, decision in handle.plan.items()
            if decision.weight_decay
        }
    assert λs == {"0.weight": 0.7, "5.weight": bent(2), "5.bias": bent(2)}


@pytest.mark.parametrize("at", ["step", "backward"])
def test_each_optimizer_counts_its_own_steps(at: str) -> None:
    """A GAN's critic steps more often than the generator; its λ goes on faster."""
    ours, own = twins(perceptron())
    pairs = [(ours[0], own[0]), (ours[2:], own[2:])]
    steppers = [(SGD(mine.parameters(), lr=LR), SGD(own_groups(its), lr=LR)) for mine, its in pairs]
    done = [0, 0]
    with wdhook.attach(ours, bent, at=at):
        for i, batch in enumerate(batches(ours, STEPS)):
            for model in (ours, own):
                zero(model, to_none=True)
                loss_of(model, batch).backward()
            for index in (0, 1) if i % 3 == 0 else (1,):
                mine, its = steppers[index]
                its.param_groups[0]["weight_decay"] = bent(done[index])
                mine.step()
                its.step()
                done[index] += 1
    assert done == [2, STEPS]
    assert_bit_equal(ours.state_dict(), own.state_dict())


class Nested(SGD):
    """An optimizer whose step is twice that of its parent class."""

    def step(self, closure: Any = None) -> Any:
        """Once more."""
        return super().step(closure)


def test_a_step_within_a_step_is_one() -> None:
    """`super().step()` is heard twice and counted once."""
    model = perceptron()
    with wdhook.attach(model, bent, at="step") as handle:
        train(model, Nested(model.parameters(), lr=LR), batches(model, 3))
        assert handle.weight_decay == bent(3)


@pytest.mark.parametrize("at", ["step", "backward"])
def test_a_new_optimizer_goes_on(at: str) -> None:
    """Gradual unfreezing makes optimizers anew: λ does not begin again, for parameters that were
    trained before."""
    ours, own = twins(perceptron())
    done = 0
    with wdhook.attach(ours, bent, at=at) as handle:
        for part in (5, 3, 0):
            trained = [(model[part:], model) for model in (ours, own)]
            steppers = [
                SGD(trained[0][0].parameters(), lr=LR),
                SGD(own_groups(trained[1][0]), lr=LR),
            ]
            for batch in batches(ours, 2):
                steppers[1].param_groups[0]["weight_decay"] = bent(done)
                for (_, model), stepper in zip(trained, steppers, strict=True):
                    zero(model, to_none=True)
                    loss_of(model, batch).backward()
                    stepper.step()
                done += 1
        assert handle.weight_decay == bent(done) == bent(6)
    assert_bit_equal(ours.state_dict(), own.state_dict())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("at", ["step", "backward"])
def test_a_skipped_step_does_not_count(at: str, fused: bool) -> None:
    """Under a GradScaler an overflow skips the step, on the host or (fused) on the device."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with wdhook.attach(model, bent, at=at, scaler=scaler if at == "backward" else None) as handle:
        for factor in (1.0, float("inf"), 1.0):
            zero(model, to_none=True)
            scaler.scale(loss_of(model, batches(model, 1)[0]) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert handle.weight_decay == bent(2)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("at", ["step", "backward"])
def test_goes_on_after_a_resume(at: str, split: bool) -> None:
    """Six steps are three, a checkpoint, and three with a new handle and optimizers; also where
    one steps seldom."""

    def start(model: Any) -> tuple[list[torch.optim.Optimizer], wdhook.WeightDecay]:
        parts = [model[0], model[2:]] if split else [model]
        return [SGD(part.parameters(), lr=LR) for part in parts], wdhook.attach(model, bent, at=at)

    def go(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
        for i in steps:
            zero(model, to_none=True)
            loss_of(model, batches(model, STEPS)[i]).backward()
            for index, optimizer in enumerate(optimizers):
                if len(optimizers) == 1 or index or i % 2 == 0:
                    optimizer.step()

    whole, broken = twins(perceptron())
    optimizers, handle = start(whole)
    go(whole, optimizers, range(STEPS))
    final = handle.weight_decay
    handle.remove()

    optimizers, handle = start(broken)
    go(broken, optimizers, range(STEPS // 2))
    state = pickle.loads(pickle.dumps(handle.state_dict()))
    handle.remove()
    resumed = copy.deepcopy(broken)
    optimizers, handle = start(resumed)
    handle.load_state_dict(state)
    assert handle.state_dict() == state  # nothing is lost while it waits for the optimizers
    go(resumed, optimizers, range(STEPS // 2, STEPS))
    assert handle.weight_decay == final
    handle.remove()
    assert_bit_equal(whole.state_dict(), resumed.state_dict())

    optimizers, handle = start(broken)  # without the state it is another run
    go(broken, optimizers, range(STEPS // 2, STEPS))
    handle.remove()
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(whole.state_dict(), broken.state_dict())


def test_loading_goes_back_too() -> None:
    """A state of before the first step makes a schedule begin again, in optimizers that have
    stepped since."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, bent) as handle:
        state = handle.state_dict()
        train(model, optimizer, batches(model, 3))
        handle.load_state_dict(state)
        assert handle.weight_decay == bent(0)
        zero(model, to_none=True)
        (sum(p.sum() for p in model.parameters()) * 0).backward()
        assert not any(w.grad.any() for w in weights(model))  # bent(0) is 0
        optimizer.step()
        assert handle.weight_decay == bent(1)


def test_what_came_after_the_checkpoint_follows_its_optimizer() -> None:
    """A head that the checkpoint does not know has the λ of the optimizer that it is in now."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, bent) as handle:
        train(model, optimizer, batches(model, 3))
        state = handle.state_dict()
        model.append(head := nn.Linear(2, 2))
        optimizer.add_param_group({"params": list(head.parameters())})
        train(model, optimizer, batches(model, 2))
        handle.load_state_dict(state)
        zero(model, to_none=True)
        (sum(p.sum() for p in model.parameters()) * 0).backward()
        assert torch.equal(head.weight.grad, bent(3) * head.weight)
        assert torch.equal(model[0].weight.grad, bent(3) * model[0].weight)


def test_a_number_cannot_be_set_over_a_schedule() -> None:
    """Loud: the next step would set it back."""
    handle = wdhook.attach(perceptron(), schedules.linear(0.0, 0.1, 5))
    with (
        handle,
        pytest.raises(
            wdhook.ArgumentError, match=r"`weight_decay` follows the schedule[\s\S]*end=0.1"
        ),
    ):
        handle.weight_decay = 0.3
    handle.weight_decay = 0.3  # removed: nothing follows anything
    assert handle.weight_decay == 0.3


def test_a_state_without_steps_is_refused() -> None:
    """Saved with a number, loaded into a schedule: where it should go on is not known. The other
    way is a number."""
    with wdhook.attach(perceptron(), 0.1) as handle:
        numbers = handle.state_dict()
    with wdhook.attach(perceptron(), bent) as handle:
        followed = handle.state_dict()
        with pytest.raises(wdhook.ArgumentError, match="without a schedule"):
            handle.load_state_dict(numbers)
    with wdhook.attach(perceptron(), 0.1) as handle:
        handle.load_state_dict({**followed, "weight_decay": 0.2})
        assert handle.weight_decay == 0.2
        del followed["finished_steps"]  # as states of before there were schedules
        handle.load_state_dict({**followed, "weight_decay": 0.3})
        assert handle.weight_decay == 0.3


def test_what_a_schedule_returns_is_checked() -> None:
    """At `attach`, and at the end of the step before the one that would use it."""
    model = perceptron()
    with pytest.raises(wdhook.ArgumentError, match="must be a number"):
        wdhook.attach(model, lambda step: None)  # type: ignore[arg-type, return-value]
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, lambda step: 0.1 - 0.06 * step):
        train(model, optimizer, batches(model, 1))
        with pytest.raises(
            wdhook.ArgumentError, match=r"`weight_decay\(2\)` must be finite and not negative"
        ):
            train(model, optimizer, batches(model, 1))


class Unheard:
    """An object that steps, and is no torch Optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": LR}]

    @torch.no_grad()
    def step(self) -> None:
        """Plain gradient descent."""
        for param in self.param_groups[0]["params"]:
            param -= LR * param.grad


def test_steps_that_nobody_hears_are_loud() -> None:
    """A given one is refused; one that was not given is warned of, once, since the schedule would
    never go on."""
    model = perceptron()
    with pytest.raises(wdhook.ArgumentError, match="`weight_decay` is a schedule"):
        wdhook.attach(model, bent, optimizer=Unheard(model))  # type: ignore[arg-type]
    optimizer = Unheard(model)
    with wdhook.attach(model, bent), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(model, 1001):
            zero(model, to_none=True)
            loss_of(model, batch).backward()
            optimizer.step()
    assert [w.category for w in caught] == [wdhook.WdhookWarning]
    assert "stays at its beginning" in str(caught[0].message)


def test_gradients_before_training_are_no_reason_to_warn() -> None:
    """A look at a few gradients (an lr finder, a sanity check), then training: nothing is said."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, bent) as handle:
        for batch in batches(model, 500):
            zero(model, to_none=True)
            loss_of(model, batch).backward()
        train(model, optimizer, batches(model, 600))
        assert handle.weight_decay == bent(600)
