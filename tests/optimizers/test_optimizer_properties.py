"""Optimizers are told apart by what they are and hold, not by their names: stand-ins for those of
other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
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
    weights,
    λ,
)

import wdhook

SGD = torch.optim.SGD


def decayed_by_hand(
    model: nn.Module, optimizer: Any, decay: Callable[[Tensor], object], steps: int = 5
) -> None:
    """The plain loop, with `decay` of each weight before the step."""
    for batch in batches(model, steps):
        model.zero_grad()
        loss_of(model, batch).backward()
        with torch.no_grad():
            for weight in weights(model):
                decay(weight)
        optimizer.step()


# ------------------------------------------------------------------ Prodigy and D-Adaptation


class Estimating(SGD):
    """Multiplies lr with an estimate that grows in each step, after the parameters were changed."""

    def __init__(self, params: Any, **entries: Any) -> None:
        super().__init__(params, lr=LR)
        for group in self.param_groups:
            group.update(d=0.5, k=0, betas=(0.9, 0.99), **entries)

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["d"], group["k"] = group["d"] * 1.25, group["k"] + 1


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_step_of_an_estimate(at: str, corrected: bool) -> None:
    """Decoupled decay is by lr·d, with the d from before the step, and Adam's bias correction
    where it is on."""
    model, twin = twins(perceptron())
    optimizer = Estimating(model.parameters(), use_bias_correction=corrected)
    with wdhook.attach(model, λ, mode="decoupled", at=at, optimizer=optimizer):
        train(model, optimizer, batches(model, 5))
    reference = Estimating(twin.parameters())

    def shrink(weight: Tensor) -> None:
        group = reference.param_groups[0]
        count = group["k"] + 1
        correction = ((1 - 0.99**count) ** 0.5 / (1 - 0.9**count)) if corrected else 1.0
        weight.mul_(1 - LR * group["d"] * correction * λ)

    decayed_by_hand(twin, reference, shrink)
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    "entries", [{"bias_correction": True}, {"betas": None}], ids=["other correction", "no Adam"]
)
def test_the_step_of_an_estimate_that_is_not_known(entries: dict[str, Any]) -> None:
    """D-Adaptation's SGD and AdaGrad divide by norms besides; another package corrects by a count
    of its own."""
    model = perceptron()
    optimizer = Estimating(model.parameters())
    optimizer.param_groups[0].update(entries)
    if entries.get("betas", 1) is None:
        del optimizer.param_groups[0]["betas"]
    with pytest.raises(wdhook.LearningRateError, match="other things"):
        wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer)


# ------------------------------------------------------------------ several sequences of weights


class Keeping(SGD):
    """Keeps a copy of each parameter in its state."""

    key = ""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p][self.key] = p.detach().clone()


@pytest.mark.parametrize("key", ["z", "x0", "x_k"])
def test_a_second_sequence_is_known_after_the_first_step(key: str) -> None:
    """MADGRAD, FTRL, A2Grad, closures of ScheduleFree: the second step is an error, and changes
    nothing."""
    model = perceptron()
    optimizer = type("Sequence", (Keeping,), {"key": key})(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        train(model, optimizer, batches(model, 1))
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(
            wdhook.UnsupportedOptimizerError, match=r"two sequences.*\n.*Sequence\n.*coupled"
        ):
            optimizer.step()
    assert_bit_equal(model.state_dict(), before)


def test_other_copies_do_not_matter() -> None:
    """Prodigy keeps the start as well, to measure a distance: it is decayed."""
    model = perceptron()
    optimizer = type("Measure", (Keeping,), {"key": "p0"})(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step"):
        train(model, optimizer, batches(model, 4))


# ------------------------------------------------------------------ gradients


class Negating(torch.optim.Optimizer):
    """Maximizes, and notes it on itself, as those of pytorch_optimizer do."""

    maximize = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=LR)


class Unheard:
    """No torch optimizer: nobody is told of its steps. It writes to `p.data` and zeroes in place,
    as fastai's do."""

    def __init__(self, params: Iterable[nn.Parameter], **entries: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": LR, **entries}]

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.param_groups[0]["params"] if p.grad is not None]

    def step(self) -> None:
        for p in self._trained():
            p.data.add_(p.grad, alpha=-LR)

    def zero_grad(self) -> None:
        for p in self._trained():
            p.grad.zero_()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_an_optimizer_that_nobody_hears_zeroes_in_place(mode: str) -> None:
    """A gradient that was zeroed opens a window, as a fresh one does."""
    ours, twin = twins(perceptron())
    optimizer, reference = Unheard(ours.parameters()), Unheard(twin.parameters())
    with wdhook.attach(ours, λ, mode=mode, optimizer=optimizer):
        for batch in batches(ours, 5):
            optimizer.zero_grad()
            loss_of(ours, batch).backward()
            optimizer.step()
    for batch in batches(twin, 5):
        reference.zero_grad()
        loss_of(twin, batch).backward()
        for p in weights(twin):
            if mode == "coupled":
                p.grad.add_(p.detach(), alpha=λ)
            else:
                p.data.mul_(1 - LR * λ)
        reference.step()
    assert_bit_equal(ours.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ["weight_decay", "wd"])
