"""Every optimizer of torch, in every mode that its own decay has, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins import (
    LR,
    assert_bit_equal,
    batches,
    convnet,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    weights,
    zero,
    λ,
)

import wdhook

Optimizer = torch.optim.Optimizer
Make = Callable[..., Optimizer]

# name → (class, arguments, the mode that its own weight_decay is)
CATALOGUE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}, "coupled"),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "coupled"),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.01, "maximize": True}, "coupled"),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}, "coupled"),
    "Adam": (torch.optim.Adam, {"lr": 0.01}, "coupled"),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, "coupled"),
    "Adam foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}, "coupled"),
    "Adam maximize": (torch.optim.Adam, {"lr": 0.01, "maximize": True}, "coupled"),
    "Adam tensor lr": (torch.optim.Adam, {"lr": torch.tensor(0.01)}, "coupled"),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}, "decoupled"),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}, "decoupled"),
    "AdamW maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}, "decoupled"),
    "AdamW tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}, "decoupled"),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}, "coupled"),
    "NAdamW": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True}, "decoupled"),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}, "coupled"),
    "RAdamW": (torch.optim.RAdam, {"lr": 0.01, "decoupled_weight_decay": True}, "decoupled"),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}, "coupled"),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}, "coupled"),
    "Adadelta": (torch.optim.Adadelta, {}, "coupled"),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}, "coupled"),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1}, "coupled"),
}
# Without a decay of their own: LBFGS, Rprop, SparseAdam. With tests of their own below: Muon,
# Adafactor.
NOT_IN_CATALOGUE = {"LBFGS", "Rprop", "SparseAdam", "Optimizer", "Muon", "Adafactor"}


def make(name: str, params: Any) -> Optimizer:
    kind, arguments, _ = CATALOGUE[name]
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    default = {} if params and isinstance(params[0], dict) else {"weight_decay": 0}
    return kind(params, **copies, **default)


def test_no_optimizer_of_torch_is_forgotten() -> None:
    """A new optimizer in torch.optim has to be put into the catalogue."""
    there = {
        n for n, o in vars(torch.optim).items() if isinstance(o, type) and issubclass(o, Optimizer)
    }
    assert there - NOT_IN_CATALOGUE <= {kind.__name__ for kind, _, _ in CATALOGUE.values()}


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["", "clip"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("name", CATALOGUE)
def test_at_step_equals_the_optimizers_own_decay(
    name: str, micro: int, clip: float | None, to_none: bool
) -> None:
    """Both modes at "step" are bit-equal to param groups, with accumulation, clipping and both
    kinds of zeroing."""
    mode = CATALOGUE[name][2]
    model, twin = twins(convnet())
    loop = {"micro": micro, "clip": clip, "to_none": to_none}
    optimizer = make(name, list(model.parameters()))
    with wdhook.attach(model, λ, mode=mode, at="step"):
        train(model, optimizer, batches(model, 12), **loop)
    train(twin, make(name, own_groups(twin)), batches(twin, 12), **loop)
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "in_place"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_at_backward_equals_the_optimizers_own_decay(name: str, to_none: bool) -> None:
    """Without accumulation and clipping the hook in the backward is bit-equal to param groups
    too."""
    mode = CATALOGUE[name][2]
    model, twin = twins(convnet())
    optimizer = make(name, list(model.parameters()))
    with wdhook.attach(model, λ, mode=mode, optimizer=optimizer):
        train(model, optimizer, batches(model, 6), to_none=to_none)
    train(twin, make(name, own_groups(twin)), batches(twin, 6), to_none=to_none)
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", CATALOGUE)
def test_at_backward_accumulated_and_clipped_equals_a_penalty_in_the_loss(name: str) -> None:
    """Coupled at "backward" is the penalty ½λ‖p‖² in the loss of the first micro-batch: clipping
    sees it."""
    if CATALOGUE[name][2] != "coupled":
        pytest.skip("a penalty in the loss is coupled decay")
    if "maximize" in name:
        pytest.skip("a penalty is subtracted from what is maximized, see the test of the sign")
    model, twin = twins(convnet(torch.float64))
    optimizer = make(name, list(model.parameters()))
    with wdhook.attach(model, λ):
        train(model, optimizer, batches(model, 12), micro=3, clip=0.05)
    reference = make(name, list(twin.parameters()))
    for i, batch in enumerate(batches(twin, 12)):
        if i % 3 == 0:
            zero(twin, to_none=True)
        penalty = wdhook.l2_penalty(twin, λ) if i % 3 == 0 else 0.0
        (loss_of(twin, batch) / 3 + penalty).backward()
        if i % 3 == 2:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            reference.step()
    for (key, one), other in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        # The sums are made in another order; adaptive methods divide by roots of squares of
        # gradients near
        # 1e-3, which turns relative errors of 1e-16 into at most 1e-9 over four steps.
        assert (one - other).abs().max() <= 1e-9, key


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("start", [0.5, 0.0])
def test_maximize_decays_towards_zero(at: str, start: float) -> None:
    """With maximize=True the optimizer negates the gradient; the decay shrinks the weights, from a
    λ of zero too."""
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    with wdhook.attach(model, start, at=at, optimizer=optimizer) as decay:
        decay.weight_decay = 0.5
        (model(torch.ones(1, 3)) * 0).sum().backward()
        optimizer.step()
    assert torch.allclose(
        model.weight, before * (1 - 0.1 * 0.5), rtol=1e-6, atol=0
    )  # one rounding in float32


@pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is newer than this torch"
)
def test_muon_on_the_matrices_that_it_accepts() -> None:
    """Muon's decay is decoupled by the lr of the group: bit-equal at "step"."""
    model, twin = twins(
        nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    )
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01, weight_decay=0)
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        train(model, optimizer, batches(model, 6))
    train(twin, torch.optim.Muon(twin.parameters(), lr=0.01, weight_decay=λ), batches(twin, 6))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.skipif(
    not hasattr(torch.optim, "Adafactor"), reason="torch.optim.Adafactor is newer than this torch"
)
def test_adafactor_is_decayed_before_it_reads_the_parameter() -> None:
    """Adafactor scales its update by the norm of the parameter, which its own decay changes too
    late to count.

    Ours comes first, so the reference is the same product written by hand before the step.
    """
    model, twin = twins(convnet())
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01, weight_decay=0)
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        train(model, optimizer, batches(model, 6))
    reference = torch.optim.Adafactor(twin.parameters(), lr=0.01, weight_decay=0)
    for batch in batches(twin, 6):
        reference.zero_grad()
        loss_of(twin, batch).backward()
        with torch.no_grad():
            for weight in weights(twin):
                weight.mul_(1 - 0.01 * λ)
        reference.step()
    assert_bit_equal(model.state_dict(), twin.state_dict())


