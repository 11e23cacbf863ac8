"""Random event strings on real models, against `torch.optim` with param groups."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from twins import (
    LR,
    assert_bit_equal,
    assert_close,
    batches,
    loss_of,
    own_groups,
    perceptron,
    twins,
    zero,
    λ,
)

import wdhook

BACKWARD, STEP, NONE, ZERO = "bsn0"


def sensible(events: str) -> bool:
    """Whether every step reads a gradient of its own: zeroed since the last step, and then
    computed."""
    fresh = used = False
    for event in events:
        if event == BACKWARD:
            if used:
                return False  # adds to a gradient that a step has used
            fresh = True
        elif event == STEP:
            if not fresh:
                return False  # reads a gradient that was zeroed or used
            fresh, used = False, True
        else:
            fresh = used = False
    return STEP in events


def random_strings(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        events = "".join(chance.choice("bbbss0n") for _ in range(chance.randint(3, 14)))
        if sensible(events):
            found.append(events)
    return found


def play(events: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = iter(batches(model, len(events)))
    for event in events:
        if event == BACKWARD:
            loss_of(model, next(inputs)).backward()
        elif event == STEP:
            optimizer.step()
        else:
            zero(model, to_none=event == NONE)


def run(events: str, mode: str, at: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The model trained with wdhook, and its twin with the optimizer's own decay."""
    model, twin = twins(perceptron(dtype))
    kind = torch.optim.SGD if mode == "coupled" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=LR, weight_decay=0)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
        play(events, model, optimizer)
    play(events, twin, kind(own_groups(twin), lr=LR))
    return model, twin


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("seed", range(4))
def test_random_events_at_step_are_bit_equal(mode: str, seed: int) -> None:
    """At "step", any order of backward, step and both kinds of zeroing equals param groups to the
    last bit."""
    for events in random_strings(40, seed):
        model, twin = run(events, mode, "step", torch.float32)
        assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("seed", range(4))
def test_random_events_at_backward_are_equal_up_to_summation_order(seed: int) -> None:
    """At "backward", g₁ + λp + g₂ takes the place of g₁ + g₂ + λp: equal up to the order of
    summation."""
    # Each of at most 14 events rounds values below 10 a few times in float64 (2⁻⁵³ ≈ 1.1e-16
    # relative), and the
    # learning rate is below 1: 14 · 10 · 10 · 1.1e-16 < 2e-13, and a step passes errors on at most
    # tenfold.
    for events in random_strings(40, 100 + seed):
        model, twin = run(events, "coupled", "backward", torch.float64)
        assert_close(model.state_dict(), twin.state_dict(), 2e-12)


@pytest.mark.parametrize("skipped", ["n", "0"])
def test_a_skipped_step_is_decayed_in_the_next(skipped: str) -> None:
    """A gradient that was thrown away takes its decay with it: the next one is decayed again, bit
    for bit."""
    for events in (f"b{skipped}bs", f"b{skipped}b{skipped}bsnbs", f"bsnb{skipped}bs"):
        model, twin = run(events, "coupled", "backward", torch.float32)
        assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("change", ["clip", "halve", "zero"])
