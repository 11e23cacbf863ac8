"""Optimizers that step inside the backward pass, as each gradient comes.

The reference is the same loop, in which a hook that was there first decays by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from in_backward import HEARD, REGIMES, UNHEARD, Install, Running, backward, by_hand, fused
from torch import Tensor, nn
from twins import LR, assert_bit_equal, batches, loss_of, perceptron, twins, λ

import wdhook

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.*:DeprecationWarning"
    ),  # of packages, as they are imported
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

COUPLED = {
    name: REGIMES[name] for name in ("one SGD each", "SGD applied", "optimi SGD", "optimi Adam")
}
DECOUPLED = {
    name: REGIMES[name] for name in ("one AdamW each", "AdamW applied", "optimi AdamW", "Lomo")
}


def train(model: nn.Module, run: Callable[[Tensor], None], count: int = 5) -> Mapping[str, Tensor]:
    for batch in batches(model, count):
        run(loss_of(model, batch))
    return model.state_dict()


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("name", HEARD)
def test_an_optimizer_that_was_there_first(name: str, mode: str, at: str) -> None:
    """Attached after the optimizer's hooks, with the optimizers given: decay comes before the
    step."""
    model, twin = twins(perceptron())
    running = HEARD[name](model, 0.0)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=running.optimizers) as decay:
        result = train(model, running.backward)
        assert decay._engine.state.steps > 0
    assert_bit_equal(result, train(twin, by_hand(twin, HEARD[name], mode).backward))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("name", HEARD)
def test_an_optimizer_that_comes_later(name: str, mode: str) -> None:
    """Attached before the optimizers exist."""
    if mode == "decoupled" and name == "GaLore":
        pytest.skip("its schedule is that of an optimizer which is not known yet")
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, mode=mode, lr=LR if mode == "decoupled" else None):
        result = train(model, HEARD[name](model, 0.0).backward)
    assert_bit_equal(result, train(twin, by_hand(twin, HEARD[name], mode).backward))


@pytest.mark.parametrize("inside", [False, True])
def test_a_hook_that_comes_after_ordinary_steps(inside: bool) -> None:
    """A parameter that had no other hook gets one, between two passes or in a pass: it sees the
    decay."""
    model = perceptron()
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen: list[Tensor] = []

    def look(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.clone())

    def register(*_: Tensor) -> None:
        weight.register_post_accumulate_grad_hook(look)

    with wdhook.attach(model, λ):
        for batch in batches(model, 3):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        loss = loss_of(model, batches(model, 1)[0])
        (bare,) = torch.autograd.grad(loss, weight, retain_graph=True)
        if inside:
            model[-1].weight.register_hook(register)  # its gradient comes before
        else:
            register()
        loss.backward()
    assert_bit_equal({"grad": seen[-1]}, {"grad": bare.add(weight.detach(), alpha=λ)})


@pytest.mark.parametrize("name", UNHEARD)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("first", ["optimizer", "wdhook"])
def test_an_optimizer_without_a_step(name: str, mode: str, first: str) -> None:
    """LOMO updates in the backward and has no `step()`: a fresh gradient opens the window."""
    model, twin = twins(perceptron())
    if first == "wdhook" and mode == "coupled":
        handle = wdhook.attach(model, λ)
        running = UNHEARD[name](model, 0.0)
    else:
        running = UNHEARD[name](model, 0.0)
        lr = None if mode == "coupled" else lambda group: running.optimizers[0].lr
        handle = wdhook.attach(model, λ, mode=mode, optimizer=running.optimizers, lr=lr)
    with handle:
        result = train(model, running.backward)
    assert_bit_equal(result, train(twin, by_hand(twin, UNHEARD[name], mode).backward))


def test_lomos_first_pass_for_the_norm_counts_the_decay() -> None:
    """With clipping, LOMO runs two backward passes for one update: both see λ·p, as if it were in
    the loss."""
    kind = pytest.importorskip("lomo_optim").Lomo
    model, twin = twins(perceptron())

    def run(m: nn.Module, optimizer: Any) -> Mapping[str, Tensor]:
        for batch in batches(m, 4):
            optimizer.grad_norm(loss_of(m, batch))
            optimizer.fused_backward(loss_of(m, batch), LR)
        return m.state_dict()

    optimizer = kind(model, clip_grad_norm=0.1)
    with wdhook.attach(model, λ):
        result = run(model, optimizer)
    reference = by_hand(
        twin, lambda m, w: Running([kind(m, clip_grad_norm=0.1)], backward, lambda p: {}), "coupled"
    )
    assert_bit_equal(result, run(twin, reference.optimizers[0]))


def test_the_loss_scale_of_adalomo_is_given_as_a_scaler() -> None:
    """AdaLOMO multiplies the loss with 1024 unless told otherwise: a scaler of that scale makes
    the decay right."""
    install = fused("pytorch_optimizer", "AdaLOMO", loss_scale=1024.0)
    model, twin = twins(perceptron())
    running = install(model, 0.0)
    with wdhook.attach(model, λ, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)):
        result = train(model, running.backward)
    assert_bit_equal(result, train(twin, by_hand(twin, install, "coupled", scale=1024.0).backward))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("name", REGIMES)
def test_the_reference_decays(name: str, mode: str) -> None:
    """The comparisons can fail: a loop decayed by hand ends elsewhere than one that is not."""
    model, twin = twins(perceptron())
    result = train(model, by_hand(model, REGIMES[name], mode).backward)
    with pytest.raises(AssertionError, match="differs"):
        assert_bit_equal(result, train(twin, by_hand(twin, REGIMES[name], "none").backward))


@pytest.mark.parametrize(
    ("mode", "name"), [("coupled", n) for n in COUPLED] + [("decoupled", n) for n in DECOUPLED]
)
def test_the_reference_is_the_optimizers_own_decay(mode: str, name: str) -> None:
    """Where the optimizer's own formula is one of ours, the loop decayed by hand has its bits."""
    model, twin = twins(perceptron())
    result = train(model, by_hand(model, REGIMES[name], mode).backward)
    if name == "Lomo":  # it has one λ for everything: leave it nothing else to train
        assert_decays_alike(REGIMES[name])
        return
    assert_bit_equal(result, train(twin, REGIMES[name](twin, λ).backward))


