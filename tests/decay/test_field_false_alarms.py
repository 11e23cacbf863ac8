"""Loops in which nothing is wrong, and nothing is said: one situation a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from field import (
    DECAY,
    LR,
    RIGHT,
    Wrapper,
    all_modes,
    both_moments,
    check,
    everywhere,
    lines,
    pull,
    sgd,
    train_step,
)
from torch import nn


@everywhere
def test_inner_steps_of_maml_on_clones(mode: str, at: str) -> None:
    """MAML: for each of two tasks an inner SGD steps clones of the weights; then the outer
    optimizer steps the model.

    The clones are no master weights. Docs: "the fast weights of MAML: they are not the model's".
    One decay per outer step.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        outer = sgd(model.parameters())
        decay.attach(
            model, mode=mode, at=at, optimizer=outer, given=at == "backward" and mode != "coupled"
        )
        yield model
        for _ in range(2):
            outer.zero_grad()
            for _ in range(2):
                fast = [p.detach().clone().requires_grad_() for p in model.parameters()]
                inner = sgd(fast, lr=1 / 4)
                sum((p * 0.25).sum() for p in fast).backward()
                inner.step()
                for p in model.parameters():
                    p.grad = torch.full_like(p, 0.25) if p.grad is None else p.grad + 0.25
            decay.now()
            outer.step()
            yield model

    check(loop, RIGHT)


class Static:
    """A loss scaler made by hand, with a constant scale."""

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 1024.0

    def scale(self, x: Any) -> Any:
        return x * 1024.0


class Unscaling(torch.amp.GradScaler):
    """A GradScaler with a step of its own."""

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.unscale_(optimizer)
        return optimizer.step()


@pytest.mark.parametrize(
    "kind", [Static, lambda: Unscaling("cpu", init_scale=1024.0)], ids=["made by hand", "sub-class"]
)
def test_a_scaler_of_the_users_is_given(kind: Any) -> None:
    """Coupled at "backward" with `scaler=` an object of the user that scales by 1024, or a
    GradScaler with its own `step`.

    Docs: "Loss scaling by other means than a GradScaler (by hand): give the scaler". It was given,
    so the decay is right.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer, scaler = sgd(model.parameters()), kind()
        decay.attach(model, optimizer=optimizer, scaler=scaler)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(pull(model)).backward()
            if isinstance(scaler, Static):
                for p in model.parameters():
                    p.grad.div_(1024.0)
                decay.now()
                optimizer.step()
            else:
                for p in model.parameters():
                    p.grad.add_(p * (1024.0 * DECAY if decay.by_hand else 0.0))
                scaler.step(optimizer)
                scaler.update()
            yield model

    check(loop, RIGHT)


@both_moments
def test_a_wrapper_around_an_optimizer_that_maximizes(at: str) -> None:
    """A wrapper whose inner optimizer maximizes is given: the sign can be known, and the decay
    shrinks the weights.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = Wrapper(sgd(model.parameters(), maximize=True))
        decay.attach(model, at=at, optimizer=optimizer)
        yield model
        for _ in range(3):
            train_step(decay, model, optimizer, sign=-1)
            yield model

    check(loop, RIGHT)


@all_modes
@pytest.mark.parametrize("kind", ["inference", "expanded"])
def test_gradients_that_cannot_be_changed_in_place(mode: str, kind: str) -> None:
    """Gradients made in inference mode (evolution strategies), or expanded from one number:
    torch.optim's decay takes both.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at="step", optimizer=optimizer)
        yield model
        for _ in range(2):
            for p in model.parameters():
                if kind == "inference":
                    with torch.inference_mode():
                        p.grad = torch.full_like(p, 0.25)
                else:
                    p.grad = torch.full((1, 1), 0.25).expand_as(p)
            decay.now(in_place=False)
            optimizer.step()
            yield model

    check(loop, RIGHT)


class Reads(torch.optim.SGD):
    """An optimizer whose step is given the model (to read its buffers, say)."""

    def step(self, model: Any) -> Any:  # type: ignore[override]
        assert isinstance(model, nn.Module)
        return super().step()


@all_modes
def test_a_callable_argument_of_step_that_is_no_closure(mode: str) -> None:
    """`optimizer.step(model)`: a module is callable and is no closure; the optimizer gets what the
    user gave.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = Reads(model.parameters(), lr=LR)
        decay.attach(model, mode=mode, at="step", optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            decay.now()
            optimizer.step(model)
            yield model

    check(loop, RIGHT)


@pytest.mark.filterwarnings("ignore:Using backward")
@both_moments
def test_a_discarded_pass_and_create_graph(at: str) -> None:
    """A backward pass is thrown away, and the next one is a backward(create_graph=True).

    Autograd copies a first gradient then, and the copy has a version of its own.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            optimizer.zero_grad()
            sum((p * p * 0.125).sum() for p in model.parameters()).backward(create_graph=True)
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT)


@everywhere
@pytest.mark.parametrize("to_none", [True, False])
def test_maximize_turns_after_a_discarded_pass(mode: str, at: str, to_none: bool) -> None:
    """Gradients are zeroed, `maximize` is switched on, and the next pass reaches one parameter.

    The gradient of the other one is None or zero, so no decay with the old sign is in it.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        if mode == "coupled":
            pull(model).backward()
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.param_groups[0]["maximize"] = True
        for _ in range(2):
            optimizer.zero_grad(set_to_none=to_none)
            pull(model[0]).backward()
            decay.now(sign=-1)
            optimizer.step()
            yield model

    check(loop, RIGHT)
