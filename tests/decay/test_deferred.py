"""Deferred decay: counted once per step, and written when a low-precision parameter can represent
it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import LR, NoReading, assert_bit_equal, batches, loss_of, perceptron, train, zero_step, λ

import wdhook
from wdhook._decay import rate as rate_module
from wdhook._decay import tensors
from wdhook._decay.rules import optimizers as rule_module

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
AT = pytest.mark.parametrize("at", ["backward", "step"])
# lr·λ: less than a quarter of a unit in the last place of bfloat16, so each step alone is lost.
SMALL = 5e-4
STRIDE = {torch.bfloat16: 2**-5, torch.float16: 2**-7}


def layer(dtype: torch.dtype = torch.bfloat16, size: int = 256) -> nn.Linear:
    """One weight of many values."""
    torch.manual_seed(0)
    return nn.Linear(size, size, bias=False).to(dtype)


def step_on_zeros(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps whose gradients are 0: what moves a parameter is its decay."""
    for _ in range(steps):
        zero_step(model, optimizer)


def share_kept(after: Tensor, before: Tensor, steps: int, amount: float = SMALL) -> float:
    """The decay that is there over the decay that was asked for, both as logarithms of a factor."""
    p, q = before.detach().double().flatten(), after.detach().double().flatten()
    return math.log((p @ q) / (p @ p)) / (steps * math.log1p(-amount))


# ---------------------------------------------------------------- against products in float64


def by_hand(p: Tensor, factors: list[float]) -> tuple[Tensor, float]:
    """The parameter and what is pending after those factors, written as the page says it."""
    p, product = p.detach().clone(), 1.0
    for factor in factors:
        product *= factor
        if 1 - product >= STRIDE[p.dtype]:
            written = torch.tensor(product, dtype=torch.float64).to(p.dtype)
            p = (p.double() * written.double()).to(p.dtype)
            product /= written.item()
    return p, product


@LOW
@AT
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("mode", ["decoupled", "independent", "corrected"])
def test_against_float64_products(
    mode: str, foreach: bool | None, at: str, dtype: torch.dtype
) -> None:
    """With a scheduled learning rate and several tensors, to the last bit; after a flush 0.99 of
    the decay is there."""
    model = nn.Sequential(layer(dtype, 32), layer(dtype, 32))
    before = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=400)
    amount = 0.004 if mode == "independent" else 0.004 / LR
    amounts = {
        "decoupled": lambda lr: lr * amount,
        "independent": lambda lr: (lr / LR) * amount,
        "corrected": lambda lr: (lr**2 / LR) * amount,
    }
    factors = []
    decay = wdhook.attach(model, amount, mode=mode, at=at, optimizer=optimizer, foreach=foreach)
    for _ in range(400):
        lr = optimizer.param_groups[0]["lr"]
        factors.append(1 - amounts[mode](lr))
        step_on_zeros(model, optimizer, 1)
        scheduler.step()
    exact = math.prod(factors)
    for weight, start in zip(model.parameters(), before.parameters(), strict=True):
        p, product = by_hand(start, factors)
        assert torch.equal(weight, p)
        name = next(n for n, q in model.named_parameters() if q is weight)
        assert decay.state_dict()["memory"][0][name] == {
            "product": pytest.approx(product, rel=1e-12)
        }
    decay.flush()
    for weight, start in zip(model.parameters(), before.parameters(), strict=True):
        p, q = start.detach().double(), weight.detach().double()
        kept = math.log(((p * q).sum() / (p * p).sum()).item()) / math.log(exact)
        assert 0.99 <= kept <= 1.01
    decay.remove()


@pytest.mark.parametrize("low_precision", ["round", None])
def test_the_share_can_be_lost(low_precision: str | None) -> None:
    """Rounded at each step, nothing of the same decay is left; the comparison above can fail."""
    model = layer()
    before = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=LR)
    arguments = {"mode": "decoupled", "at": "step", "low_precision": low_precision}
    with wdhook.attach(model, SMALL / LR, **arguments) as decay:
        if low_precision == "round":
            with pytest.warns(wdhook.WdhookWarning, match="rounds away"):
                step_on_zeros(model, optimizer, 1)
        step_on_zeros(model, optimizer, 200)
        decay.flush()
        assert (share_kept(model.weight, before, 200) > 0.99) == (low_precision is None)
        assert torch.equal(model.weight, before) == (low_precision == "round")


