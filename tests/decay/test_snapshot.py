"""Snapshots: the numbers are right, nothing waits before they are read, and training does not
notice."""

from __future__ import annotations

import gc
import json
import math
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import (
    LR,
    NoReading,
    assert_bit_equal,
    batches,
    convnet,
    loss_of,
    perceptron,
    train,
    twins,
    weights,
    zero,
    λ,
)

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
MOMENTS = ("backward", "step")
# float64: sums of some hundred products, and a difference of two of them, each relative error at
# most n·2⁻⁵³.
CLOSE = {"rel": 1e-12, "abs": 1e-14}


def flat(tensors: Any) -> Tensor:
    """All elements of several tensors."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def cosine(p: Tensor, g: Tensor) -> float:
    """By the definition."""
    return float(p @ g / (p.norm() * g.norm()))


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("seen", [False, True])
def test_coupled_numbers(at: str, seen: bool) -> None:
    """Norms, angle and share are those of the loss's own gradient, whether the decay is in it yet
    or not."""
    model, twin = twins(perceptron(torch.float64))
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, at=at) as handle:
        if seen:
            train(model, optimizer, batches(model, 2))
            twin.load_state_dict(model.state_dict())
        batch = batches(model, 3)[2]
        for net in (model, twin):
            zero(net, to_none=True)
            loss_of(net, batch).backward()
        read = handle.snapshot().to_dict()
    assert read["step"] == (2 if seen else 0)
    assert read["weight_decay"] == λ
    assert {role: numbers["numel"] for role, numbers in read["groups"].items()} == {
        "weight": 55,
        "bias": 12,
        "norm": 10,
    }
    p, g = flat(weights(twin)), flat(w.grad for w in weights(twin))
    weight = read["groups"]["weight"]
    assert weight["norm"] == pytest.approx(p.norm().item(), **CLOSE)
    assert weight["grad_norm"] == pytest.approx(g.norm().item(), **CLOSE)
    assert weight["cos"] == pytest.approx(cosine(p, g), **CLOSE)
    assert weight["share"] == pytest.approx(
        (λ * p).norm().item() / (g + λ * p).norm().item(), **CLOSE
    )
    norms = [twin[2].weight, twin[2].bias]
    assert read["groups"]["norm"]["cos"] == pytest.approx(
        cosine(flat(norms), flat(w.grad for w in norms)), **CLOSE
    )
    assert read["groups"]["norm"]["share"] == read["groups"]["bias"]["share"] == 0.0


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("mode", ["decoupled", "independent"])
def test_the_share_of_an_update(mode: str, at: str) -> None:
    """Decoupled and independent: known once the step is done, and then the decay's part of all
    that has changed."""
    model = perceptron(torch.float64)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer) as handle:
        train(model, optimizer, batches(model, 2))
        optimizer.param_groups[0]["lr"] = LR / 2
        before = flat(weights(model))
        zero(model, to_none=True)
        loss_of(model, batches(model, 3)[2]).backward()
        snapshot = handle.snapshot()
        assert snapshot.to_dict()["groups"]["weight"]["share"] is None
        assert "wdhook/share/weight" not in snapshot.scalars()
        optimizer.step()
        share = snapshot.to_dict()["groups"]["weight"]["share"]
        factor = λ / 2 if mode == "independent" else λ * LR / 2
        expected = (factor * before).norm() / (flat(weights(model)) - before).norm()
        # The differences of parameters near 1 are near 1e-2: 2⁻⁵³ of the former is 1e-14 of the
        # latter.
        assert share == pytest.approx(expected.item(), rel=1e-11)
        kept = snapshot.to_dict()
        train(model, optimizer, batches(model, 1))
        assert snapshot.to_dict() == kept  # one step is what it was waiting for


def test_an_optimizer_that_is_not_known_yet() -> None:
    """What the first step of an optimizer that was not given changes is known when it has
    stepped."""
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        loss_of(model, batches(model, 1)[0]).backward()
        snapshot = handle.snapshot()
        assert snapshot.to_dict()["groups"]["weight"]["share"] is None
        optimizer.step()
        assert 0 < snapshot.to_dict()["groups"]["weight"]["share"] < 1
        snapshot = handle.snapshot()
        optimizer.step()
        assert 0 < snapshot.to_dict()["groups"]["weight"]["share"] < 1


def test_two_optimizers() -> None:
    """The share of a group is known when all optimizers that own a part of it have stepped."""
    model = perceptron()
    first, second = (
        AdamW(part.parameters(), lr=LR, weight_decay=0.0) for part in (model[0], model[2:])
    )
    with wdhook.attach(model, λ, mode="decoupled", at="step", optimizer=[first, second]) as handle:
        loss_of(model, batches(model, 1)[0]).backward()
        whole, parts = handle.snapshot(), handle.snapshot(by="name")
        first.step()
        assert whole.to_dict()["groups"]["weight"]["share"] is None
        assert parts.to_dict()["groups"]["0.weight"]["share"] > 0
        assert parts.to_dict()["groups"]["3.weight"]["share"] is None
        second.step()
        assert whole.to_dict()["groups"]["weight"]["share"] > 0


def test_groups() -> None:
    """By role, by name, or by any function of the decision."""
    model = perceptron()
    with wdhook.attach(model, λ) as handle:
        assert list(handle.snapshot(by="name").to_dict()["groups"]) == [
            n for n, _ in model.named_parameters()
        ]
        layers = handle.snapshot(by=lambda decision: decision.name.split(".")[0]).to_dict()[
            "groups"
        ]
        assert list(layers) == ["0", "2", "3", "5"]
        with pytest.raises(wdhook.ArgumentError, match=r"`by` must be[\s\S]*got: 'layer'"):
            handle.snapshot(by="layer")
    with pytest.raises(wdhook.WdhookError, match="removed"):
        handle.snapshot()


def test_a_snapshot_in_a_notebook() -> None:
    """HTML with a row for each group and a column for each number; nothing where none is known."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
    with wdhook.attach(model, 0.5) as decay:
        empty = decay.snapshot()._repr_html_()
        model(torch.ones(1, 1)).sum().backward()
        text = decay.snapshot()._repr_html_()
    assert "<p>step 0, weight decay 0.5</p>" in text
    assert "<td>weight</td><td>1</td><td>2</td><td>1</td><td>1</td><td>0.5</td>" in text
    assert text.count("<tr>") == 1 + 2
    assert "<td>weight</td><td>1</td><td>2</td><td></td>" in empty


