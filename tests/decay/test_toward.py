"""Decay toward a target: p ← p − lr·λ·(p − t), and g ← g + λ·(p − t)."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import LR, assert_bit_equal, batches, loss_of, perceptron, train, weights, zero_step, λ

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
AT = pytest.mark.parametrize("at", ["backward", "step"])
MODE = pytest.mark.parametrize("mode", ["coupled", "decoupled"])
Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return SGD(model.parameters(), lr=LR, momentum=0.9)


def firsts(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def numbers(model: nn.Module, t: float) -> dict[str, Tensor]:
    return {name: torch.full_like(p, t) for name, p in model.named_parameters()}


def by_hand(
    model: nn.Module, inputs: list[Tensor], targets: dict[str, Tensor], mode: str, make: Make = sgd
) -> None:
    """A training loop with the decay written out, by `torch.lerp` where it changes parameters."""
    optimizer = make(model)
    decayed = {id(p) for p in weights(model)}
    for x in inputs:
        model.zero_grad()
        loss_of(model, x).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if id(p) not in decayed:
                    continue
                assert p.grad is not None
                if mode == "coupled":
                    p.grad.add_(p - targets[name], alpha=λ)
                else:
                    p.lerp_(targets[name], 1 - (1 - LR * λ))
        optimizer.step()


@MODE
@AT
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("toward", [1.0, "init"])
def test_as_written_out(
    toward: Any, dtype: torch.dtype, foreach: bool | None, at: str, mode: str
) -> None:
    """To the last bit, with momentum."""
    model, twin = perceptron(dtype), perceptron(dtype)
    optimizer = sgd(model)
    targets = firsts(twin) if toward == "init" else numbers(twin, toward)
    inputs = batches(model, 5)
    with wdhook.attach(
        model, λ, mode=mode, at=at, optimizer=optimizer, toward=toward, foreach=foreach
    ):
        train(model, optimizer, inputs)
    by_hand(twin, inputs, targets, mode)
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_the_gradient_of_a_penalty() -> None:
    """½·λ·‖p − t‖² in the loss (L2-SP) gives the same gradients to the last bit: autograd
    multiplies λ with the same differences, and adds them to the same sums."""
    model, twin = perceptron(torch.float64), perceptron(torch.float64)
    start = firsts(twin)
    x, y = batches(model, 2)
    for each in (model, twin):  # away from the start
        with torch.no_grad():
            for p in each.parameters():
                p.add_(0.1)
    anchor = wdhook.Anchor(start)
    with wdhook.attach(model, λ, toward=anchor):
        loss_of(model, x).backward()
    penalty = sum(
        (λ / 2) * (p - start[n]).square().sum()
        for n, p in twin.named_parameters()
        if id(p) in {id(w) for w in weights(twin)}
    )
    loss_of(twin, x).backward()
    penalty.backward()  # type: ignore[union-attr]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # λ/2·2·(p − t) is λ·(p − t) to the last bit; the sum with the gradient is rounded once
        # here (fused: alpha·x + g) and twice there: 2 units of 2^-53 of numbers below 1.
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=2**-52)
    assert not torch.equal(x, y)


@AT
@MODE
def test_at_its_target_a_parameter_stays(mode: str, at: str) -> None:
    """No rounding: a parameter without a gradient of its own does not move from its anchor."""
    model = perceptron()
    start = firsts(model)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer, toward="init"):
        for _ in range(3):
            optimizer.zero_grad()
            sum((p * 0).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
            optimizer.step()
    assert_bit_equal(dict(model.named_parameters()), start)


@AT
def test_zero_is_ordinary_decay(at: str) -> None:
    """To the last bit, also beside parameters with another target."""
    model, twin = perceptron(), perceptron()
    inputs = batches(model, 4)
    with wdhook.attach(model, λ, mode="decoupled", at=at, optimizer=(o := sgd(model)), toward=0.0):
        train(model, o, inputs)
    with wdhook.attach(twin, λ, mode="decoupled", at=at, optimizer=(o := sgd(twin))):
        train(twin, o, inputs)
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("mode", ["independent", "corrected"])
@AT
def test_other_amounts(mode: str, at: str) -> None:
    """The amount is that of the mode."""
    model, twin = perceptron(torch.float64), perceptron(torch.float64)
    start = firsts(twin)
    o, q = SGD(model.parameters(), lr=LR), SGD(twin.parameters(), lr=LR)
    inputs = batches(model, 4)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=o, toward="init"):
        for step, x in enumerate(inputs):
            o.param_groups[0]["lr"] = q.param_groups[0]["lr"] = lr = LR / (1 + step)
            o.zero_grad()
            loss_of(model, x).backward()
            o.step()
            q.zero_grad()
            loss_of(twin, x).backward()
            share = lr / LR if mode == "independent" else lr**2 / LR
            for n, p in twin.named_parameters():
                if id(p) in {id(w) for w in weights(twin)}:
                    with torch.no_grad():
                        p.lerp_(start[n], 1 - (1 - share * λ))
            q.step()
    assert_bit_equal(model.state_dict(), twin.state_dict())


# ---------------------------------------------------------------- what the first value is


@AT
def test_init_is_the_value_before_the_first_update(at: str) -> None:
    """Weights that are loaded after `attach` are the target, not those that they replace."""
    model, other = perceptron(), perceptron(seed=7)
    optimizer = sgd(model)
    decay = wdhook.attach(model, λ, mode="decoupled", at=at, optimizer=optimizer, toward="init")
    model.load_state_dict(other.state_dict())
    train(model, optimizer, batches(model, 3))
    assert_bit_equal(
        decay.state_dict()["targets"], {n: firsts(other)[n] for n in decay.plan.decayed}
    )
    decay.remove()


@AT
@MODE
def test_paused_steps_do_not_move_the_target(mode: str, at: str) -> None:
    """A warm-up inside of `paused()`, or with λ of 0, changes the parameters and not the target."""
    model = perceptron()
    start = firsts(model)
    optimizer = sgd(model)
    decay = wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer, toward="init")
    with decay.paused():
        train(model, optimizer, batches(model, 2))
    decay.weight_decay = 0.0
    train(model, optimizer, batches(model, 2))
    decay.weight_decay = λ
    train(model, optimizer, batches(model, 2))
    assert_bit_equal(decay.state_dict()["targets"], {n: start[n] for n in decay.plan.decayed})
    decay.remove()


def test_a_frozen_parameter_has_no_copy_until_it_is_trained() -> None:
    model = perceptron()
    model[0].requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    decay = wdhook.attach(model, λ, mode="decoupled", at="step", toward="init")
    train(model, optimizer, batches(model, 2))
    assert list(decay.state_dict()["targets"]) == ["3.weight", "5.weight"]
    model[0].requires_grad_(True)
    first = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, batches(model, 2))
    assert torch.equal(decay.state_dict()["targets"]["0.weight"], first)
    decay.remove()


@AT
def test_what_others_step_is_seen_before_the_first_step(at: str) -> None:
    """ZeroRedundancyOptimizer steps some parameters in another process, whose values come by
    broadcast: the target of each is its value before."""
    model = perceptron()
    start = firsts(model)
    decay = wdhook.attach(model, λ, mode="coupled", at=at, toward="init")
    optimizer = SGD(model[0].parameters(), lr=LR)
    loss_of(model, batches(model, 1)[0]).backward()
    optimizer.step()
    with torch.no_grad():  # as if received
        model[5].weight.add_(1.0)
    targets = decay.state_dict()["targets"]
    assert_bit_equal(targets, {n: start[n] for n in decay.plan.decayed})
    decay.remove()


def test_lazy_parameters_are_drawn_to_their_first_values() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 2))
    decay = wdhook.attach(model, λ, mode="decoupled", at="step", toward="init")
    assert list(decay.state_dict()["targets"]) == ["2.weight"]
    x = torch.ones(2, 4)
    model(x)
    first = model[0].weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=LR)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert torch.equal(decay.state_dict()["targets"]["0.weight"], first)
    decay.remove()


# ---------------------------------------------------------------- where the target is kept


@MODE
@AT
def test_in_lower_precision(mode: str, at: str) -> None:
    """The copy takes half the memory; the target is its rounded value."""
    model, twin = perceptron(), perceptron()
    optimizer, inputs = sgd(model), batches(model, 3)
    anchor = wdhook.Anchor("init", dtype=torch.bfloat16, device="cpu")
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer, toward=anchor) as decay:
        train(model, optimizer, inputs)
        saved = decay.state_dict()["targets"]
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    rounded = {n: p.bfloat16().float() for n, p in firsts(twin).items()}
    by_hand(twin, inputs, rounded, mode)
    assert_bit_equal(model.state_dict(), twin.state_dict())


@MODE
def test_a_converted_model_converts_its_target(mode: str) -> None:
    model = perceptron()
    optimizer = sgd(model)
    decay = wdhook.attach(model, λ, mode=mode, at="step", toward="init")
    train(model, optimizer, batches(model, 1))
    model.double()
    optimizer.state.clear()
    train(model, optimizer, batches(model, 1))
    assert {t.dtype for t in decay.state_dict()["targets"].values()} == {torch.float64}
    decay.remove()


@MODE
@AT
def test_complex_parameters(mode: str, at: str) -> None:
    """A number is a real target; both parts of the distance shrink."""
    weight = nn.Parameter(torch.tensor([[3 + 2j]], dtype=torch.complex128))
    model = nn.Module()
    model.weight = weight
    optimizer = SGD([weight], lr=LR)
    with wdhook.attach(
        model, λ, mode=mode, at=at, optimizer=optimizer, overrides={"weight": True}, toward=1.0
    ):
        (weight.real * 0).sum().backward()
        optimizer.step()
    # One rounding of 2^-53 in each of three operations on numbers below 4.
    torch.testing.assert_close(
        weight.detach(), 1 + (1 - LR * λ) * torch.tensor([[2 + 2j]]).to(weight), rtol=0, atol=2e-15
    )


@MODE
def test_rows_of_a_sparse_gradient(mode: str) -> None:
    """The rows that have a gradient, and no others."""
    torch.manual_seed(0)
    model = nn.Embedding(6, 3, sparse=True)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    before = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=LR)
    anchor = wdhook.Anchor({"weight": start})
    with wdhook.attach(model, λ, mode=mode, at="step", toward=anchor):
        (model(torch.tensor([1, 4, 4])) * 0).sum().backward()
        optimizer.step()
    moved = before.lerp(start, 1 - (1 - LR * λ)) if mode == "decoupled" else before.clone()
    if mode == "coupled":
        moved -= LR * ((before - start) * λ)
    rows = [1, 4]
    assert torch.equal(model.weight[rows], moved[rows])
    others = [0, 2, 3, 5]
    assert torch.equal(model.weight[others], before[others])


# ---------------------------------------------------------------- low precision


@AT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deferred_toward_a_target(dtype: torch.dtype, at: str) -> None:
    """p ← t + acc·(p − t): of the decay in float64 at least 0.98 is there after a flush."""
    torch.manual_seed(0)
    model = nn.Linear(128, 128, bias=False)
    start = model.weight.detach().clone().to(dtype)
    with torch.no_grad():
        model.weight.add_(torch.randn(128, 128))
    model.to(dtype)
    before = model.weight.detach().double()
    optimizer = SGD(model.parameters(), lr=LR)
    small, steps = 5e-4, 1000
    anchor = wdhook.Anchor({"weight": start})
    decay = wdhook.attach(
        model, small / LR, mode="decoupled", at=at, optimizer=optimizer, toward=anchor
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (model.weight * 0).sum().backward()
        optimizer.step()
    decay.remove()
    t = start.double()
    d, e = (before - t).flatten(), (model.weight.detach().double() - t).flatten()
    share = torch.log((d @ e) / (d @ d)).item() / (steps * torch.log1p(torch.tensor(-small)).item())
    assert 0.98 < share < 1.02  # the bound of the issue, on the distance in place of the parameter


def test_pending_decay_and_target_are_resumed() -> None:
    """A run that is saved with decay pending goes on to the last bit."""

    def fresh() -> tuple[Any, ...]:
        model = perceptron(torch.bfloat16)
        optimizer = SGD(model.parameters(), lr=LR)
        return model, optimizer, wdhook.attach(model, λ, mode="decoupled", at="step", toward="init")

    model, optimizer, decay = fresh()
    inputs = batches(model, 8)
    train(model, optimizer, inputs[:4])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), decay.state_dict()))
    train(model, optimizer, inputs[4:])
    again, optimizer_again, decay_again = fresh()
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    decay_again.load_state_dict(saved[2])
    train(again, optimizer_again, inputs[4:])
    assert_bit_equal(again.state_dict(), model.state_dict())
    assert saved[2]["memory"]
    for each in (decay, decay_again):
        each.remove()


# ---------------------------------------------------------------- resume


def a_run(toward: Any, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = perceptron(seed=seed)
    return model, sgd(model), wdhook.attach(model, λ, mode="decoupled", at="step", toward=toward)


@pytest.mark.parametrize("trained", [True, False])
def test_a_resume_takes_the_first_values_of_the_first_run(trained: bool, tmp_path: Path) -> None:
    """Through a file; also from a state that was saved before the first step."""
    model, optimizer, decay = a_run("init")
    start, inputs = firsts(model), batches(model, 6)
    train(model, optimizer, inputs[:3] if trained else [])
    states = model.state_dict(), optimizer.state_dict(), decay.state_dict()
    torch.save(states, tmp_path / "run.pt")
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    other, optimizer, resumed = a_run("init", seed=5)
    other.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    train(other, optimizer, inputs[3:])
    saved = resumed.state_dict()["targets"]
    assert_bit_equal(saved, {n: start[n] for n in resumed.plan.decayed})
    decay.remove()
    resumed.remove()


@pytest.mark.parametrize(("was", "now"), [(None, "init"), ("init", None), (1.0, 2.0)], ids=str)
def test_a_state_of_other_targets_is_refused(was: Any, now: Any) -> None:
    *_, decay = a_run(was)
    state = decay.state_dict()
    decay.remove()
    *_, other = a_run(now)
    with pytest.raises(wdhook.ArgumentError, match="other targets"):
        other.load_state_dict(state)
    other.remove()


def test_another_source_is_refused() -> None:
    """A few values are saved: the source of a resumed run is the same, or an error."""
    source = perceptron(seed=3)
    *_, decay = a_run(wdhook.Anchor(source))
    state = decay.state_dict()
    assert "targets" not in state
    decay.remove()
    *_, same = a_run(wdhook.Anchor(copy.deepcopy(source).state_dict()))
    same.load_state_dict(state)
    same.remove()
    *_, other = a_run(wdhook.Anchor(perceptron(seed=4)))
    with pytest.raises(wdhook.ArgumentError, match="other values"):
        other.load_state_dict(state)
    other.remove()


def test_targets_follow_their_tensors() -> None:
    """A model that is cut and wrapped in training: each tensor keeps the values that it had."""
    model = perceptron()
    start = firsts(model)
    optimizer = sgd(model)
    decay = wdhook.attach(model, λ, mode="decoupled", at="step", toward="init")
    train(model, optimizer, batches(model, 2))
    outer = nn.Sequential(*[model[i] for i in (0, 1, 2, 3, 4, 5)])
    del model[4]
    before = {id(p): p.detach().clone() for p in outer.parameters()}
    optimizer.zero_grad()
    sum((p * 0).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.state.clear()
    optimizer.step()
    last = outer[5].weight
    assert torch.equal(last, before[id(last)].lerp(start["5.weight"], 1 - (1 - LR * λ)))
    decay.remove()


@pytest.mark.parametrize("cut_first", [True, False])
def test_a_state_is_saved_by_the_names_of_now(cut_first: bool) -> None:
    """Of a model that was cut in training: names have passed on to other tensors of the same
    shape. The resuming script attaches after the cut, or before."""

    def tower() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))

    def step(model: nn.Module) -> None:
        model(torch.ones(1, 4)).sum().backward()
        SGD(model.parameters(), lr=LR).step()

    how: dict[str, Any] = {"mode": "decoupled", "at": "step", "toward": "init"}
    schedule = wdhook.schedules.constant(λ)
    model = tower()
    start = [layer.weight.detach().clone() for layer in model]
    with wdhook.attach(model, schedule, **how) as decay:
        step(model)
        del model[1]
        step(model)
        state = decay.state_dict()
    assert list(state["targets"]) == ["0.weight", "1.weight", "2.weight"]
    again = tower()
    if cut_first:
        del again[1]
    resumed = wdhook.attach(again, schedule, **how)
    if not cut_first:
        del again[1]
    resumed.load_state_dict(state)
    assert resumed.state_dict()["finished_steps"] == state["finished_steps"]
    with torch.no_grad():
        for layer in again:
            layer.weight.zero_()
    step(again)  # gradients of 0: another step than the decay comes from no layer
    for layer, target in zip(again, (start[0], start[2], start[3]), strict=True):
        assert torch.equal(layer.weight, torch.zeros(4, 4).lerp(target, 1 - (1 - LR * λ)))
    resumed.remove()


# ---------------------------------------------------------------- states of other shapes of a model


def tower(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))


HOW: dict[str, Any] = {"mode": "decoupled", "at": "step"}


class Wrapper(nn.Module):
    """Names parameters as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("inner", [True, False])
