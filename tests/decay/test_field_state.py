"""State that outlives its facts: signs, errors in mid-step, peaks. One situation a test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from field import (
    DECAY,
    LR,
    RIGHT,
    RIGHT_OR_REFUSED,
    RIGHT_OR_TOLD,
    PlannedError,
    Wrapper,
    both_moments,
    check,
    everywhere,
    lines,
    pull,
    sgd,
    train_step,
    values,
)

import wdhook

# The sign ------------------------------------------------------------------------------------


@both_moments
def test_maximize_is_switched_on_between_two_steps(at: str) -> None:
    """`group["maximize"] = True` in mid-run, by hand: a minimax loop that turns round. The
    optimizer was given.

    "With maximize=True coupled decay is subtracted from the gradient that the optimizer negates:
    weights still shrink."
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, at=at, optimizer=optimizer)
        yield model
        for step in range(4):
            optimizer.param_groups[0]["maximize"] = step >= 2
            train_step(decay, model, optimizer, sign=-1 if step >= 2 else 1)
            yield model

    check(loop, RIGHT_OR_REFUSED)


def test_a_step_that_was_refused_is_tried_again() -> None:
    """Coupled at "backward", the optimizer maximizes and was not given: the step raises. The cell
    is run a second time.

    The decay in the gradient has the wrong sign still, so the second try has to be refused too (or
    to be right); not to step with it.
    """
    model = lines(1)
    optimizer = sgd(model.parameters(), maximize=True)
    wdhook.attach(model, DECAY)
    pull(model, 0.0).backward()
    before = model[0].weight.detach().clone()
    steps = 0
    for _ in range(3):
        try:
            optimizer.step()
            steps += 1
        except wdhook.WdhookError:
            assert steps or torch.equal(model[0].weight, before)
    assert not (model[0].weight.abs() > before.abs()).any(), "a decayed weight has grown"


# An exception inside a step ------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("where", ["inner step", "closure"])
def test_one_step_of_a_wrapper_raises_and_λ_is_a_schedule(mode: str, at: str, where: str) -> None:
    """A wrapper (Lookahead and its kin) around SGD; its first step raises once, in the inner step
    or in the closure.

    The loop catches that, zeroes and goes on, as for a batch that does not fit into memory. The
    steps that finish are the first, second and third: they use λ(0), λ(1), λ(2).
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        inside = sgd(model.parameters())
        optimizer = Wrapper(inside)
        decay.attach(
            model,
            wdhook.schedules.linear(1 / 8, 9 / 8, steps=8),
            mode=mode,
            at=at,
            optimizer=optimizer,
        )
        broken, done = [True], [0]

        def fail(*_: Any) -> None:
            if broken:
                broken.clear()
                raise PlannedError

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = pull(model)
            loss.backward()
            if where == "closure":
                fail()
            decay.now(weight_decay=(done[0] + 1) / 8)
            return loss

        if where == "inner step":
            inside.register_step_pre_hook(fail)
        yield model
        if where == "inner step":
            pull(model).backward()
        try:
            optimizer.step(closure if where == "closure" else None)
            raise AssertionError("the step was to raise")
        except PlannedError:
            optimizer.zero_grad()
        for done[0] in range(3):
            if where == "closure":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            yield model

    check(loop, RIGHT)


def test_lr_as_a_function_fails_for_the_second_group() -> None:
    """Decoupled, `lr=` is a function of the group that finds nothing in the second one:
    LearningRateError.

    Docs: "An error comes before anything is changed by the step": the first group has not been
    shrunk then.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd([{"params": list(layer.parameters())} for layer in model])
        optimizer.param_groups[0]["mine"] = LR
        decay.attach(model, mode="decoupled", at="step", lr=lambda group: group.get("mine"))
        yield model
        pull(model).backward()
        decay.now()
        optimizer.step()
        yield model

    check(loop, RIGHT_OR_REFUSED)