class Closure:
    """What Lightning passes to every step: zeroing, forward, backward and clipping."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, batch: torch.Tensor) -> None:
        self.model, self.optimizer, self.batch = model, optimizer, batch

    def __call__(self) -> torch.Tensor:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            loss = loss_of(self.model, self.batch)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        return loss


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_step_with_a_closure(name: str, at: str) -> None:
    """A closure that does forward, backward and clipping gives the bits of param groups, at both
    moments."""
    mode = CATALOGUE[name][2]
    model, twin = twins(convnet())
    optimizer = make(name, list(model.parameters()))
    reference = make(name, own_groups(twin))
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
        for batch in batches(model, 5):
            optimizer.step(Closure(model, optimizer, batch))
    for batch in batches(twin, 5):
        reference.step(closure=Closure(twin, reference, batch))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_gradients_that_are_never_zeroed(at: str) -> None:
    """Gradients that pile up from step to step do not matter to decoupled decay: AdamW to the last
    bit."""
    ours, twin = twins(perceptron())
    own = torch.optim.AdamW(own_groups(twin), lr=LR)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=LR, weight_decay=0)
    with wdhook.attach(ours, λ, mode="decoupled", at=at, optimizer=optimizer):
        for model, stepping in ((ours, optimizer), (twin, own)):
            for batch in batches(model, 5):
                loss_of(model, batch).backward()
                stepping.step()
    assert_bit_equal(ours.state_dict(), twin.state_dict())


def test_the_catalogue_can_fail() -> None:
    """The loop above tells a decayed run from one that is not, for every optimizer."""
    for name in CATALOGUE:
        model, twin = twins(convnet())
        train(model, make(name, list(model.parameters())), batches(model, 3))
        train(twin, make(name, own_groups(twin)), batches(twin, 3))
        with pytest.raises(AssertionError, match="differs"):
            assert_bit_equal(model.state_dict(), twin.state_dict())