def test_a_state_of_a_wrapped_model(inner: bool) -> None:
    """Attached to a wrapper and resumed without it, or the other way round: targets and schedule
    go on."""
    schedule = wdhook.schedules.linear(0.1, 0.9, 8)
    model = tower()
    start = firsts(model)
    with wdhook.attach(Wrapper(model) if inner else model, schedule, toward="init", **HOW) as decay:
        zero_step(model)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        zero_step(model)
        state, λ_then = decay.state_dict(), decay.weight_decay
    again = tower()
    again.load_state_dict(model.state_dict())
    resumed = wdhook.attach(again if inner else Wrapper(again), schedule, toward="init", **HOW)
    resumed.load_state_dict(state)
    assert list(resumed.state_dict()["targets"]) == ["0.weight", "1.weight", "2.weight"]
    assert torch.equal(resumed.state_dict()["targets"]["0.weight"], start["0.weight"])
    zero_step(again)
    assert resumed.weight_decay == schedule(3)
    assert λ_then == schedule(2)
    resumed.remove()


def test_two_tensors_that_were_decided_under_one_name() -> None:
    """After an insertion both have a target of their own in the state."""
    model = tower(2)
    decay = wdhook.attach(model, λ, toward="init", **HOW)
    start = firsts(model)
    zero_step(model)
    model.insert(1, nn.Linear(4, 4, bias=False))
    new = model[1].weight.detach().clone()
    with pytest.warns(wdhook.WdhookWarning, match="new parameter"):
        zero_step(model)
    targets = decay.state_dict()["targets"]
    expected = {"0.weight": start["0.weight"], "1.weight": new, "2.weight": start["1.weight"]}
    assert_bit_equal(targets, expected)
    decay.load_state_dict(decay.state_dict())
    assert_bit_equal(decay.state_dict()["targets"], expected)
    decay.remove()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("toward", ["init", "given"])
