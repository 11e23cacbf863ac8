"""Without hooks, and taking over: `apply_weight_decay`, `l2_penalty`, `adopt`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twins import (
    LR,
    assert_bit_equal,
    assert_close,
    batches,
    convnet,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    weights,
    λ,
)

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("how", ["coupled", "lr", "function", "optimizer"])
def test_once_right_after_the_backward(how: str, foreach: bool | None) -> None:
    """One call per step equals param groups bit for bit, coupled and (by lr or by the optimizer)
    decoupled."""
    kind = SGD if how == "coupled" else AdamW
    model, twin = twins(convnet())
    optimizer = kind(model.parameters(), lr=LR, weight_decay=0)
    for batch in batches(model, 4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        arguments: dict[str, Any] = {
            "coupled": {},
            "lr": {"mode": "decoupled", "lr": LR},
            "function": {
                "mode": "decoupled",
                "lr": lambda group: group["lr"],
                "optimizer": optimizer,
            },
            "optimizer": {"mode": "decoupled", "optimizer": optimizer},
        }[how]
        wdhook.apply_weight_decay(model, weight_decay=λ, foreach=foreach, **arguments)
        optimizer.step()
    train(twin, kind(own_groups(twin), lr=LR), batches(twin, 4))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_maximize_turns_the_sign() -> None:
    """With the optimizer given, a gradient that will be negated gets the decay with the other
    sign."""
    model = nn.Linear(2, 1, bias=False)
    model(torch.zeros(1, 2)).sum().backward()
    wdhook.apply_weight_decay(
        model, weight_decay=0.5, optimizer=SGD(model.parameters(), lr=LR, maximize=True)
    )
    assert torch.equal(model.weight.grad, -0.5 * model.weight)


def test_a_later_failure_changes_nothing() -> None:
    """A parameter without a learning rate is named before any other is changed."""
    model = perceptron()
    before = [w.detach().clone() for w in weights(model)]
    loss_of(model, batches(model, 1)[0]).backward()
    part = SGD(model[0].parameters(), lr=LR)
    with pytest.raises(wdhook.LearningRateError, match=r"3\.weight"):
        wdhook.apply_weight_decay(model, weight_decay=λ, mode="decoupled", optimizer=part)
    assert all(map(torch.equal, weights(model), before))


def test_several_modules_share_a_parameter() -> None:
    """A parameter of two of the modules is decayed once; overrides and sparse gradients work as
    elsewhere."""
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    table = nn.Embedding(3, 2, sparse=True)
    (one(torch.zeros(1, 2)).sum() + table(torch.tensor([1])).sum()).backward()
    wdhook.apply_weight_decay(one, two, table, weight_decay=0.5)
    assert torch.equal(one.weight.grad, 0.5 * one.weight)
    assert torch.equal(table.weight.grad.to_dense()[1], 1 + 0.5 * table.weight[1])
    assert torch.equal(table.weight.grad.to_dense()[[0, 2]], torch.zeros(2, 2))
    wdhook.apply_weight_decay(one, weight_decay=0.5, overrides={"weight": 0.0, nn.Linear: 0.25})
    assert torch.equal(one.weight.grad, 0.75 * one.weight)


def test_under_a_scaler() -> None:
    """Scaled gradients get the scaled decay."""
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, batches(model, 1)[0])).backward()
    expected = [w.grad.add(1024.0 * w.detach(), alpha=λ) for w in weights(model)]
    wdhook.apply_weight_decay(model, weight_decay=λ, scaler=scaler)
    assert all(torch.equal(w.grad, e) for w, e in zip(weights(model), expected, strict=True))


def test_the_gradient_of_the_penalty_is_exactly_the_decay() -> None:
    """∂(½·Σ λ‖p‖²)/∂p = λ·p to the last bit, in every dtype, and 0 for exempt parameters."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = perceptron(dtype)
        penalty = wdhook.l2_penalty(model, λ)
        penalty.backward()
        for weight in weights(model):
            exact = λ * weight.detach().float() if dtype == torch.bfloat16 else λ * weight.detach()
            assert torch.equal(weight.grad, exact.to(dtype))
        decayed = {id(w) for w in weights(model)}
        assert all(p.grad is None for p in model.parameters() if id(p) not in decayed)
        squares = sum(w.detach().double().square().sum() for w in weights(model))
        # 55 squares below 1 in float32, each rounded at most twice.
        assert abs(penalty.item() - 0.5 * λ * squares.item()) < 110 * 2**-24


