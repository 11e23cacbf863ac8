"""Fine-tuning: layers that are unfrozen, frozen, added, replaced, materialised or converted after
`attach`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from phases import MODES, Optimize, attached, compare, own, plain
from torch import Tensor, nn
from twins import (
    LR,
    assert_bit_equal,
    batches,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    zero,
    λ,
)

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def unfreeze_by_flag(model: nn.Module, optimize: Optimize) -> None:
    """One optimizer for everything; layers join from the top, and at the end the bottom is frozen
    again."""
    optimizer = optimize(model)
    for seed, trained in enumerate(((5,), (3, 5), (0, 2, 3, 5), (3, 5))):
        for layer in (0, 2, 3, 5):
            model[layer].requires_grad_(layer in trained)
        train(model, optimizer, batches(model, 3, seed=seed))


def unfreeze_by_group(model: nn.Module, optimize: Optimize) -> None:
    """`add_param_group` brings each layer into the optimizer when its turn comes."""
    model.requires_grad_(False)
    optimizer = None
    for layer in (5, 3, 2, 0):
        model[layer].requires_grad_(True)
        if optimizer is None:
            optimizer = optimize(model[layer])
        else:
            for group in optimize(model[layer]).param_groups:
                optimizer.add_param_group(
                    {"params": group["params"], "weight_decay": group["weight_decay"]}
                )
        train(model, optimizer, batches(model, 3, seed=layer))


def unfreeze_by_new_optimizer(model: nn.Module, optimize: Optimize) -> None:
    """Each phase has an optimizer of its own, and the last one goes on with the first."""
    model.requires_grad_(False)
    model[5].requires_grad_(True)
    first = optimize(model[5])
    train(model, first, batches(model, 3))
    model.requires_grad_(True)
    train(model, optimize(model), batches(model, 3, seed=2))
    train(model, first, batches(model, 3, seed=3))


@MODES
@pytest.mark.parametrize("script", [unfreeze_by_flag, unfreeze_by_group, unfreeze_by_new_optimizer])
def test_gradual_unfreezing(script: Any, mode: str, at: str) -> None:
    """Layers are decayed from their first step on, while they train, and not while they are
    frozen."""
    compare(perceptron(), mode, at, script)


@pytest.mark.parametrize("old", ["lives", "is gone", "has the same lr"])
def test_another_optimizer_than_the_one_given(old: str) -> None:
    """Decay in the backward reads the lr of the optimizer given; if the step has another lr, that
    is an error."""
    model, twin = twins(perceptron())
    given: Any = AdamW(
        model.parameters(), lr=0.001 if old == "has the same lr" else LR, weight_decay=0
    )
    handle = wdhook.attach(model, λ, mode="decoupled", optimizer=given)
    if old == "is gone":
        given = None
    optimizer = AdamW(model.parameters(), lr=0.001, weight_decay=0)
    if old == "lives":
        pattern = r"(?s)another optimizer.*lr 0\.1\n.*lr 0\.001\n.*at=\"step\""
        with pytest.raises(wdhook.LearningRateError, match=pattern):
            train(model, optimizer, batches(model, 3))
        model = copy.deepcopy(twin)
        optimizer = AdamW(model.parameters(), lr=0.001, weight_decay=0)
        handle.remove()
        handle = wdhook.attach(model, λ, mode="decoupled", at="step")
    train(model, optimizer, batches(model, 3))
    handle.remove()
    train(twin, AdamW(own_groups(twin), lr=0.001), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@MODES
@pytest.mark.parametrize("to_none", [True, False])
def test_frozen_again_in_mid_run(mode: str, at: str, to_none: bool) -> None:
    """torch.optim decays a parameter that has a gradient, be it zero, and none that has none; so
    do we."""

    def script(model: nn.Module, optimize: Optimize) -> None:
        optimizer = optimize(model)
        train(model, optimizer, batches(model, 2), to_none=to_none)
        zero(model, to_none)
        model[0].requires_grad_(False)
        train(model, optimizer, batches(model, 2, seed=2), to_none=to_none)

    compare(perceptron(), mode, at, script)


def test_a_frozen_base_is_not_decayed_and_nothing_is_raised() -> None:
    """Frozen parameters in the optimizer's list: no gradient, no decay, no error, in each mode."""
    for mode, at in (("coupled", "backward"), ("decoupled", "backward"), ("decoupled", "step")):
        model = perceptron()
        model[0].requires_grad_(False)
        before = model[0].weight.detach().clone()
        optimizer = SGD(model.parameters(), lr=LR)
        with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
            train(model, optimizer, batches(model, 3))
        assert torch.equal(model[0].weight, before)