def test_a_tensor_that_is_made_of_another_keeps_its_target(toward: str, trained: bool) -> None:
    """Weight norm makes two of one; the second carries the weight."""
    model = tower(1)
    start = model[0].weight.detach().clone()
    anchor: Any = "init" if toward == "init" else wdhook.Anchor({"0.weight": start})
    decay = wdhook.attach(model, λ, toward=anchor, **HOW)
    if trained:
        zero_step(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    nn.utils.parametrizations.weight_norm(model[0])
    weight = model[0].parametrizations.weight.original1
    before = weight.detach().clone()
    zero_step(model)
    # Before the first step the values that are loaded count: those are at their target.
    target = before if toward == "init" and not trained else start
    assert torch.equal(weight, before.lerp(target, 1 - (1 - LR * λ)))
    decay.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flush_before_the_first_step_keeps_what_was_loaded(dtype: torch.dtype) -> None:
    model = tower(1).to(dtype)
    start = model[0].weight.detach().clone()
    with wdhook.attach(model, λ, toward="init", **HOW) as decay:
        zero_step(model)
        state = decay.state_dict()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    resumed = wdhook.attach(model, λ, toward="init", **HOW)
    resumed.load_state_dict(state)
    resumed.flush()
    assert torch.equal(resumed.state_dict()["targets"]["0.weight"], start)
    zero_step(model)
    assert torch.equal(resumed.state_dict()["targets"]["0.weight"], start)
    resumed.remove()


def test_pending_decay_toward_a_number_is_flushed_toward_it() -> None:
    """Loaded before any step of the new handle."""
    model = tower(1).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with wdhook.attach(model, 0.04, toward=1.0, **HOW) as decay:
        zero_step(model)
        state = decay.state_dict()
    assert state["memory"]
    with wdhook.attach(model, 0.04, toward=1.0, **HOW) as resumed:
        resumed.load_state_dict(state)
    assert model[0].weight.eq(1).all()


@pytest.mark.parametrize(
    "now",
    [
        {"0.*": "init", "1.*": 1.0},
        {"0.*": 2.0, "1.*": "init"},
        {"0.*": 1.0000001, "1.*": "init"},
        {"0.*": 1.0, "1.*": "init", "2.*": 1.0},
    ],
    ids=str,
)
def test_targets_are_compared_one_by_one(now: Any) -> None:
    model = tower()
    with wdhook.attach(model, λ, toward={"0.*": 1.0, "1.*": "init"}, **HOW) as decay:
        state = decay.state_dict()
    with wdhook.attach(model, λ, toward={"0.*": 1.0, "1.*": "init"}, **HOW) as same:
        same.load_state_dict(state)
    other = wdhook.attach(model, λ, toward=now, **HOW)
    with other, pytest.raises(wdhook.ArgumentError, match="other targets"):
        other.load_state_dict(state)


@pytest.mark.parametrize("by", ["attach", "plan", "adopt"])
def test_a_new_layer_is_decided_by_the_same_rules(by: str) -> None:
    """A number is its target too, and an override holds, however the plan was made."""
    model = tower(1)
    rules: dict[str, Any] = {"toward": 1.0, "overrides": {"*": True}}
    if by == "attach":
        decay = wdhook.attach(model, λ, **rules, **HOW)
    elif by == "plan":
        decay = wdhook.attach(model, wdhook.plan(model, λ, **rules), **HOW)
    else:
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=λ)
        decay = wdhook.adopt(model, optimizer, **rules)
    model.append(nn.Linear(4, 4))
    before = model[1].weight.detach().clone()
    zero_step(model)
    assert torch.equal(model[1].weight, before.lerp(torch.ones(()), 1 - (1 - LR * λ)))
    assert decay.plan["1.bias"].weight_decay == λ
    decay.remove()


