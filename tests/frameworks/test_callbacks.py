"""What the callbacks of all frameworks share, without any framework."""

from __future__ import annotations

import inspect
from typing import get_args, get_type_hints

import pytest
import torch
from twins import perceptron, λ

import wdhook
from wdhook._decay import step_listener as _listener
from wdhook.integrations._callback import Arguments, Attached


def test_the_arguments_are_those_of_attach() -> None:
    """A callback takes what `attach` takes, less what its framework knows."""
    known = {"model", "weight_decay", "misplaced", "optimizer", "scaler"}
    assert (
        set(Arguments.__annotations__) == set(inspect.signature(wdhook.attach).parameters) - known
    )


def test_types_that_tools_can_read() -> None:
    """The types of the arguments exist at run time: LightningCLI checks a YAML file by them."""
    hints = get_type_hints(Arguments)
    assert {"coupled", "decoupled", "independent"} <= _choices(hints["mode"])
    assert _choices(hints["at"]) == {"backward", "step"}
    assert {"timm", "huggingface"} <= _choices(hints["recipe"])


def _choices(hint: object) -> set[object]:
    """The values of the Literals in a type."""
    inside = get_args(hint)
    return set().union(*(_choices(one) or {one} for one in inside))


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


def test_an_engine_that_takes_gradients_is_refused() -> None:
    """Megatron's `main_grad` tells of it: the error names the argument that works, and nothing is
    attached."""
    net = perceptron()
    for param in net.parameters():
        param.main_grad = torch.zeros_like(param)
    with pytest.raises(wdhook.MasterWeightsError, match=r'(?s)Megatron-core.*at="step"'):
        Attached(λ, {}).attach(net, [torch.optim.SGD(net.parameters(), lr=0.1)], None)
    assert not _listener.attached()
    callback = Attached(λ, {"at": "step"})
    callback.attach(net, [torch.optim.SGD(net.parameters(), lr=0.1)], None)
    callback.remove()
