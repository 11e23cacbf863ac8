"""What the callbacks of all frameworks share, without any framework."""

from __future__ import annotations

import inspect

import pytest
import torch
from twins import perceptron, λ

import wdhook
from wdhook._decay import step_listener as _listener
from wdhook.integrations._callback import Arguments, Attached


def test_the_arguments_are_those_of_attach() -> None:
    """A callback takes what `attach` takes, less what its framework knows."""
    known = {"model", "weight_decay", "inputs", "misplaced", "optimizer", "scaler"}
    assert (
        set(Arguments.__annotations__) == set(inspect.signature(wdhook.attach).parameters) - known
    )


@pytest.mark.parametrize("name", ["optimizer", "scaler", "model", "mod"])
def test_other_arguments(name: str) -> None:
    """An unknown argument, or one of the framework's own, is an error of the constructor."""
    with pytest.raises(
        wdhook.ArgumentError, match=f"`{name}` is no argument of Attached.*\n.*overrides"
    ):
        Attached(λ, {name: None})


def test_a_run_that_begins_ends_the_last_one() -> None:
    """Attached again without `remove`, as after an exception: there is one handle."""
    net, callback = perceptron(), Attached(λ, {"at": "step"})
    first = callback.attach(net, [], None)
    assert callback.attach(net, [], None) is callback.decay is not first
    assert len(_listener.attached()) == 1
    callback.remove()
    callback.remove()
    assert callback.decay is None
    assert not _listener.attached()


class ZeroOptimizer(torch.optim.SGD):
    """Stands for DeepSpeed's."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"


def test_deepspeed_is_refused() -> None:
    """Its optimizers take gradients away as they come: an error before anything is attached."""
    net = perceptron()
    with pytest.raises(
        wdhook.UnsupportedOptimizerError, match=r"ZeroOptimizer\n.*wdhook.param_groups\(model, λ\)"
    ):
        Attached(λ, {}).attach(net, [ZeroOptimizer(net.parameters(), lr=0.1)], None)
    assert not _listener.attached()
