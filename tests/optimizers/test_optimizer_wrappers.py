"""Optimizers that hold other optimizers: the step of the one inside is the one that counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, perceptron, train, twins, λ

import wdhook
from wdhook._decay import step_listener

SGD = torch.optim.SGD


class Several(torch.optim.Optimizer):
    """Holds an optimizer for each of its groups, in a list or a dict."""

    def __init__(self, optimizers: Any) -> None:
        self.optimizers = optimizers
        self.all = list(optimizers.values()) if isinstance(optimizers, dict) else optimizers
        super().__init__([p for o in self.all for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.all:
            optimizer.step()


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("given", [False, True])
def test_an_optimizer_that_holds_several(kind: type, given: bool) -> None:
    """The optimizers inside are found in a list or a dict: theirs is the learning rate, and the
    step that counts."""
    model, twin = twins(perceptron())

    def several(m: nn.Module, weight_decay: float) -> Several:
        parts = [
            torch.optim.AdamW(m[i].parameters(), lr=LR / (i + 1), weight_decay=weight_decay)
            for i in (0, 2, 3, 5)
        ]
        return Several(parts if kind is list else dict(enumerate(parts)))

    optimizer = several(model, 0.0)
    arguments = {"optimizer": optimizer} if given else {}
    with wdhook.attach(model, λ, mode="decoupled", at="step", **arguments):
        train(model, optimizer, batches(model, 5))
    reference = several(twin, λ)
    exempt = {id(p) for p in own_groups(twin, λ)[1]["params"]}
    for part in reference.all:
        params = part.param_groups[0]["params"]
        part.param_groups[0]["params"] = [p for p in params if id(p) not in exempt]
        part.add_param_group(
            {"params": [p for p in params if id(p) in exempt], "weight_decay": 0.0}
        )
    train(twin, reference, batches(twin, 5))
    assert_bit_equal(model.state_dict(), twin.state_dict())


class Around:
    """No optimizer, but it holds one: what Lightning hands out."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside, self.param_groups, self.step = inside, inside.param_groups, inside.step


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_an_object_around_an_optimizer_may_be_given(mode: str, at: str) -> None:
    """The steps of the optimizer inside are heard."""
    kind = SGD if mode == "coupled" else torch.optim.AdamW
    model, twin = twins(perceptron())
    optimizer = Around(kind(model.parameters(), lr=LR, weight_decay=0.0))
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
        train(model, optimizer, batches(model, 5))
    train(twin, kind(own_groups(twin), lr=LR), batches(twin, 5))
    assert_bit_equal(model.state_dict(), twin.state_dict())


class Moving(torch.optim.Optimizer):
    """SAM of heavyball: the closure runs in the step of the optimizer inside, at moved weights
    that are put back."""

    def __init__(self, inside: torch.optim.Optimizer, by: float) -> None:
        self.inside, self.by = inside, by
        super().__init__([p for group in inside.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        for p in params:
            p.data.add_(self.by)  # as third parties write: the version of p tells nothing

        def there_and_back() -> Any:
            loss = closure()
            for p in params:
                p.data.sub_(self.by)
            return loss

        self.inside.step(there_and_back if self.by else closure)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("by", [0.0, 0.5])
def test_a_closure_at_moved_weights(mode: str, by: float) -> None:
    """Decay at the end of such a closure would be undone: refused where the weights have moved,
    and only there."""
    model = perceptron()
    optimizer = Moving(SGD(model.parameters(), lr=LR), by)
    (batch,) = batches(model, 1)

    def closure() -> Tensor:
        with torch.enable_grad():
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
        return loss

    with wdhook.attach(model, λ, mode=mode, at="step"):
        if by:
            with pytest.raises(
                wdhook.UnsupportedOptimizerError, match=r'moved.*\n.*SGD\n.*at="backward"'
            ):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
            assert not step_listener._stack()  # nothing is held on to
    with wdhook.attach(model, λ):
        optimizer.step(closure)