def test_without_gradients() -> None:
    """What is not there is None, and no number to log."""
    model = perceptron()
    with wdhook.attach(model, λ) as handle:
        snapshot = handle.snapshot()
    numbers = snapshot.to_dict()["groups"]["weight"]
    assert (numbers["grad_norm"], numbers["cos"], numbers["share"]) == (None, None, None)
    norms = {f"x/norm/{role}" for role in ("weight", "bias", "norm")}
    assert set(snapshot.scalars("x")) == {
        "x/weight_decay",
        "x/share/bias",
        "x/share/norm",
        *norms,
    }
    json.dumps(snapshot.to_dict())


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_nothing_is_read_before_it_is_asked_for(mode: str) -> None:
    """Taking a snapshot, and the step that completes it, read no value; the mode above would see
    it."""
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0, foreach=False, capturable=False)
    with wdhook.attach(model, λ, mode=mode, at="step", optimizer=optimizer) as handle:
        train(model, optimizer, batches(model, 1))
        loss_of(model, batches(model, 1)[0]).backward()
        with NoReading():
            snapshot = handle.snapshot()
            for view in handle._engine.state.optimizers.views():
                snapshot.note_step(view)
        with pytest.raises(AssertionError, match="a value was read"), NoReading():
            float(snapshot._rows[0][1][0])


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "independent"])
@pytest.mark.parametrize("at", MOMENTS)
def test_training_does_not_notice(mode: str, at: str) -> None:
    """A run of which a snapshot is taken at each step is the run without, bit for bit."""
    models = twins(convnet())
    for model, watched in zip(models, (True, False), strict=True):
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        given = optimizer if mode != "coupled" else None
        with wdhook.attach(model, λ, mode=mode, at=at, optimizer=given) as handle:
            for batch in batches(model, 4):
                zero(model, to_none=True)
                loss_of(model, batch).backward()
                if watched:
                    handle.snapshot().to_dict()
                    kept = handle.snapshot()
                optimizer.step()
                if watched:
                    kept.to_dict()
    assert_bit_equal(models[0].state_dict(), models[1].state_dict())


def test_a_snapshot_that_is_thrown_away_keeps_nothing() -> None:
    """The copies that it keeps until the step go with it."""
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    with wdhook.attach(model, λ, mode="decoupled", at="step", optimizer=optimizer) as handle:
        loss_of(model, batches(model, 1)[0]).backward()
        snapshot = handle.snapshot()
        copy = weakref.ref(snapshot._awaited[0].before)
        assert copy() is not None
        del snapshot
        gc.collect()
        assert copy() is None
        optimizer.step()