def test_new_layers_and_a_source_whose_names_mean_others() -> None:
    """A layer that pushes others on is not drawn to the values under its name."""
    model = tower(2)
    decay = wdhook.attach(model, λ, toward=wdhook.Anchor(tower(2)), **HOW)
    zero_step(model)
    model.insert(1, nn.Linear(4, 4, bias=False))
    before = model[1].weight.detach().clone()
    with pytest.warns(wdhook.WdhookWarning, match="drawn to 0"):
        zero_step(model)
    assert torch.equal(model[1].weight, before * (1 - LR * λ))
    decay.remove()


@pytest.mark.parametrize("kind", ["LBFGS", "Lion", "second"])
def test_a_resume_without_the_state_is_told(kind: str) -> None:
    """Whatever the state of an optimizer looks like; also of a second one."""

    class Lion(SGD):
        """Has a momentum under another name, and no count."""

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["exp_avg"] = torch.ones_like(p)
            super().step()

    model = tower(2)
    params = list(model[1 if kind == "second" else 0].parameters())
    if kind == "LBFGS":
        optimizer: torch.optim.Optimizer = torch.optim.LBFGS(params, lr=LR)
    else:
        optimizer = (AdamW if kind == "second" else Lion)(params, lr=LR, weight_decay=0)

    def step() -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(1, 4)).sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure) if kind == "LBFGS" else optimizer.step()

    step()
    with wdhook.attach(model, λ, toward="init", **HOW):
        if kind == "second":
            zero_step(model[0])
        with pytest.warns(wdhook.WdhookWarning, match="stepped before"):
            step()


