"""Gradients and parameters that are not dense, real and single: sparse, complex, tied, low
precision, odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from twins import LR, NoReading, assert_bit_equal, batches, loss_of, perceptron, train, twins, λ

import wdhook
from wdhook._decay import tensors as arithmetic
from wdhook._decay.formulas import FORMULAS, Rates

SGD = torch.optim.SGD


def table(seed: int = 0) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(7, 3, sparse=True)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_sparse_gradients_decay_their_rows_once(mode: str, at: str, to_none: bool) -> None:
    """Rows that a step looked up (twice, or in two micro-batches) are decayed once; the others not
    at all."""
    model = table()
    before = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=LR)
    steps = [([1, 1, 4], [4, 5]), ([0], [0, 1])]
    expected = before.clone()
    arguments = {"optimizer": optimizer} if mode == "decoupled" else {}
    handle = wdhook.attach(model, λ, mode=mode, at=at, **arguments)
    for micro in steps:
        for i, rows in enumerate(micro):
            if mode == "decoupled" and at == "backward" and i == 1:
                with (
                    pytest.warns(wdhook.WdhookWarning, match='at="step"')
                    if micro is steps[0]
                    else _silence()
                ):
                    (model(torch.tensor(rows)) * 0).sum().backward()
            else:
                (model(torch.tensor(rows)) * 0).sum().backward()
        seen = sorted({row for rows in micro for row in rows})
        if mode == "coupled":
            expected[seen] = expected[seen] - LR * (expected[seen] * λ)
        else:
            expected[seen] = expected[seen] * (1 - LR * λ)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    handle.remove()
    # One product and one difference in float32, which SGD may fuse: a unit in the last place of
    # numbers below 4.
    assert (model.weight - expected).abs().max() <= 2 * 4 * 2**-24
    assert torch.equal(model.weight[[2, 3, 6]], before[[2, 3, 6]])


def _silence() -> object:
    import contextlib

    return contextlib.nullcontext()


def test_sparse_and_then_dense() -> None:
    """Autograd adds a dense gradient to a sparse one in a new buffer, which looks fresh: a warning
    says so."""
    model = table()
    with wdhook.attach(model, λ):
        model(torch.tensor([1])).sum().backward()
        with pytest.warns(
            wdhook.WdhookWarning, match=r"sparse gradient and then a dense one[\s\S]*weight"
        ):
            model.weight.sum().backward()


def test_sparse_adam() -> None:
    """SparseAdam, which has no decay of its own, gets one."""
    model, twin = twins(table())
    rows = torch.tensor([1, 2, 2])
    optimizer, reference = (torch.optim.SparseAdam(m.parameters(), lr=LR) for m in (model, twin))
    with wdhook.attach(model, λ):
        model(rows).square().sum().backward()
        optimizer.step()
    twin(rows).square().sum().backward()
    dense = twin.weight.grad.to_dense()
    dense[[1, 2]] += λ * twin.weight.detach()[[1, 2]]
    twin.weight.grad = dense.sparse_mask(twin.weight.grad.coalesce())
    reference.step()
    assert (
        model.weight - twin.weight
    ).abs().max() <= 1e-6  # λ·p is added before or after coalescing


def test_sparse_rows_of_two_dimensions() -> None:
    """Rows may be named by several sparse dimensions."""
    param = torch.arange(12.0).reshape(2, 3, 2)
    grad = torch.sparse_coo_tensor(
        [[0, 1], [2, 0]], torch.ones(2, 2), (2, 3, 2), check_invariants=True
    )
    seen = arithmetic.add_rows_(grad, param, 10.0, None)
    expected = torch.zeros(2, 3, 2)
    expected[0, 2], expected[1, 0] = 1 + 10 * param[0, 2], 1 + 10 * param[1, 0]
    assert torch.equal(grad.to_dense(), expected)
    assert seen.tolist() == [2, 3]
    arithmetic.mul_rows_(grad, param, 0.5, torch.tensor([2]))
    assert param.flatten().tolist() == [0, 1, 2, 3, 4, 5, 3, 3.5, 8, 9, 10, 11]


@pytest.mark.parametrize("at", ["backward", "step"])
def test_complex_parameters(at: str) -> None:
    """The gradient of ½λ|p|² is λp for complex p, as in torch's own optimizers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    model, twin = twins(Model())
    optimizer, reference = (
        SGD(model.parameters(), lr=LR),
        SGD(twin.parameters(), lr=LR, weight_decay=λ),
    )
    with wdhook.attach(model, λ, at=at):
        for m, o in ((model, optimizer), (twin, reference)):
            m.weight.square().sum().abs().backward()
            o.step()
    assert_bit_equal(model.state_dict(), twin.state_dict())
    (grad,) = torch.autograd.grad(wdhook.l2_penalty(model, λ), model.weight)
    assert torch.equal(grad, λ * model.weight)