def test_a_gradient_changed_in_place_between_micro_batches(change: str) -> None:
    """Clipping each micro-batch keeps the one decay there is, zeroing makes room for a new one."""
    model, twin = twins(perceptron(torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    reference = torch.optim.SGD(twin.parameters(), lr=LR)
    decay = wdhook.attach(model, λ)

    def train(m: nn.Module, o: torch.optim.Optimizer, step: int) -> None:
        for i, batch in enumerate(batches(m, 3, seed=step)):
            loss = loss_of(m, batch)
            if m is twin and (i == 0 or change == "zero"):
                loss = loss + wdhook.l2_penalty(twin, λ)
            loss.backward()
            if change == "clip":
                nn.utils.clip_grad_norm_(m.parameters(), 0.01)
            elif change == "halve":
                torch._foreach_mul_([p.grad for p in m.parameters()], 0.5)
            elif i < 2:
                zero(m, to_none=False)
        o.step()
        zero(m, to_none=True)

    told = pytest.warns(wdhook.WdhookWarning, match="was changed in place")
    with nullcontext() if change == "zero" else told:
        for step in range(3):
            train(model, optimizer, step)
            train(twin, reference, step)
    decay.remove()
    assert_close(
        model.state_dict(), twin.state_dict(), 1e-13
    )  # 9 sums of numbers below 10 in float64


def test_one_part_is_zeroed_while_another_accumulates() -> None:
    """Two parts, two optimizers, one handle: one part throws its gradients away, the other clips
    and goes on."""
    results = []
    for own in (True, False):
        g, d = (nn.Sequential(*perceptron(torch.float64, seed)) for seed in (1, 2))
        both = nn.ModuleList([g, d])
        optimizers = [torch.optim.SGD(own_groups(m, λ if own else 0.0), lr=LR) for m in (g, d)]
        handle = None if own else wdhook.attach(both, λ)
        for x, y in (batches(g, 2, seed) for seed in range(3)):
            (loss_of(g, x) + loss_of(d, x)).backward()
            nn.utils.clip_grad_norm_(
                both.parameters(), 100.0
            )  # changes every gradient, by a factor of one
            zero(d, to_none=False)
            loss_of(d, y).backward()
            optimizers[1].step()
            loss_of(g, y).backward()
            optimizers[0].step()
            zero(both, to_none=True)
        if handle is not None:
            handle.remove()
        results.append(both.state_dict())
    assert_close(*results, 1e-13)  # other orders of a few sums in float64


def test_zeroed_in_place_and_not_reached_again() -> None:
    """A gradient that a skipped step left as zeros, and the next backward does not touch, is
    decayed at the step."""
    model, twin = twins(nn.ModuleList([perceptron(seed=s) for s in (1, 2)]))

    def play(m: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in batches(m[0], 3):
            (loss_of(m[0], batch) + loss_of(m[1], batch)).backward()
            zero(m, to_none=False)
            loss_of(m[0], batch).backward()
            optimizer.step()
            zero(m, to_none=False)

    with wdhook.attach(model, λ):
        play(model, torch.optim.SGD(model.parameters(), lr=LR))
    play(twin, torch.optim.SGD(own_groups(twin), lr=LR))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_a_lone_parameter_that_cannot_tell_says_so() -> None:
    """With one parameter there is no other gradient to ask: the hook decays again, and warns."""
    model = nn.Linear(3, 1, bias=False)
    with wdhook.attach(model, λ):
        model(torch.ones(1, 3)).sum().backward()
        model.weight.grad.zero_()
        with pytest.warns(wdhook.WdhookWarning, match=r"zeroed.*weight.*at=\"step\"|weight"):
            model(torch.ones(1, 3)).sum().backward()
        assert torch.equal(model.weight.grad, torch.add(torch.ones(1, 3), model.weight, alpha=λ))


def test_an_exception_in_mid_backward_is_repeated_without_harm() -> None:
    """A backward pass that raised half way and is run again decays each parameter once."""

    class Fails(torch.autograd.Function):
        fail = True

        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
            if Fails.fail:
                raise RuntimeError("out of memory, say")
            return g

    for to_none in (True, False):
        model, twin = twins(perceptron())
        for m in (model, twin):
            m.insert(3, _Lambda(Fails.apply))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        reference = torch.optim.SGD(own_groups(twin), lr=LR)
        with wdhook.attach(model, λ):
            for m, o in ((model, optimizer), (twin, reference)):
                for step, batch in enumerate(batches(m, 3)):
                    Fails.fail = step == 1
                    try:
                        loss_of(m, batch).backward()
                    except RuntimeError:
                        Fails.fail = False
                        zero(m, to_none)
                        loss_of(m, batch).backward()
                    o.step()
                    zero(m, to_none)
        assert_bit_equal(model.state_dict(), twin.state_dict())


class _Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_the_comparison_can_fail() -> None:
    """Bit equality raises for one bit, and for a run in which one decay is missing."""
    model, twin = twins(perceptron())
    with torch.no_grad():
        twin[0].weight[0, 0] += 1e-7
    with pytest.raises(AssertionError, match=r"0\.weight differs"):
        assert_bit_equal(model.state_dict(), twin.state_dict())
    with pytest.raises(AssertionError, match=r"0\.weight differs"):
        assert_close(model.state_dict(), twin.state_dict(), 1e-9)
    model, twin = twins(perceptron())
    play("bsnbs", model, torch.optim.SGD(own_groups(model), lr=LR))
    play("bsnbs", twin, torch.optim.SGD(own_groups(twin, 0.0), lr=LR))
    with pytest.raises(AssertionError, match="differs"):
        assert_bit_equal(model.state_dict(), twin.state_dict())


def test_what_has_no_hook_tells_nothing() -> None:
    """Frozen at `attach`, decayed in a step that raised, zeroed in place, unfrozen: it may hold a
    new gradient."""
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("one", "two", "three")})
    one, two, three = (layer.weight for layer in model.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    one.requires_grad_(False)

    def stop(*_: object) -> None:
        raise ZeroDivisionError

    def backward(*names: str) -> None:
        for name in names:
            model[name](torch.ones(2, 3)).sum().backward()

    with wdhook.attach(model, λ):
        one.grad = torch.ones_like(one)
        backward("two", "three")
        with optimizer.register_step_pre_hook(stop), pytest.raises(ZeroDivisionError):
            optimizer.step()
        zero(model, to_none=False)
        one.requires_grad_(True)
        backward("one", "two", "three")
        for weight in (two, three):
            assert torch.equal(weight.grad, torch.full_like(weight, 2.0).add(weight, alpha=λ))
        before = one.detach().clone()
        optimizer.step()
        assert torch.equal(one.grad, torch.full_like(before, 2.0).add(before, alpha=λ))
