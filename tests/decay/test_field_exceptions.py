"""Exceptions and `remove()` at every point of a pass and a step: one situation a test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from field import (
    LR,
    RIGHT_OR_TOLD,
    Brittle,
    PlannedError,
    both_moments,
    check,
    everywhere,
    lines,
    pull,
    sgd,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def ramp(step: int) -> float:
    """λ of a schedule: 1/8, 2/8, ..."""
    return (step + 1) / 8


@contextlib.contextmanager
def hooked(place: str, optimizer: Any, hook: Callable[..., None]) -> Iterator[None]:
    """A step hook of the user: of the optimizer or of the process, before or after the update."""
    register = {
        "pre-hook": optimizer.register_step_pre_hook,
        "post-hook": optimizer.register_step_post_hook,
        "pre-hook of the process": register_optimizer_step_pre_hook,
        "post-hook of the process": register_optimizer_step_post_hook,
    }[place]
    handle = register(hook)
    yield
    handle.remove()


AFTER = ["post-hook", "post-hook of the process"]
BEFORE = ["pre-hook", "pre-hook of the process"]


@everywhere
@pytest.mark.parametrize("registered", ["before attach", "after attach"])
@pytest.mark.parametrize("place", AFTER)
def test_a_step_post_hook_raises(mode: str, at: str, place: str, registered: str) -> None:
    """A post-hook of the user (logging, say) raises: the update was made, so its window has ended.

    torch runs the post-hooks of an optimizer before those of the process, and an exception ends the
    walk. λ is a schedule, whose step is finished too.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        broken: list[bool] = []

        def hook(*_: Any) -> None:
            if broken:
                raise PlannedError

        with contextlib.ExitStack() as stack:
            if registered == "before attach":
                stack.enter_context(hooked(place, optimizer, hook))
            decay.attach(model, ramp, mode=mode, at=at, optimizer=optimizer)
            if registered == "after attach":
                stack.enter_context(hooked(place, optimizer, hook))
            yield model
            for step in range(4):
                broken[:] = [True] if step in (1, 2) else []
                optimizer.zero_grad()
                pull(model).backward()
                decay.now(weight_decay=ramp(step))
                with contextlib.suppress(PlannedError):
                    optimizer.step()
                yield model

    check(loop)


@everywhere
@pytest.mark.parametrize("place", BEFORE)
def test_a_step_pre_hook_raises_and_the_step_is_tried_again(mode: str, at: str, place: str) -> None:
    """A pre-hook of the user raises, and the same gradients are stepped again: one decay."""

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        broken: list[bool] = []

        def hook(*_: Any) -> None:
            if broken:
                broken.clear()
                raise PlannedError

        decay.attach(model, ramp, mode=mode, at=at, optimizer=optimizer)
        with hooked(place, optimizer, hook):
            yield model
            for step in range(4):
                optimizer.zero_grad()
                pull(model).backward()
                if step in (1, 2):
                    broken.append(True)
                    with contextlib.suppress(PlannedError):
                        optimizer.step()
                decay.now(weight_decay=ramp(step))
                optimizer.step()
                yield model

    check(loop)


@everywhere
@pytest.mark.parametrize("place", [*BEFORE, *AFTER])
def test_the_handle_is_removed_in_a_step_hook(mode: str, at: str, place: str) -> None:
    """A hook of the user calls remove() in the second of four steps: none is decayed after it."""

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        steps = [0]

        def hook(*_: Any) -> None:
            if steps[0] == 1 and not decay.by_hand:
                decay.handle.remove()

        with hooked(place, optimizer, hook):
            yield model
            for steps[0] in range(4):
                optimizer.zero_grad()
                pull(model).backward()
                if steps[0] == 0 or (steps[0] == 1 and (at == "backward" or place in AFTER)):
                    decay.now()
                optimizer.step()
                yield model

    check(loop)


@everywhere
@pytest.mark.parametrize("then", ["zeroed and repeated", "stepped all the same"])
def test_a_backward_pass_raises_half_way(mode: str, at: str, then: str) -> None:
    """A pass reaches some parameters and raises; the loop repeats it, or steps with what is there.

    A pass that raises pays nothing, and the step decays what has a gradient.
    """

    def loop(decay: Any) -> Any:
        model = lines(3)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        first, second, third = model.parameters()
        yield model
        for step in range(3):
            optimizer.zero_grad()
            if step == 1:
                with contextlib.suppress(PlannedError):
                    (first * 0.25 + third * 0.25 + Brittle.apply(second * 0.25)).sum().backward()
            if step != 1 or then == "zeroed and repeated":
                optimizer.zero_grad()
                pull(model).backward()
            decay.now()
            optimizer.step()
            yield model

    check(loop)


@everywhere
def test_the_update_itself_raises_and_new_gradients_come(mode: str, at: str) -> None:
    """An update raises before it moves anything, gradients are zeroed and made again: one decay."""

    class Fragile(torch.optim.SGD):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                self.broken = False
                raise PlannedError
            return super().step(closure)

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = Fragile(model.parameters(), lr=LR)
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for step in range(3):
            optimizer.zero_grad()
            pull(model).backward()
            if step == 1:
                optimizer.broken = True
                with contextlib.suppress(PlannedError):
                    optimizer.step()
                optimizer.zero_grad()
                pull(model).backward()
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT_OR_TOLD if mode != "coupled" and at == "backward" else "right")


@both_moments
def test_a_step_post_hook_steps_another_optimizer(at: str) -> None:
    """The step post-hook of one optimizer calls another's: neither is part of the other's step."""

    def loop(decay: Any) -> Any:
        model = lines(2)
        one, two = sgd([model[0].weight]), sgd([model[1].weight])
        decay.attach(model, ramp, at=at, optimizer=[one, two])
        one.register_step_post_hook(lambda *_: two.step())
        yield model
        for step in range(3):
            model.zero_grad()
            pull(model).backward()
            decay.now(weight_decay=ramp(step))
            one.step()
            yield model

    check(loop)