def test_the_own_decay_of_an_optimizer_that_nobody_hears(name: str) -> None:
    """It is an error at `attach`, under the name that fastai has for it too."""
    model = perceptron()
    with pytest.raises(wdhook.DoubleDecayError, match=rf"param_groups\[0\]\['{name}'\] = 0.01"):
        wdhook.attach(model, λ, optimizer=Unheard(model.parameters(), **{name: 0.01}))


@pytest.mark.parametrize("at", ["backward", "step"])
def test_maximize_on_the_optimizer(at: str) -> None:
    """Coupled decay shrinks the weights all the same."""
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = Negating(model.parameters())
    with wdhook.attach(model, λ, at=at, optimizer=optimizer):
        (model(torch.ones(1, 3)) * 0).sum().backward()
        optimizer.step()
    assert torch.allclose(
        model.weight, before * (1 - LR * λ), rtol=1e-6, atol=0
    )  # two roundings in float32


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("at", ["backward", "step"])
def test_gradients_that_hold_their_graph(at: str) -> None:
    """AdaHessian differentiates them in its step: decoupled decay before that is refused, coupled
    works."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    (batch,) = batches(model, 1)
    with wdhook.attach(model, λ, mode="decoupled", at=at, optimizer=optimizer):
        loss_of(model, batch).backward(create_graph=True)
        with pytest.raises(
            wdhook.UnsupportedOptimizerError, match=r"create_graph=True.*\n.*\n.*SGD\n.*coupled"
        ):
            optimizer.step()
    with wdhook.attach(model, λ, at=at):
        optimizer.step()
    model.zero_grad()  # break the cycle that create_graph makes


class Accumulating(SGD):
    """optimi's gradient release: a step may only take the gradients in."""

    optimizer_accumulation = False

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = p.grad + self.state[p].get("sum", 0)
        if not self.optimizer_accumulation:
            for p in self.param_groups[0]["params"]:
                p.grad = self.state[p].pop("sum")
            super().step(closure)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_that_only_accumulates(mode: str) -> None:
    """At "step" it is not decayed; at "backward" it is refused."""
    model, twin = twins(perceptron(torch.float64))
    optimizer = Accumulating(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode=mode, at="step", optimizer=optimizer):
        for i, batch in enumerate(batches(model, 6)):
            optimizer.optimizer_accumulation = i % 2 == 0
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    reference = SGD(own_groups(twin), lr=LR) if mode == "coupled" else SGD(twin.parameters(), lr=LR)
    for one, two in zip(batches(twin, 6)[::2], batches(twin, 6)[1::2], strict=True):
        reference.zero_grad()
        (loss_of(twin, one) + loss_of(twin, two)).backward()
        with torch.no_grad():
            for weight in weights(twin) if mode == "decoupled" else ():
                weight.mul_(1 - LR * λ)
        reference.step()
    for key, value in model.state_dict().items():
        assert (value - twin.state_dict()[key]).abs().max() < 1e-14, (
            key
        )  # sums of a few terms below 10, another order
    optimizer.optimizer_accumulation = True
    with wdhook.attach(model, λ, mode=mode, optimizer=optimizer):
        optimizer.zero_grad()
        loss_of(model, batches(model, 1)[0]).backward()
        with pytest.raises(wdhook.UnsupportedOptimizerError, match="optimizer_accumulation"):
            optimizer.step()


# ------------------------------------------------------------------ adopt


def groups(model: nn.Module, one: Any, two: Any) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": [first], **one}, {"params": rest, **two}]


ADOPTED: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], str | None]] = {
    "no decay of its own": (
        lambda m: torch.optim.Rprop(groups(m, {"weight_decay": 0.1}, {})),
        None,
    ),
    "both formulas": (
        lambda m: torch.optim.RAdam(
            groups(m, {"decoupled_weight_decay": True}, {}), weight_decay=0.1
        ),
        None,
    ),
    "the other formula in a group that does not decay": (
        lambda m: torch.optim.RAdam(
            groups(m, {"decoupled_weight_decay": True, "weight_decay": 0.1}, {})
        ),
        "decoupled",
    ),
    "a subclass": (lambda m: Estimating(m.parameters(), weight_decay=0.1), None),
}
if hasattr(torch.optim, "Muon"):
    ADOPTED["Muon"] = (
        lambda m: torch.optim.Muon([m[0].weight, m[3].weight], weight_decay=0.1),
        "decoupled",
    )
if hasattr(torch.optim, "Adafactor"):
    ADOPTED["Adafactor"] = (lambda m: torch.optim.Adafactor(m.parameters(), weight_decay=0.1), None)


@pytest.mark.parametrize("case", ADOPTED)
def test_adopt_picks_or_asks(case: str) -> None:
    """`adopt` picks the one formula that the optimizer has; where there is none, or several, it
    asks."""
    make, mode = ADOPTED[case]
    model = perceptron()
    optimizer = make(model)
    if mode is None:
        with pytest.raises(wdhook.ArgumentError, match='Give mode="coupled"'):
            wdhook.adopt(model, optimizer)
    else:
        with wdhook.adopt(model, optimizer) as decay:
            assert f"mode='{mode}'" in repr(decay)