def test_tied_parameters_once() -> None:
    """A head that shares the weight of the embedding is one parameter: one decision, one decay."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    for at in ("backward", "step"):
        model, twin = twins(Tied())
        assert list(wdhook.plan(model, λ)) == ["embed.weight"]
        with wdhook.attach(model, λ, at=at):
            for m, o in (
                (model, SGD(model.parameters(), lr=LR)),
                (twin, SGD(twin.parameters(), lr=LR, weight_decay=λ)),
            ):
                m.head(m.embed(torch.tensor([0, 1]))).square().sum().backward()
                o.step()
        assert_bit_equal(model.state_dict(), twin.state_dict())


def test_parameters_of_the_root_and_odd_shapes() -> None:
    """Parameters that the root holds itself, scalars, empty tensors, channels-last and mixed
    dtypes."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 2))
            self.weight64 = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(3))
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.weight_empty = nn.Parameter(torch.empty(0, 3))
            self.conv = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last)

    for at in ("backward", "step"):
        for foreach in (None, True, False):
            model, twin = twins(Odd())
            decayed = {"weight", "weight64", "weight_empty", "conv.weight"}
            assert set(wdhook.plan(model, λ).decayed) == decayed
            groups = [
                {
                    "params": [p for n, p in twin.named_parameters() if n in decayed],
                    "weight_decay": λ,
                },
                {"params": [p for n, p in twin.named_parameters() if n not in decayed]},
            ]
            with wdhook.attach(model, λ, at=at, foreach=foreach):
                for m, o in ((model, SGD(model.parameters(), lr=LR)), (twin, SGD(groups, lr=LR))):
                    sum(p.double().square().sum() for p in m.parameters()).backward()
                    o.step()
            assert_bit_equal(model.state_dict(), twin.state_dict())


def test_one_formula_each() -> None:
    """Each formula against arithmetic on plain numbers: coupled, decoupled, independent, scaled,
    skipped."""
    p, g = torch.tensor([2.0, -4.0]), torch.tensor([1.0, 1.0])
    arithmetic.add_(g, p, 0.5)
    assert g.tolist() == [2.0, -1.0]
    arithmetic.add_(g, p, 0.5, torch.tensor(8.0))
    assert g.tolist() == [10.0, -17.0]
    for foreach in (True, False):
        q, h = p.clone(), g.clone()
        arithmetic.mul_all_([q], FORMULAS["decoupled"].number(Rates(0.5, 0.5)), foreach)
        arithmetic.add_all_([h], [p], 0.5, None, foreach)
        assert (q.tolist(), h.tolist()) == ([1.5, -3.0], [11.0, -19.0])
    assert FORMULAS["coupled"].number(Rates(0.5, sign=-1.0)) == -0.5
    assert FORMULAS["decoupled"].number(Rates(0.5, 0.5)) == 0.75
    assert FORMULAS["independent"].number(Rates(0.5, 0.5, peak=1.0)) == 0.75
    assert FORMULAS["independent"].number(Rates(0.5, 0.25, peak=0.5)) == 0.75
    assert FORMULAS["independent"].number(Rates(0.5, 0.0, peak=0.0)) == 1.0
    assert arithmetic.unless(torch.tensor(1.0), 0.75).item() == 1.0
    assert arithmetic.unless(torch.tensor(0.0), 1 - 0.1 * 0.05).item() == 1 - 0.1 * 0.05


def test_the_scale_on_another_device_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, S·λ·p is computed without a synchronisation, and is equal up to one rounding of
    λ·p."""
    p, g = torch.randn(100), torch.randn(100)
    expected = g.clone()
    arithmetic.add_(expected, p, 0.1, torch.tensor(1024.0))
    monkeypatch.setattr(arithmetic, "is_on_cpu", lambda scale: False)
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a synchronisation"))
    arithmetic.add_(g, p, 0.1, torch.tensor(1024.0))
    # |λ·S·p| < 512, so one more rounding of the product is at most 512 · 2⁻²⁴, and the sum rounds
    # once more.
    assert torch.le((g - expected).abs(), 2 * 512 * 2**-24).all()


def test_meta_tensors() -> None:
    """A model on the meta device can be planned and attached."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with wdhook.attach(model, λ):
        model(torch.ones(1, 3, device="meta")).sum().backward()
        SGD(model.parameters(), lr=LR).step()


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled", "independent"])
def test_a_step_reads_nothing_from_the_device(mode: str, at: str) -> None:
    """Once what can only be seen in the first steps is checked, neither backward nor step waits
    for a value."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9)
    with wdhook.attach(
        model, wdhook.schedules.linear(0.0, 0.1, 9), mode=mode, at=at, optimizer=optimizer
    ):
        train(model, optimizer, batches(model, 4))
        with NoReading():
            train(model, optimizer, batches(model, 3))
    with pytest.raises(AssertionError, match="a value was read"), NoReading():
        loss_of(model, batches(model, 1)[0]).item()
