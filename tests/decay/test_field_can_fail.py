"""The comparison of the field's situations can fail: wrong decays, silence, late refusals."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from field import DECAY, RIGHT, RIGHT_OR_REFUSED, RIGHT_OR_TOLD, check, lines, pull, sgd
from torch import nn

import wdhook
from wdhook._decay import step_listener


def loop_with(event: Callable[[Any, nn.Module], object]) -> Callable[[Any], Any]:
    """A loop of two steps, with an event before each that happens with wdhook alone."""

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, at="step", optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            decay.now()
            if not decay.by_hand:
                event(decay, model)
            optimizer.step()
            yield model

    return loop


def nothing(decay: Any, model: nn.Module) -> None:
    """No fault."""


def no_decay(decay: Any, model: nn.Module) -> None:
    """The decay is missing."""
    decay.handle.remove()


def two_decays(decay: Any, model: nn.Module) -> None:
    """The decay is there twice."""
    for p in model.parameters():
        p.grad.add_(p.detach(), alpha=DECAY)


def tell(decay: Any, model: nn.Module) -> None:
    """Wrong, with a warning."""
    no_decay(decay, model)
    warnings.warn(wdhook.WdhookWarning("a sentence"), stacklevel=1)


def refuse(decay: Any, model: nn.Module) -> None:
    """A refusal in time."""
    raise wdhook.WdhookError("a sentence")


def refuse_late(decay: Any, model: nn.Module) -> None:
    """A refusal after a parameter was changed."""
    with torch.no_grad():
        next(model.parameters()).add_(1)
    refuse(decay, model)


def test_a_loop_without_fault_passes() -> None:
    """Nothing is raised where nothing is wrong, and where the fault is accepted."""
    check(loop_with(nothing), RIGHT)
    check(loop_with(tell), RIGHT_OR_TOLD)
    check(loop_with(refuse), RIGHT_OR_TOLD)
    check(loop_with(refuse), RIGHT_OR_REFUSED)


@pytest.mark.parametrize(
    ("event", "accept", "says"),
    [
        (no_decay, RIGHT, "0.weight: largest difference"),
        (two_decays, RIGHT, "0.weight: largest difference"),
        (no_decay, RIGHT_OR_REFUSED, "0.weight: largest difference"),
        (no_decay, RIGHT_OR_TOLD, "nothing true was said"),
        (tell, RIGHT, "0.weight: largest difference"),
        (refuse, RIGHT, "though the right answer can be known"),
        (refuse_late, RIGHT_OR_REFUSED, "was changed before the error"),
    ],
)
def test_a_fault_is_seen(event: Any, accept: str, says: str) -> None:
    """Each kind of fault is an AssertionError that names it."""
    with pytest.raises(AssertionError, match=says):
        check(loop_with(event), accept)


@pytest.mark.parametrize(
    ("event", "accept", "says"),
    [
        (tell, RIGHT_OR_TOLD, "nothing true was said"),
        (refuse, RIGHT_OR_REFUSED, "says what is not so"),
    ],
)
def test_a_message_that_is_not_true_does_not_count(event: Any, accept: str, says: str) -> None:
    """A sentence that is false in the situation is no answer."""
    with pytest.raises(AssertionError, match=says):
        check(loop_with(event), accept, untrue=("a sentence",))


@pytest.mark.parametrize("at", ["backward", "step"])
def test_entries_and_notes_die_with_their_parameters(at: str) -> None:
    """After a pass, and after a pass that raised and a step, nothing refers to a parameter's entry.

    An entry that outlives its parameter would be taken for that of another tensor with the same id.
    """
    model, other = lines(2), lines(1)
    optimizer = sgd([*model.parameters(), *other.parameters()])
    with wdhook.attach(nn.ModuleDict({"model": model, "other": other}), DECAY, at=at):
        engine = step_listener.attached()[0]
        pull(model).backward()
        first = model[0].weight
        with pytest.raises(ZeroDivisionError):
            (pull(model) + Breaks.apply(first)).sum().backward()
        optimizer.step()
        model.zero_grad()
        pull(model).backward()
        del model[1], optimizer, first
        gc.collect()
        names = {entry.name for entry in engine.state.parameters.entries()}
        assert "model.1.weight" not in names


class Breaks(torch.autograd.Function):
    """The identity; its backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise ZeroDivisionError