# ---------------------------------------------------------------- optimizers that people have


def third_party(module: str, name: str, **options: Any) -> Callable[..., Any]:
    """A constructor, or a skip where the package is not installed."""

    def make(params: Any) -> Any:
        package = pytest.importorskip(module, reason=f"{module} is not installed")
        return getattr(package, name)(params, lr=1e-3, weight_decay=0.0, **options)

    return make


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW single": lambda p: AdamW(p, lr=1e-3, weight_decay=0, foreach=False),
    "AdamW foreach": lambda p: AdamW(p, lr=1e-3, weight_decay=0, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=1e-3, weight_decay=0, fused=True),
    "timm": third_party("timm.optim", "AdamWLegacy"),
    "optimi": third_party("optimi", "AdamW", kahan_sum=True),
    "pytorch_optimizer": third_party("pytorch_optimizer", "Lion"),
    "heavyball": third_party("heavyball", "AdamW"),
    "torchao": third_party("torchao.optim", "_AdamW", bf16_stochastic_round=True),
    "bitsandbytes": third_party("bitsandbytes.optim", "AdamW"),
}


def trained(make: Callable[..., Any], steps: int, decayed: bool) -> Tensor:
    """A weight after steps on random gradients."""
    model = layer()
    optimizer = make(list(model.parameters()))
    generator = torch.Generator().manual_seed(1)
    decay = wdhook.attach(model, SMALL * 1000, mode="decoupled", at="step") if decayed else None
    torch.manual_seed(2)
    for _ in range(steps):
        grad = torch.randn(model.weight.shape, generator=generator)
        model.weight.grad = grad.to(model.weight.dtype)
        optimizer.step()
    if decay is not None:
        decay.remove()
    return model.weight.detach().double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_share_beside_an_optimizer(name: str) -> None:
    """At least 0.99 of the decay is there after `remove`, beside updates that are rounded too."""
    steps = 400
    try:
        # torchao and heavyball compile for a minute; torch before 2.6 has no stance.
        stance = getattr(torch.compiler, "set_stance", None)
        with nullcontext() if stance is None else stance("force_eager"):
            with_decay, without = (trained(OPTIMIZERS[name], steps, d) for d in (True, False))
    except (NotImplementedError, RuntimeError) as error:
        if name not in ("bitsandbytes", "heavyball", "torchao"):
            raise
        pytest.skip(f"does not run here: {error}")
    start = layer().weight.detach().double()
    # Random updates of mean 0 leave the projection on the start as it is, up to 1 in √65536 of
    # their size.
    ratio = (start * with_decay).sum() / (start * without).sum()
    kept = math.log(ratio.item()) / (steps * math.log1p(-SMALL))
    # Lion's updates are of one size, so where they round depends on the parameter: it ends at 1.04.
    assert 0.99 <= kept <= 1.05


# ---------------------------------------------------------------- what is never different


def test_replicas_stay_equal() -> None:
    """Two replicas with other random states take the same 1,000 steps, and no bit differs."""
    replicas = [layer(size=16), layer(size=16)]
    for seed, replica in enumerate(replicas):
        optimizer = AdamW(replica.parameters(), lr=1e-3, weight_decay=0)
        generator = torch.Generator().manual_seed(5)
        with wdhook.attach(replica, 0.5, mode="decoupled", at="step"):
            torch.manual_seed(seed)
            for _ in range(1000):
                torch.rand(3)  # as dropout does
                grad = torch.randn(16, 16, generator=generator)
                replica.weight.grad = grad.bfloat16()
                optimizer.step()
    assert torch.equal(replicas[0].weight, replicas[1].weight)