def test_an_invariant_weight_has_no_angle() -> None:
    """Before BatchNorm in training mode ⟨w, g⟩ is zero (Euler's identity), up to its eps; behind
    it, it is not."""
    torch.manual_seed(0)  # an angle may be right by chance
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    with wdhook.attach(model, λ) as handle:
        loss_of(model, torch.randn(16, 6, dtype=torch.float64)).backward()
        groups = handle.snapshot(by="name").to_dict()["groups"]
    # With eps the output of BatchNorm depends on the scale by eps/(var + eps), 1e-5 over a
    # variance near 1/3.
    assert abs(groups["0.weight"]["cos"]) < 1e-3
    assert abs(groups["3.weight"]["cos"]) > 1e-2


def test_sparse_bfloat16_and_complex() -> None:
    """Odd tensors: rows that a sparse gradient names twice add up, low precision is summed in
    float32."""
    embedding = nn.Embedding(5, 3, sparse=True)
    with wdhook.attach(embedding, λ) as handle:
        embedding(torch.tensor([1, 3, 1])).sum().backward()
        groups = handle.snapshot().to_dict()["groups"]["embedding"]
    # Row 1 is used twice, row 3 once; what was decayed is subtracted in float32 again.
    assert groups["norm"] == pytest.approx(embedding.weight.norm().item(), rel=1e-6)
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    with wdhook.attach(model, λ) as handle:
        norm = handle.snapshot().to_dict()["groups"]["weight"]["norm"]
    assert norm == pytest.approx(
        model.weight.float().norm().item(), rel=1e-5
    )  # 4,096 terms, random walk of 2⁻²⁴
    mixing = nn.Module()
    mixing.weight = nn.Parameter(torch.tensor([[3.0 + 4.0j, 0.0], [0.0, 0.0]]))
    with wdhook.attach(mixing, λ) as handle:
        (mixing.weight * torch.tensor([1.0 - 1.0j, 2.0])).real.sum().backward()
        numbers = handle.snapshot().to_dict()["groups"]["weight"]
    assert numbers["norm"] == 5.0
    assert numbers["grad_norm"] == pytest.approx(
        math.sqrt(2 * (2 + 4)), rel=1e-6
    )  # float32, one rounding each


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are summed in pieces."""
    from wdhook._decay import snapshot as _snapshot

    monkeypatch.setattr(_snapshot, "_PIECE", 3)
    one, other = torch.arange(10.0), torch.arange(10.0).flip(0)
    assert _snapshot._dot(one, other).item() == 120.0


# -- how far a step turns --------------------------------------------------------------------------


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_how_far_a_step_moves_and_turns(mode: str, at: str) -> None:
    """By the definitions, for decayed and for exempt groups; None before the step."""
    model = perceptron(torch.float64)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer) as handle:
        zero(model, to_none=True)
        before = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
        loss_of(model, batches(model, 1)[0]).backward()
        snapshot = handle.snapshot(by="name")
        early = snapshot.to_dict()["groups"]["0.weight"]
        assert early["change"] is early["angle"] is early["equilibrium"] is None
        assert (early["share"] is None) == (mode == "decoupled")
        optimizer.step()
        groups = snapshot.to_dict()["groups"]
    for name, param in model.named_parameters():
        p, after = before[name], param.detach().flatten()
        numbers = groups[name]
        if not p.any():  # a bias of LayerNorm
            assert numbers["change"] is numbers["angle"] is None
            continue
        assert numbers["change"] == pytest.approx((p - after).norm().item() / p.norm().item())
        # arccos loses half of the digits where an angle is small.
        assert numbers["angle"] == pytest.approx(math.acos(cosine(p, after)), rel=1e-5)
        decayed = numbers["share"] > 0
        assert decayed == (name in ("0.weight", "3.weight", "5.weight"))
        expected = pytest.approx(math.sqrt(2 * LR * λ)) if decayed else None
        assert numbers["equilibrium"] == expected


def test_roles_join_parameters_into_one_vector() -> None:
    """The angle of a role is that of all its parameters, and the equilibrium a root mean square."""
    model = perceptron(torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": LR / 2}]
    optimizer = SGD(groups, lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step") as handle:
        p = flat(weights(model))
        squares = [w.detach().square().sum().item() for w in weights(model)]
        loss_of(model, batches(model, 1)[0]).backward()
        snapshot = handle.snapshot()
        optimizer.step()
        numbers = snapshot.to_dict()["groups"]["weight"]
        after = flat(weights(model))
    assert numbers["angle"] == pytest.approx(math.acos(cosine(p, after)), rel=1e-5)
    mean = (squares[0] + (squares[1] + squares[2]) / 2) / sum(squares)
    assert numbers["equilibrium"] == pytest.approx(math.sqrt(2 * LR * λ * mean))


def adamw(params: Any) -> torch.optim.Optimizer:
    """A short memory of squares, as the norm of the weights settles in 100 steps."""
    return AdamW(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: SGD(params, lr=0.2),
        lambda params: SGD(params, lr=0.02, momentum=0.8),
        lambda params: SGD(params, lr=0.02, momentum=0.8, nesterov=True),
        adamw,
    ],
    ids=["plain", "momentum", "nesterov", "adamw"],
)
def test_the_equilibrium_is_where_training_goes(mode: str, make: Any) -> None:
    """A weight of which only the direction matters, and a random gradient in each step."""
    if mode == "coupled" and make is adamw:
        pytest.skip("coupled decay under Adam has no such formula")
    torch.manual_seed(0)
    model = nn.Linear(40, 50, bias=False, dtype=torch.float64)
    optimizer = make(model.parameters())
    angles, kept = [], {}
    with wdhook.attach(model, 0.1 if make is not adamw else 0.5, mode=mode, at="step") as handle:
        for step in range(600):
            optimizer.zero_grad()
            direction = model.weight / model.weight.norm()
            (direction * torch.randn_like(direction)).sum().backward()
            snapshot = handle.snapshot() if step >= 500 else None
            optimizer.step()
            if snapshot is not None:
                kept = snapshot.to_dict()["groups"]["weight"]
                angles.append(kept["angle"])
    # One vector of 2,000 random elements in each of 100 steps; to first order in lr·λ, up to 0.1.
    assert sum(angles) / len(angles) == pytest.approx(kept["equilibrium"], rel=0.08)


def test_an_equilibrium_that_cannot_be_told() -> None:
    """Another optimizer, cautious decay, and a step without decay."""
    for make, more, paused in (
        (torch.optim.NAdam, {}, False),
        (AdamW, {"cautious": True}, False),
        (AdamW, {}, True),
    ):
        model = perceptron()
        optimizer = make(model.parameters(), lr=LR, weight_decay=0)
        with wdhook.attach(model, λ, mode="decoupled", at="step", **more) as handle:
            loss_of(model, batches(model, 1)[0]).backward()
            snapshot = handle.snapshot()
            with handle.paused() if paused else nullcontext():
                optimizer.step()
            numbers = snapshot.to_dict()["groups"]["weight"]
        assert numbers["equilibrium"] is None
        assert numbers["angle"] > 0


def test_a_skipped_step_turns_nothing() -> None:
    """No change, no angle."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.0)
    with wdhook.attach(model, λ, at="step") as handle:
        loss_of(model, batches(model, 1)[0]).backward()
        snapshot = handle.snapshot()
        optimizer.step()
        numbers = snapshot.to_dict()["groups"]["weight"]
    assert (numbers["change"], numbers["angle"], numbers["equilibrium"]) == (0.0, 0.0, 0.0)