def add_a_head(model: nn.Module) -> None:
    model.append(nn.Linear(2, 3))


def replace_the_head(model: nn.Module) -> None:
    model[5] = nn.Linear(5, 3)


def assign_tensors(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def assign_a_parameter(model: nn.Module) -> None:
    model[3].weight = nn.Parameter(model[3].weight.detach() / 2)


@MODES
@pytest.mark.parametrize(
    "change", [add_a_head, replace_the_head, assign_tensors, assign_a_parameter]
)
@pytest.mark.parametrize("when", ["attached only", "trained"])
def test_parameters_that_come_later(
    when: str, change: Callable[[nn.Module], None], mode: str, at: str
) -> None:
    """A new head, new tensors in old places: decayed from their first step on, by an optimizer
    that is new too."""

    def script(model: nn.Module, optimize: Optimize) -> None:
        if when == "trained":
            train(model, optimize(model), batches(model, 3))
        torch.manual_seed(7)
        change(model)
        train(model, optimize(model), batches(model, 3, seed=2))

    compare(perceptron(), mode, at, script)


def test_replaced_parameters_with_the_old_optimizer() -> None:
    """torch steps the old ones, which get no gradient any more: nothing trains, and nothing is
    decayed."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ):
        train(model, optimizer, batches(model, 2))
        assign_tensors(model)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        train(model, optimizer, batches(model, 2))
    assert_bit_equal(model.state_dict(), before)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.tokens(index))

    def resize(self, count: int) -> None:
        """As transformers do it: a new module in the old place, with the old rows."""
        old, self.tokens = self.tokens, nn.Embedding(count, 4)
        with torch.no_grad():
            self.tokens.weight[: len(old.weight)] = old.weight


def token_groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [model.tokens.weight, model.out.weight]
    return [
        {"params": decayed, "weight_decay": λ},
        {"params": [model.out.bias], "weight_decay": 0.0},
    ]


@MODES
def test_resized_token_embeddings(mode: str, at: str) -> None:
    """The larger table has the role of the old one."""
    kind = SGD if mode == "coupled" else AdamW

    def run(model: nn.Module, groups: Callable[[nn.Module], Any]) -> None:
        for count in (6, 9):
            torch.manual_seed(count)
            model.resize(count)
            optimizer = kind(groups(model), lr=LR, weight_decay=0)
            for i in range(3):
                optimizer.zero_grad()
                loss_of(model, torch.tensor([[i, count - 1], [0, 1]])).backward()
                optimizer.step()

    model, twin = twins(Tokens())
    with attached(model, mode, at) as handle:
        run(model, lambda m: [{"params": list(m.parameters())}])
        assert handle.plan["tokens.weight"].role == "embedding"
    run(twin, token_groups)
    assert_bit_equal(model.state_dict(), twin.state_dict())


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyBatchNorm1d(), nn.LazyLinear(2))


@MODES
@pytest.mark.parametrize("first", ["optimizer", "dry run", "given"])
def test_lazy_modules_materialised_after_attach(first: str, mode: str, at: str) -> None:
    """Their first forward pass makes them; they are decayed from their first step on, whichever
    came first."""

    def script(model: nn.Module, optimize: Optimize) -> None:
        torch.manual_seed(7)
        inputs = [torch.randn(4, 3) for _ in range(4)]
        if first == "dry run":
            model(inputs[0])
        optimizer = optimize(model)
        if first == "optimizer":
            model(inputs[0])
        train(model, optimizer, inputs)

    model, twin = lazy(), lazy()
    if first == "given":
        optimizer = plain(mode)(model)
        with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
            script(model, lambda _: optimizer)
    else:
        with attached(model, mode, at):
            script(model, plain(mode))
    script(twin, own(mode, lazy_groups))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def lazy_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [model[0].weight, model[3].weight], "weight_decay": λ},
        {"params": [model[0].bias, *model[2].parameters(), model[3].bias], "weight_decay": 0.0},
    ]


def test_the_comparisons_can_fail() -> None:
    """A layer that misses its decay after it was unfrozen is seen."""
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, overrides={"0.weight": 0.0}):
        unfreeze_by_flag(model, plain("coupled"))
    unfreeze_by_flag(twin, own("coupled"))
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(model.state_dict(), twin.state_dict())