@AT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["decoupled", "independent"])
def test_wider_precision_is_untouched(mode: str, dtype: torch.dtype, at: str) -> None:
    """Deferred and rounded are the same to the last bit, and nothing is ever pending."""
    ends = []
    for low_precision in ("defer", "round"):
        model = perceptron(dtype)
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0)
        arguments = {"mode": mode, "at": at, "optimizer": optimizer}
        with wdhook.attach(model, λ, low_precision=low_precision, **arguments) as decay:
            train(model, optimizer, batches(model, 5))
            assert decay.state_dict()["memory"] == ()
            ends.append(copy.deepcopy(model.state_dict()))
    assert_bit_equal(*ends)


# ---------------------------------------------------------------- checkpoints and lives


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    lr = torch.tensor(0.01) if kind == "tensor lr" else 0.01
    options = {"capturable": False, "foreach": False} if kind == "tensor lr" else {}
    return AdamW(model.parameters(), lr=lr, weight_decay=0, **options)


def go(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> None:
    for batch in inputs:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@AT
@pytest.mark.parametrize("kind", ["float lr", "tensor lr"])
@pytest.mark.parametrize("order", ["model first", "decay first"])
def test_a_resume_is_exact(order: str, kind: str, at: str) -> None:
    """What is pending is in the state: 60 steps are 25 steps, a pickle, and 35 more, to the last
    bit."""
    model = perceptron(torch.bfloat16)
    inputs = batches(model, 60)

    def attached(net: nn.Module) -> tuple[torch.optim.Optimizer, wdhook.WeightDecay]:
        optimizer = optimizer_of(net, kind)
        return optimizer, wdhook.attach(net, 0.3, mode="decoupled", at=at, optimizer=optimizer)

    optimizer, decay = attached(model)
    go(model, optimizer, inputs[:25])
    state = pickle.loads(
        pickle.dumps([model.state_dict(), optimizer.state_dict(), decay.state_dict()])
    )
    assert set(state[2]["memory"][0]) == {"0.weight", "3.weight", "5.weight"}
    go(model, optimizer, inputs[25:])

    resumed = perceptron(torch.bfloat16, seed=3)
    optimizer, other = attached(resumed)
    go(resumed, optimizer, inputs[:3])  # what was pending before the load goes
    for index in (0, 1, 2) if order == "model first" else (2, 0, 1):
        (resumed, optimizer, other)[index].load_state_dict(state[index])
    go(resumed, optimizer, inputs[25:])
    assert_bit_equal(resumed.state_dict(), model.state_dict())
    one, two = decay.state_dict()["memory"][0], other.state_dict()["memory"][0]
    assert {n: float(m["product"]) for n, m in one.items()} == {
        n: float(m["product"]) for n, m in two.items()
    }
    decay.remove()
    other.remove()


def test_a_state_that_is_not_loaded_is_missed() -> None:
    """Without it the pending decay is not there: the test above can fail."""
    model = layer(size=8)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 0.1, mode="decoupled", at="step") as decay:
        step_on_zeros(model, optimizer, 2)
        saved = copy.deepcopy(model.state_dict()), decay.state_dict()
    ends = []
    for states in (saved, saved[:1]):
        twin = layer(size=8)
        with wdhook.attach(twin, 0.1, mode="decoupled", at="step") as decay:
            twin.load_state_dict(states[0])
            for state in states[1:]:
                decay.load_state_dict(state)
            step_on_zeros(twin, SGD(twin.parameters(), lr=LR), 2)
        ends.append(twin.weight.detach().clone())
    assert not torch.equal(*ends)


@AT
def test_remove_flush_and_pause(at: str) -> None:
    """What is pending is written by `flush` and `remove`, once, and waits in a pause."""
    amount = 0.01
    model = layer(size=64)
    start = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=LR)
    arguments = {"mode": "decoupled", "at": at, "optimizer": optimizer}
    decay = wdhook.attach(model, amount / LR, **arguments)
    step_on_zeros(model, optimizer, 2)
    assert torch.equal(model.weight, start)  # 2 % is less than the stride
    with decay.paused():
        step_on_zeros(model, optimizer, 5)
        assert torch.equal(model.weight, start)
    decay.flush()
    once = (start * (1 - amount) ** 2).to(start.dtype)
    assert torch.equal(model.weight, once)
    decay.flush()
    assert torch.equal(model.weight, once)
    assert decay.state_dict()["memory"] == ()
    step_on_zeros(model, optimizer, 1)
    decay.remove()
    assert torch.equal(model.weight, (once * (1 - amount)).to(once.dtype))
    decay.flush()
    decay.remove()
    assert torch.equal(model.weight, (once * (1 - amount)).to(once.dtype))


