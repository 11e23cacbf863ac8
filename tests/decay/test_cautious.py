"""Cautious decay: only where the update shrinks a value too, after any optimizer's step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import (
    LR,
    NoReading,
    assert_bit_equal,
    assert_close,
    batches,
    loss_of,
    perceptron,
    train,
    twins,
    weights,
)

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
CAUTIOUS: dict[str, Any] = {"at": "step", "cautious": True, "mode": "decoupled"}
KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=LR, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=LR, weight_decay=0),
    "AdamW foreach": lambda p: AdamW(p, lr=LR, weight_decay=0, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=LR, weight_decay=0, fused=True),
    "maximize": lambda p: SGD(p, lr=LR / 100, maximize=True),
}


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, amount: float) -> None:
    """One step, and then the decay value by value, from the definition."""
    before = [w.detach().clone() for w in weights(model)]
    optimizer.step()
    with torch.no_grad():
        for weight, old in zip(weights(model), before, strict=True):
            new = weight.detach().clone()
            for index in range(weight.numel()):
                p, q = old.view(-1)[index], new.view(-1)[index]
                same_sign = torch.sign(p - q) * torch.sign(p) >= 0
                if same_sign:
                    weight.view(-1)[index] = q - p * amount


@pytest.mark.parametrize("mode", ["decoupled", "independent", "corrected"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(kind: str, mode: str) -> None:
    """To the last bit in float64, with a learning rate that changes."""
    model, twin = twins(perceptron(torch.float64))
    optimizer, reference = KINDS[kind](model.parameters()), KINDS[kind](twin.parameters())
    peak = optimizer.param_groups[0]["lr"]
    with wdhook.attach(model, 0.3, **{**CAUTIOUS, "mode": mode}):
        for i, batch in enumerate(batches(model, 6)):
            lr = peak * (1 - i / 8)
            for net, stepper in ((model, optimizer), (twin, reference)):
                stepper.param_groups[0]["lr"] = lr
                stepper.zero_grad()
                loss_of(net, batch).backward()
            optimizer.step()
            shares = {"decoupled": lr, "independent": lr / peak, "corrected": lr**2 / peak}
            step_by_hand(twin, reference, shares[mode] * 0.3)
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_the_mask_matters() -> None:
    """Plain decoupled decay ends elsewhere, and so does none: the comparison above can fail."""
    ends = []
    for arguments in (CAUTIOUS, {**CAUTIOUS, "cautious": False}, None):
        model = perceptron()
        optimizer = SGD(model.parameters(), lr=LR)
        handle = None if arguments is None else wdhook.attach(model, 0.3, **arguments)
        train(model, optimizer, batches(model, 4))
        if handle is not None:
            handle.remove()
        ends.append(model.state_dict())
    for other in ends[1:]:
        with pytest.raises(AssertionError, match="differs by"):
            assert_bit_equal(ends[0], other)


def test_signs_and_zeros() -> None:
    """Values that grow keep their size; u = 0 decays, as in nanochat and dion; tiny values
    count."""
    layer = nn.Linear(6, 1, bias=False)
    start = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1e-30]])
    layer.weight.data.copy_(start)
    optimizer = SGD(layer.parameters(), lr=1.0)
    layer.weight.grad = torch.tensor([[0.5, -0.5, -0.5, 0.5, 0.0, 1e-38]])
    with wdhook.attach(layer, 0.25, **CAUTIOUS):
        optimizer.step()
    # shrinks: 1 → 0.5 − 0.25; grows: 1 → 1.5; stands: 1 → 0.75; u·p = 1e-68 is 0 in float32
    expected = torch.tensor([[0.25, -0.25, 1.5, -1.5, 0.75, 0.75e-30]])
    assert torch.allclose(layer.weight, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["AdamW", "LaProp"])
def test_heavyball(name: str) -> None:
    """Its own `cautious_weight_decay=True`, up to the rounding of its compiled kernels."""
    heavyball = pytest.importorskip("heavyball", reason="heavyball is not installed")

    def make(params: Any, weight_decay: float, **options: Any) -> Any:
        return getattr(heavyball, name)(
            params, lr=0.01, weight_decay=weight_decay, warmup_steps=0, **options
        )

    ends = []
    with torch.compiler.set_stance("force_eager"):
        for who in ("wdhook", "heavyball", "plain"):
            model = perceptron()
            decayed = {id(w) for w in weights(model)}
            rest = [p for p in model.parameters() if id(p) not in decayed]
            groups = [
                {"params": weights(model), "weight_decay": 0.0 if who == "wdhook" else 1.0},
                {"params": rest, "weight_decay": 0.0},
            ]
            optimizer = make(groups, 0.0, cautious_weight_decay=who == "heavyball")
            if who == "wdhook":
                with wdhook.attach(model, 1.0, **CAUTIOUS):
                    train(model, optimizer, batches(model, 6))
            else:
                train(model, optimizer, batches(model, 6))
            ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
    # float32 sums of numbers below 1 in another order, over 6 steps of at most 0.01
    assert_close(ends[0], ends[1], 1e-6)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(ends[0], ends[2], 1e-4)


def test_adv_optm() -> None:
    """adv_optm's cautious AdamW, up to rounding in float32."""
    adv_optm = pytest.importorskip("adv_optm", reason="adv_optm is not installed")
    ends = []
    for own in (False, True):
        model = nn.Linear(8, 8, bias=False)
        torch.manual_seed(0)
        nn.init.normal_(model.weight)
        optimizer = adv_optm.AdamW_adv(
            model.parameters(), lr=0.01, weight_decay=1.0 if own else 0.0, cautious_wd=own
        )
        handle = None if own else wdhook.attach(model, 1.0, **CAUTIOUS)
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            model.weight.grad = torch.randn(8, 8, generator=generator)
            optimizer.step()
        if handle is not None:
            handle.remove()
        ends.append({"weight": model.weight.detach().clone()})
    assert_close(*ends, 2e-6)  # measured 1e-7; float32 numbers near 1