def assert_decays_alike(install: Install) -> None:
    model, twin = twins(
        nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    )
    assert_bit_equal(
        train(model, by_hand(model, install, "decoupled").backward),
        train(twin, install(twin, λ).backward),
    )


# ------------------------------------------------------------------ optimi's accumulation


def accumulated(model: nn.Module, running: Running, micro: int = 3) -> Mapping[str, Tensor]:
    """optimi's recipe: the state takes in the gradients of all micro-batches, the last one
    updates."""
    for i, batch in enumerate(batches(model, 4 * micro)):
        running.optimizers[0].optimizer_accumulation = i % micro != micro - 1
        running.backward(loss_of(model, batch) / micro)
    return model.state_dict()


@pytest.mark.parametrize("name", ["optimi SGD", "optimi Adam", "optimi AdamW"])
def test_accumulation_in_the_state_is_decayed_at_the_update(name: str) -> None:
    """At "step", micro-batches that optimi only accumulates are left alone: bit-equal to its own
    decay."""
    mode = "decoupled" if name in DECOUPLED else "coupled"
    model, twin = twins(perceptron())
    running = HEARD[name](model, 0.0)
    with wdhook.attach(model, λ, mode=mode, at="step") as decay:
        result = accumulated(model, running)
        assert decay._engine.state.steps == 4 * len(
            list(model.parameters())
        )  # one call for each parameter
    assert_bit_equal(result, accumulated(twin, HEARD[name](twin, λ)))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_accumulation_in_the_state_is_refused_in_the_backward(mode: str) -> None:
    """At "backward" each micro-batch would be decayed: an error before the first of them reaches
    the state."""
    model = perceptron()
    running = HEARD["optimi AdamW"](model, 0.0)
    with (
        wdhook.attach(model, λ, mode=mode, optimizer=running.optimizers),
        pytest.raises(
            wdhook.UnsupportedOptimizerError,
            match=r'optimizer_accumulation.*\n.*AdamW\n.*at="step"',
        ),
    ):
        accumulated(model, running)
    assert not any("exp_avg" in state for state in running.optimizers[0].state.values())


def test_optimi_asks_to_come_first() -> None:
    """optimi refuses a model that has hooks; it says how to go on, and afterwards is no problem."""
    optimi = pytest.importorskip("optimi")
    model = perceptron()
    optimizer = optimi.SGD(model.parameters(), lr=LR, gradient_release=True)
    with wdhook.attach(model, λ), pytest.raises(ValueError, match="ignore_existing_hooks=True"):
        optimi.prepare_for_gradient_release(model, optimizer)


# ------------------------------------------------------------------ loud


class Silent(torch.optim.Optimizer):
    """What LOMO is to the world: a torch Optimizer that never steps."""

    def __init__(self, model: nn.Module, weight_decay: float = 0.0) -> None:
        self.weight_decay = weight_decay
        super().__init__(model.parameters(), {"lr": LR})
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.update)

    def update(self, p: Tensor) -> None:
        with torch.no_grad():
            p.add_(p.grad, alpha=-LR)
        p.grad = None


@pytest.mark.parametrize(
    ("arguments", "error", "pieces"),
    [
        (
            {"at": "step"},
            wdhook.ArgumentError,
            'at="step" needs the step.*\n.*Silent\n.*at="backward"',
        ),
        ({"mode": "decoupled"}, wdhook.LearningRateError, "no step.*\n.*Silent\n.*`lr=`"),
    ],
    ids=["step", "lr"],
)
def test_an_optimizer_without_a_step_cannot(
    arguments: dict[str, Any], error: type[Exception], pieces: str
) -> None:
    """At "step" nothing would be heard, and its param groups do not tell its learning rate."""
    model = perceptron()
    with pytest.raises(error, match=pieces):
        wdhook.attach(model, λ, optimizer=Silent(model), **arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"mode": "decoupled", "lr": LR}], ids=["coupled", "decoupled"]
)
def test_the_own_decay_of_an_optimizer_without_a_step(arguments: dict[str, Any]) -> None:
    """There is no step at which it could be seen: it is an error at `attach`."""
    model = perceptron()
    with pytest.raises(wdhook.DoubleDecayError, match=r"Silent, optimizer.weight_decay = 0\.5"):
        wdhook.attach(model, λ, optimizer=Silent(model, 0.5), **arguments)
    assert not any(
        p._post_accumulate_grad_hooks and len(p._post_accumulate_grad_hooks) > 1
        for p in model.parameters()
    )


def test_an_optimizer_without_a_step_that_was_not_given() -> None:
    """Decoupled decay is not told that it updates; the parameters that move between two passes
    tell, and each update is decayed once, as with the optimizer given."""
    ends = []
    for given in (True, False):
        model = perceptron()
        optimizer = Silent(model)
        arguments = {"optimizer": optimizer} if given else {}
        with wdhook.attach(model, λ, mode="decoupled", lr=LR, **arguments):
            train(model, backward, 3)
        ends.append(model.state_dict())
    assert_bit_equal(*ends)