@AT
def test_another_optimizer_goes_on(at: str) -> None:
    """Optimizers that come and go, some of them collected, change nothing: the product belongs to
    the parameter."""
    amount, steps = 0.004, 60
    one, other = layer(size=16), layer(size=16)
    only = SGD(one.parameters(), lr=LR)
    lr = {"lr": LR} if at == "backward" else {}
    with wdhook.attach(one, amount / LR, mode="decoupled", at=at, **lr) as decay:
        step_on_zeros(one, only, steps)
        products = decay.state_dict()["memory"][0]["weight"]
    with wdhook.attach(other, amount / LR, mode="decoupled", at=at, **lr) as decay:
        for _ in range(steps // 3):
            step_on_zeros(other, SGD(other.parameters(), lr=LR), 3)
        assert decay.state_dict()["memory"][0]["weight"] == products
    assert torch.equal(one.weight, other.weight)


@AT
@pytest.mark.parametrize("swap", [False, True], ids=["set data", "swap tensors"])
def test_a_conversion_writes_what_is_pending(swap: bool, at: str) -> None:
    """bfloat16 that becomes float32 gets its pending factor there, exactly; the way back collects
    again."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        amount = 0.004
        model = layer(size=16)
        start = model.weight.detach().clone()
        optimizer = SGD(model.parameters(), lr=LR)
        arguments = {"mode": "decoupled", "at": at, "optimizer": optimizer}
        decay = wdhook.attach(model, amount / LR, **arguments)
        step_on_zeros(model, optimizer, 5)
        assert torch.equal(model.weight, start)
        optimizer.zero_grad()
        model.float()
        step_on_zeros(model, optimizer, 1)
        factor = 1 - (amount / LR) * LR
        exact = start.float() * math.prod([factor] * 5) * factor
        # two products in float32, in place of one: half a unit in the last place each
        assert ((model.weight - exact).abs() <= 2 * 2**-24 * exact.abs()).all()
        assert decay.state_dict()["memory"] == ()
        optimizer.zero_grad()
        model.bfloat16()
        before = model.weight.detach().clone()
        step_on_zeros(model, optimizer, 3)
        assert torch.equal(model.weight, before)
        assert set(decay.state_dict()["memory"][0]) == {"weight"}
        decay.remove()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_parameter_that_takes_the_place_takes_over() -> None:
    """`load_state_dict(assign=True)` puts another parameter there, which goes on with what is
    pending."""
    model = layer(size=8)
    start = copy.deepcopy(model.state_dict())
    with wdhook.attach(model, 0.1, mode="decoupled", at="step") as decay:
        step_on_zeros(model, SGD(model.parameters(), lr=LR), 2)
        before = decay.state_dict()["memory"]
        model.load_state_dict(start, assign=True)
        step_on_zeros(model, SGD(model.parameters(), lr=LR), 1)
        product = decay.state_dict()["memory"][0]["weight"]["product"]
    assert product == before[0]["weight"]["product"] * (1 - LR * 0.1)


def test_a_state_with_pending_decay_under_rounding() -> None:
    """A handle that rounds writes what the checkpoint holds, at its first step."""
    model = layer(size=8)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 0.1, mode="decoupled", at="step") as decay:
        step_on_zeros(model, optimizer, 2)
        state, weight = decay.state_dict(), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.copy_(weight)
    options = {"mode": "decoupled", "at": "step", "low_precision": "round"}
    with wdhook.attach(model, 0.1, **options) as decay:
        decay.load_state_dict(state)
        step_on_zeros(model, optimizer, 1)
        assert decay.state_dict()["memory"] == ()
    factor = 1 - 0.1 * LR
    expected = (weight * factor**2).to(weight.dtype)
    assert torch.equal(model.weight, (expected * factor).to(weight.dtype))


# ---------------------------------------------------------------- numbers on the device


@AT
def test_a_learning_rate_on_the_device_is_not_read(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor as lr gives the bits of a number that has the same value, and is never read."""
    # The check reads a learning rate that is on the CPU, which waits for nothing. On a device it
    # would not.
    for module in (rate_module, rule_module):
        monkeypatch.setattr(module, "check_lr", lambda lr, group: lr)
    model, twin = layer(size=16), layer(size=16)
    lr = torch.tensor(0.125)  # exact, and exact times λ
    ends = []
    for net, rate in ((model, lr), (twin, 0.125)):
        optimizer = SGD(net.parameters(), lr=0.125)
        arguments = {"mode": "decoupled", "at": at, "lr": lambda group, rate=rate: rate}
        with wdhook.attach(net, 0.0625, optimizer=optimizer, **arguments) as decay:
            step_on_zeros(net, optimizer, 1)
            with torch.no_grad() if rate is not lr else NoReading():
                for _ in range(8):
                    net.weight.grad = None
                    with torch.enable_grad():
                        (net.weight * 0).sum().backward()
                    optimizer.step()
            ends.append(net.weight.detach().clone())
            product = decay.state_dict()["memory"][0]["weight"]["product"]
            ends.append(torch.as_tensor(product, dtype=torch.float64))
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


def test_a_step_that_a_fused_optimizer_skips_is_not_counted() -> None:
    """`found_inf` stays on the device: skipped steps collect nothing, taken ones as ever."""
    amount = 0.004
    model = layer(size=16)
    start = model.weight.detach().clone()
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    skipped = {3, 7, 8}
    with wdhook.attach(model, amount / LR, mode="decoupled", at="step") as decay:
        for i in range(20):
            optimizer.found_inf = torch.ones(()) if i in skipped else torch.zeros(())
            model.weight.grad = torch.zeros_like(model.weight)
            with NoReading():
                optimizer.step()
        expected, product = by_hand(start, [1 - LR * (amount / LR)] * 17)
        assert torch.equal(model.weight, expected)
        assert float(decay.state_dict()["memory"][0]["weight"]["product"]) == pytest.approx(product)


@pytest.mark.parametrize("capturable", [True, False])
def test_in_a_graph(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph would replay: a product that is changed in place, or the factor of each
    step.

    A graph replays kernels on the tensors of the capture, so the product has to be the same tensor.
    """
    from wdhook._decay import steps

    model = layer(size=16)
    optimizer = SGD(model.parameters(), lr=LR)
    optimizer.param_groups[0]["capturable"] = capturable
    with wdhook.attach(model, 0.04, mode="decoupled", at="step") as decay:
        step_on_zeros(model, optimizer, 1)
        (memo,) = (entry.memo for entry in decay._engine.state.parameters.entries())
        before, weight = memo.product, model.weight.detach().clone()
        monkeypatch.setattr(steps, "is_capturing", lambda: True)
        step_on_zeros(model, optimizer, 20)
        assert memo.product is before
        if capturable:
            expected, product = by_hand(layer(size=16).weight, [1 - LR * 0.04] * 21)
            assert torch.equal(model.weight, expected)
            assert memo.product.item() == pytest.approx(product)
        else:
            assert isinstance(before, float)
            for _ in range(20):
                weight = (weight * (1 - LR * 0.04)).to(weight.dtype)
            assert torch.equal(model.weight, weight)


# ---------------------------------------------------------------- neighbours


def test_sparse_gradients_are_rounded_and_said_to_be() -> None:
    """The rows of a sparse gradient shrink at once: one product cannot count for rows that
    differ."""
    table = nn.Embedding(6, 4, sparse=True, dtype=torch.bfloat16)
    start = table.weight.detach().clone()
    optimizer = SGD(table.parameters(), lr=LR)
    with wdhook.attach(table, 0.03, mode="decoupled", at="step") as decay:
        table(torch.tensor([1, 2])).sum().backward()
        table.weight.grad.mul_(0)
        with pytest.warns(wdhook.WdhookWarning, match=r"rounds away[\s\S]*sparse"):
            optimizer.step()
        assert decay.state_dict()["memory"] == ()
    expected = start.clone()
    expected[1:3] = (start[1:3] * (1 - LR * 0.03)).to(start.dtype)
    assert torch.equal(table.weight, expected)


def test_the_snapshot_counts_what_is_pending() -> None:
    """The share of a step is that of the decay that it counts, whether it is written or waits."""
    model = layer(size=64)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 0.02 / LR, mode="decoupled", at="step") as decay:
        for _ in range(3):
            optimizer.zero_grad()
            (model.weight * model.weight.detach()).sum().backward()  # g = p: the update is lr·p
            snapshot = decay.snapshot()
            optimizer.step()
            share = snapshot.to_dict()["groups"]["weight"]["share"]
            # The update is 0.1·p, and rounds to bfloat16 as p does: at most 2⁻⁸ of p in each of
            # three places.
            assert share == pytest.approx(0.02 / 0.12, rel=3 * 2**-8 / 0.1)


def test_coupled_decay_cannot_wait() -> None:
    """A gradient is gone after its step: asked for, deferred coupled decay is an error that names
    decoupled."""
    with pytest.raises(wdhook.ArgumentError, match=r"defer[\s\S]*decoupled"):
        wdhook.attach(layer(), 0.1, mode="coupled", low_precision="defer")
    with pytest.raises(wdhook.ArgumentError, match="low_precision"):
        wdhook.attach(layer(), 0.1, mode="decoupled", at="step", low_precision="kahan")
    model = layer()
    wdhook.adopt(model, AdamW(model.parameters(), weight_decay=0.1), low_precision="round").remove()


def test_precisions() -> None:
    """Only floating point numbers below float32 are low."""
    low = [d for d in vars(torch).values() if isinstance(d, torch.dtype) and tensors.is_low(d)]
    assert {torch.bfloat16, torch.float16} <= set(low)
    assert not {torch.float32, torch.float64, torch.int8, torch.complex32, torch.complex64} & set(
        low
    )


# ---------------------------------------------------------------- surgery


@AT
def test_what_is_pending_stays_with_its_tensor(at: str) -> None:
    """A layer is inserted before the others, with a new optimizer: names have moved, and each
    tensor keeps its own product. The new one begins with none."""
    model = nn.Sequential(layer(size=32), layer(size=32))
    tensors_of_before = list(model.parameters())
    starts = [p.detach().clone() for p in tensors_of_before]
    optimizer = SGD(model.parameters(), lr=LR)
    decay = wdhook.attach(model, 0.04, mode="decoupled", at=at, optimizer=optimizer)
    step_on_zeros(model, optimizer, 3)
    model.insert(0, layer(size=32))
    new, new_start = model[0].weight, model[0].weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=LR)
    step_on_zeros(model, optimizer, 4)
    pairs = zip([new, *tensors_of_before], [new_start, *starts], strict=True)
    decay.flush()
    for (weight, start), steps in zip(pairs, [4, 7, 7], strict=True):
        expected, product = by_hand(start, [1 - LR * 0.04] * steps)
        expected = (expected.double() * torch.tensor(product).double()).to(start.dtype)
        assert torch.equal(weight, expected)
    decay.remove()


def test_two_tensors_made_of_one_share_no_product() -> None:
    """weight_norm makes two tensors of a weight: the second begins with nothing pending."""
    model = layer(size=32)
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, 0.04, mode="decoupled", at="step", overrides={"*": True}) as decay:
        step_on_zeros(model, optimizer, 3)
        nn.utils.parametrizations.weight_norm(model)
        parts = list(model.parameters())
        starts = [p.detach().clone() for p in parts]
        step_on_zeros(model, SGD(parts, lr=LR), 4)
        products = decay.state_dict()["memory"][0]
        assert len(parts) == 2
        assert [part.equal(start) for part, start in zip(parts, starts, strict=True)] == [True] * 2
        pending = [products[f"parametrizations.weight.original{i}"]["product"] for i in (0, 1)]
        assert pending == pytest.approx([(1 - LR * 0.04) ** 7, (1 - LR * 0.04) ** 4])