def test_the_penalty_in_the_loss_is_coupled_decay() -> None:
    """Training on loss + penalty is `attach` up to one rounding per gradient, in float64."""
    model, twin = twins(perceptron(torch.float64))
    with wdhook.attach(model, λ):
        train(model, SGD(model.parameters(), lr=LR), batches(model, 4))
    optimizer = SGD(twin.parameters(), lr=LR)
    for batch in batches(twin, 4):
        optimizer.zero_grad()
        (loss_of(twin, batch) + wdhook.l2_penalty(twin, λ)).backward()
        optimizer.step()
    assert_close(model.state_dict(), twin.state_dict(), 1e-14)  # four steps, numbers below 2


# (constructor, arguments, mode that adopt must pick)
ADOPTED: list[tuple[Any, dict[str, Any], str]] = [
    (SGD, {"lr": LR, "momentum": 0.9}, "coupled"),
    (torch.optim.Adam, {"lr": 0.01}, "coupled"),
    (AdamW, {"lr": 0.01}, "decoupled"),
    (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True}, "decoupled"),
    (torch.optim.RMSprop, {"lr": 0.01}, "coupled"),
]


@pytest.mark.parametrize(("kind", "arguments", "mode"), ADOPTED)
def test_adopt_takes_over(kind: Any, arguments: dict[str, Any], mode: str) -> None:
    """λ is read from the groups, set to 0 there and in the defaults; from then on weights alone
    are decayed."""
    model, twin = twins(convnet())
    optimizer = kind(model.parameters(), weight_decay=λ, **arguments)
    handle = wdhook.adopt(model, optimizer)
    assert (handle.mode, handle.at, handle.weight_decay) == (mode, "step", λ)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0]
    assert optimizer.defaults["weight_decay"] == 0.0
    train(model, optimizer, batches(model, 6), micro=2, clip=0.05)
    handle.remove()
    train(twin, kind(own_groups(twin), **arguments), batches(twin, 6), micro=2, clip=0.05)
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_adopt_keeps_the_groups_that_there_are() -> None:
    """Each parameter keeps the λ of its own group; a group with 0 stays exempt."""
    model, twin = twins(perceptron())

    def groups(m: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": list(m[0].parameters()), "weight_decay": 0.1},
            {"params": list(m[2].parameters()) + list(m[3].parameters()), "weight_decay": 0.0},
            {"params": list(m[5].parameters()), "weight_decay": 0.3},
        ]

    optimizer = SGD(groups(model), lr=LR)
    with wdhook.adopt(model, optimizer) as handle:
        λs = {n: d.weight_decay for n, d in handle.plan.items()}
        train(model, optimizer, batches(model, 3))
    assert (λs["0.weight"], λs["0.bias"], λs["3.weight"], λs["5.weight"]) == (0.1, 0.0, 0.0, 0.3)
    own = [{"params": [p], "weight_decay": λs[n]} for n, p in twin.named_parameters()]
    train(twin, SGD(own, lr=LR), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_adopt_leaves_the_optimizer_alone_if_it_fails() -> None:
    """An argument without meaning, or a model that is attached already, changes no group."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR, weight_decay=λ)
    with pytest.raises(wdhook.SelectorError):
        wdhook.adopt(model, optimizer, overrides={"nothing": 0.0})
    with wdhook.attach(model, λ), pytest.raises(wdhook.AlreadyAttachedError):
        wdhook.adopt(model, optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == λ
    assert optimizer.defaults["weight_decay"] == λ