def test_a_new_optimizer_with_an_old_state_is_no_resume() -> None:
    """The handle has the first values already."""
    model = tower(1)
    one = AdamW(model.parameters(), lr=LR, weight_decay=0)
    with wdhook.attach(model, λ, toward="init", **HOW):
        zero_step(model, one)
        other = AdamW(model.parameters(), lr=LR, weight_decay=0)
        other.load_state_dict(one.state_dict())
        zero_step(model, other)


def test_a_source_that_the_model_takes_over_after_attach() -> None:
    """`load_state_dict(assign=True)` of the source: the target would move with the parameter."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2, bias=False))
    state = {"0.weight": torch.ones(2, 2)}
    decay = wdhook.attach(model, λ, toward=wdhook.Anchor(state), **HOW)
    model.load_state_dict(state, assign=True)
    with pytest.raises(wdhook.TargetError, match="shares memory"):
        zero_step(model)
    decay.remove()


@pytest.mark.parametrize("toward", ["init", "given"])
def test_the_dtype_of_an_anchor(toward: str) -> None:
    """Also of a source, and of what was loaded."""
    model = tower(1)
    source: Any = "init" if toward == "init" else tower(1)
    with wdhook.attach(model, λ, toward="init", **HOW) as decay:
        zero_step(model)
        state = decay.state_dict()
    anchor = wdhook.Anchor(source, dtype=torch.bfloat16)
    resumed = wdhook.attach(model, λ, toward=anchor, **HOW)
    if toward == "init":
        resumed.load_state_dict(state)
    before = model[0].weight.detach().clone()
    zero_step(model)
    target = tower(1)[0].weight.detach().bfloat16().float()
    assert torch.equal(model[0].weight, before.lerp(target, 1 - (1 - LR * λ)))
    resumed.remove()


def test_a_number_keeps_its_precision() -> None:
    """0.1 in bfloat16 is another number than in float64."""
    model = tower(1).bfloat16()
    decay = wdhook.attach(model, λ, toward=0.1, **HOW)
    zero_step(model)
    model.double()
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.fill_(0.1)
        zero_step(model)
    assert model[0].weight.eq(0.1).all()
    decay.remove()


def test_a_real_precision_for_complex_values_is_refused() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    anchor = wdhook.Anchor("init", dtype=torch.bfloat16)
    decay = wdhook.attach(model, λ, overrides={"weight": True}, toward=anchor, **HOW)
    (model.weight.real * 0).sum().backward()
    with pytest.raises(wdhook.TargetError, match="complex"):
        SGD(model.parameters(), lr=LR).step()
    decay.remove()


def test_a_tied_weight_has_a_target_under_any_of_its_names() -> None:
    model = tower(2)
    model[1].weight = model[0].weight
    source = {"1.weight": torch.ones(4, 4)}
    decay = wdhook.attach(model, λ, toward=wdhook.Anchor(source), **HOW)
    before = model[0].weight.detach().clone()
    zero_step(model)
    assert torch.equal(model[0].weight, before.lerp(torch.ones(4, 4), 1 - (1 - LR * λ)))
    decay.remove()


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    model = tower(1)
    decay = wdhook.attach(model, λ, toward="init", **HOW)
    zero_step(model)
    target = weakref.ref(decay.state_dict()["targets"]["0.weight"])
    assert target() is not None
    del model
    gc.collect()
    assert target() is None


def test_adopt_toward() -> None:
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=λ)
    with wdhook.adopt(model, optimizer, toward="init") as decay:
        assert {d.target for d in decay.plan.decayed.values()} == {"init"}


def test_cautious_is_refused() -> None:
    with pytest.raises(wdhook.ArgumentError, match="cautious"):
        wdhook.attach(perceptron(), λ, mode="decoupled", at="step", cautious=True, toward="init")


def test_a_loaded_target_of_another_shape_is_an_error() -> None:
    model, optimizer, decay = a_run("init")
    state = decay.state_dict()
    state["targets"]["0.weight"] = torch.zeros(2, 2)
    decay.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wdhook.TargetError, match="another shape"):
        train(model, optimizer, batches(model, 1))
    assert_bit_equal(model.state_dict(), before)
    decay.remove()