# -- toward a target -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_toward_a_target(mode: str, at: str) -> None:
    """The share is that of λ·(p − t); the gradient is what the loss gave."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False).double()
    start, lr, weight_decay = torch.randn(5, 6).double(), 0.1, 0.3
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    anchor = wdhook.Anchor({"weight": start})
    x = torch.randn(4, 6).double()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    with wdhook.attach(
        model, weight_decay, mode=mode, at=at, optimizer=optimizer, toward=anchor
    ) as decay:
        model(x).square().sum().backward()
        snapshot = decay.snapshot()
        optimizer.step()
    numbers = snapshot.to_dict()["groups"]["weight"]
    away = before - start
    taken, whole = weight_decay * away, gradient + weight_decay * away
    if mode == "decoupled":
        taken, whole = lr * weight_decay * away, before - model.weight.detach()
    assert numbers["share"] == pytest.approx((taken.norm() / whole.norm()).item(), rel=1e-12)
    assert numbers["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-12)
    if mode == "coupled" or at == "step":  # else the parameter of now is the shrunk one
        cos = (before * gradient).sum() / (before.norm() * gradient.norm())
        assert numbers["cos"] == pytest.approx(cos.item(), rel=1e-12)
    assert numbers["equilibrium"] is None


def test_before_the_first_step_the_first_values_are_the_target() -> None:
    """No decay yet: the distance is 0."""
    model = nn.Linear(3, 2, bias=False)
    with wdhook.attach(model, 0.1, mode="decoupled", at="step", toward="init") as decay:
        model(torch.ones(1, 3)).sum().backward()
        snapshot = decay.snapshot()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert snapshot.to_dict()["groups"]["weight"]["share"] == 0.0