# ---------------------------------------------------------------- steps that are no plain steps


def test_a_step_that_was_skipped() -> None:
    """Under `found_inf`, and where nothing has moved, there is no decay; nothing is read for it."""
    for fused in (True, False):
        model = perceptron()
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0, fused=fused)
        with wdhook.attach(model, 0.3, **CAUTIOUS):
            train(model, optimizer, batches(model, 2))
            before = copy.deepcopy(model.state_dict())
            if fused:
                optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
            else:
                optimizer.param_groups[0]["lr"] = 0.0
                optimizer.step = _skipping(optimizer)  # type: ignore[method-assign]
            optimizer.step()
            assert_bit_equal(before, model.state_dict())


def _skipping(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step that is announced, and leaves the parameters as they are."""
    step = optimizer.step

    def skip() -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        optimizer.state.clear()
        step()

    skip.__wrapped__ = step  # type: ignore[attr-defined]
    return skip


def test_nothing_is_read() -> None:
    """Neither the comparison nor the question of a skipped step waits for the device."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9)
    with wdhook.attach(model, 0.3, **CAUTIOUS):
        train(model, optimizer, batches(model, 4))
        with NoReading():
            train(model, optimizer, batches(model, 2))


def test_closures_and_steps_within_steps() -> None:
    """A closure is evaluated before the comparison begins; `super().step()` is one step."""

    class Nested(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    ends = []
    for kind, closes in ((SGD, False), (SGD, True), (Nested, False), (Nested, True)):
        model = perceptron()
        optimizer = kind(model.parameters(), lr=LR)
        with wdhook.attach(model, 0.3, **CAUTIOUS):
            for batch in batches(model, 4):

                def closure(net: nn.Module = model, batch: Tensor = batch) -> Tensor:
                    net.zero_grad()
                    loss = loss_of(net, batch)
                    loss.backward()
                    return loss

                if closes:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        ends.append(model.state_dict())
    for other in ends[1:]:
        assert_bit_equal(ends[0], other)


def test_paused_and_without_gradient() -> None:
    """No decay in a pause, and none of a parameter that has no gradient."""
    model, twin = twins(perceptron())
    with wdhook.attach(model, 0.3, **CAUTIOUS) as decay, decay.paused():
        train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
    train(twin, SGD(twin.parameters(), lr=LR), batches(twin, 2))
    assert_bit_equal(model.state_dict(), twin.state_dict())
    with wdhook.attach(model, 0.3, **CAUTIOUS):
        model.zero_grad()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        before = model[5].weight.detach().clone()
        SGD(model.parameters(), lr=LR).step()
    assert torch.equal(model[5].weight, before)


def test_sparse_gradients() -> None:
    """The rows that a sparse gradient names are compared, the others stay."""
    table = nn.Embedding(5, 3, sparse=True)
    start = table.weight.detach().clone()
    with wdhook.attach(table, 0.5, **CAUTIOUS):
        table(torch.tensor([1, 3, 1])).square().sum().backward()
        SGD(table.parameters(), lr=LR).step()
    expected = start.clone()
    expected[1] -= LR * (4 * start[1])  # used twice
    expected[3] -= LR * (2 * start[3])
    for row in (1, 3):
        expected[row] -= start[row] * (LR * 0.5)  # the gradient of p² shrinks every value
    # two products and two differences in float32
    assert ((table.weight - expected).abs() <= 4 * 2**-24 * start.abs()).all()


def test_complex_parameters() -> None:
    """Real and imaginary parts are values of their own, as the optimizers of torch take them."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([[1.0 + 1.0j, -1.0], [0.0, 2.0]]))
    module.weight.grad = torch.tensor([[0.5 - 0.5j, 0.0], [0.0, 0.0]])
    with wdhook.attach(module, 0.25, **CAUTIOUS):
        SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(module.weight, torch.tensor([[0.25 + 1.5j, -0.75], [0.0, 1.5]]))


def test_the_share() -> None:
    """The snapshot counts the decay that was done, not what the mask has spared."""
    model = perceptron(torch.float64)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 0.3, **CAUTIOUS) as decay:
        loss_of(model, batches(model, 1)[0]).backward()
        before = [w.detach().clone() for w in weights(model)]
        gradients = [w.grad.clone() for w in weights(model)]
        snapshot = decay.snapshot()
        optimizer.step()
        share = snapshot.to_dict()["groups"]["weight"]["share"]
        taken = [p * (p * g >= 0) * (LR * 0.3) for p, g in zip(before, gradients, strict=True)]
        change = [p - w for p, w in zip(before, weights(model), strict=True)]
    norm = [torch.cat([t.detach().flatten() for t in ts]).norm().item() for ts in (taken, change)]
    assert share == pytest.approx(norm[0] / norm[1], rel=1e-9)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"at": "step"}, r"coupled[\s\S]*mode=\"decoupled\""),
        ({"at": "backward", "mode": "decoupled", "lr": 0.1}, r"after the update[\s\S]*step"),
        ({"at": "step", "mode": "decoupled", "low_precision": "defer"}, "mask of its own"),
        ({"at": "step", "mode": "decoupled", "cautious": "yes"}, "True or False"),
    ],
    ids=["coupled", "backward", "defer", "no truth value"],
)
def test_refused(arguments: dict[str, Any], pieces: str) -> None:
    """Where the update cannot be known there is an error that says why."""
    with pytest.raises(wdhook.ArgumentError, match=pieces):
        wdhook.attach(perceptron(), 0.1, **{"cautious": True, **arguments})


def test_low_precision_rounds_and_is_told() -> None:
    """bfloat16 under a mask cannot wait; the warning is that of rounded decay."""
    model = perceptron(torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=LR)
    with (
        wdhook.attach(model, 1e-4, **CAUTIOUS),
        pytest.warns(wdhook.WdhookWarning, match="rounds away"),
    ):
        train(model, optimizer, batches(model, 1))


def test_pending_decay_is_not_dropped() -> None:
    """A state with deferred decay is refused by a handle that cannot write it."""
    model = perceptron(torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 0.01, mode="decoupled", at="step") as decay:
        train(model, optimizer, batches(model, 1))
        state = decay.state_dict()
        decay.flush()
        flushed = decay.state_dict()
    with wdhook.attach(model, 0.01, **CAUTIOUS) as decay:
        with pytest.raises(wdhook.ArgumentError, match=r"flush\(\)"):
            decay.load_state_dict(state)
        decay.load_state_dict(flushed)


def test_the_check_tells_the_amount() -> None:
    """`decay.check()` shows lr·λ, as it does for the same mode without the mask."""
    amounts = []
    for cautious in (True, False):
        model = perceptron()
        optimizer = SGD(model.parameters(), lr=LR)
        with wdhook.attach(model, 0.5, **{**CAUTIOUS, "cautious": cautious}) as decay:
            train(model, optimizer, batches(model, 1))
            amounts.append(decay.check().decayed)
    assert amounts[0] == pytest.approx(amounts[1])
    assert set(amounts[0].values()) == {LR * 0.5}