def test_the_decay_fails_half_way_and_the_step_is_tried_again() -> None:
    """Coupled at "step": torch refuses to change the second gradient in place; the user makes it
    anew and steps again.

    Whatever the first try did, after the step that succeeds both parameters have been decayed once.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, at="step", optimizer=optimizer)
        first, second = model.parameters()
        yield model
        first.grad = torch.full_like(first, 0.25)
        with torch.inference_mode():
            second.grad = torch.full_like(second, 0.25)
        decay.now(in_place=False)
        try:
            optimizer.step()
        except wdhook.WdhookError:
            raise
        except RuntimeError:
            second.grad = torch.full_like(second, 0.25)
            optimizer.step()
        yield model

    check(loop, RIGHT_OR_REFUSED)


# The peak of "independent" -------------------------------------------------------------------


@both_moments
def test_independent_a_group_is_deleted(at: str) -> None:
    """A layer is frozen and its group (lr 1/2) deleted; the other (lr 1/64) moves to its place in
    the list of groups.

    It has stepped with 1/64 alone, so it is at its peak: its share stays λ at every step.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(
            [{"params": [model[0].weight]}, {"params": [model[1].weight], "lr": 1 / 64}]
        )
        decay.attach(model, mode="independent", at=at, optimizer=optimizer)
        yield model
        for step in range(3):
            if step == 1:
                del optimizer.param_groups[0]
                model[0].weight.requires_grad_(False)
                model[0].weight.grad = None
            model.zero_grad()
            pull(model).backward()
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT)


@both_moments
def test_independent_a_new_optimizer_in_each_round(at: str) -> None:
    """Federated rounds make the optimizer anew, each with an eighth of the learning rate
    (alibaba/FederatedScope#580).

    Docs: the peak is the largest of "the learning rates seen so far", and a new optimizer "goes
    on". Whether a new, lower rate is a later part of one schedule or a new start, no program can
    know: forgetting the peak has to be said.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode="independent", at=at, optimizer=optimizer)
        yield model
        for part in range(2):
            lr = LR / 8**part
            optimizer = sgd(model.parameters(), lr=lr) if part else optimizer
            for _ in range(2):
                train_step(decay, model, optimizer, lr=lr, peak=LR)
                yield model

    check(loop, RIGHT_OR_TOLD)


@both_moments
def test_independent_a_range_test_and_the_state_of_the_handle_restored(at: str) -> None:
    """A learning rate range test up to 16; then model, optimizer and handle get back the state of
    before.

    pytorch-lr-finder#11. `load_state_dict` of the handle goes on as if the search had not been: the
    peak is the learning rate of the training, and the share is λ.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode="independent", at=at, optimizer=optimizer)
        parts = [part for part in (model, optimizer, decay.handle) if part is not None]
        states = [copy.deepcopy(part.state_dict()) for part in parts]
        yield model
        for lr in (1 / 64, 1 / 2, 16):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            pull(model).backward()
            optimizer.step()
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        for _ in range(3):
            train_step(decay, model, optimizer)
            yield model

    check(loop, RIGHT)


# Learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
def test_lr_given_as_a_number_and_a_group_whose_lr_is_zero(zero: Any) -> None:
    """Decoupled with `lr=` a number; the group's own lr is 0, as at the start of a warm-up.

    Docs: "`lr=` takes its place". Whether 0.0, 0 or a tensor: if the number is not obeyed, that has
    to be said.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters(), foreach=False)
        optimizer.param_groups[0]["lr"] = zero
        decay.attach(model, mode="decoupled", at="step", lr=LR)
        yield model
        for _ in range(2):
            train_step(decay, model, optimizer, lr=LR)
            yield model

    check(loop, RIGHT_OR_TOLD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_lr_as_a_function_returns_nonsense(value: float) -> None:
    """Decoupled, and the function given as `lr=` returns nan, inf or -1: a number like that is
    refused, and so is this.
    """
    model = lines(1)
    optimizer = sgd(model.parameters())
    before = values(model)
    wdhook.attach(model, DECAY, mode="decoupled", at="step", lr=lambda group: value)
    pull(model).backward()
    with pytest.raises(wdhook.WdhookError):
        optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(values(model).values(), before.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "value"), [("mode", "decoupled"), ("at", "step"), ("weight_dacay", 0.0)]
)
def test_the_handle_does_not_take_what_it_cannot_do(name: str, value: Any) -> None:
    """`decay.mode = "decoupled"`, `decay.at = "step"` after attaching, and a typing mistake: an
    error.

    Accepted, the handle would say one thing and do another.
    """
    model = lines(1)
    handle = wdhook.attach(model, DECAY)
    with pytest.raises((AttributeError, wdhook.WdhookError)):
        setattr(handle, name, value)
    assert (handle.mode, handle.at) == ("coupled", "backward")
