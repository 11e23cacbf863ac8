"""The callback for Lightning: attaching and removing, its checkpoints, its logs and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twins import assert_bit_equal, perceptron, twins, λ

import wdhook
from wdhook._decay import step_listener as _listener

pytest.importorskip("lightning.pytorch", reason="needs Lightning")
from lightning_runs import KINDS, QUIET, AtEpoch, Evaluated, Regression, fit, pl, stop, trainer_of

from wdhook.integrations.lightning import WeightDecay, norms

pytestmark = QUIET


def hooks(net: nn.Module) -> int:
    """How many parameters have a hook."""
    return sum(bool(p._post_accumulate_grad_hooks) for p in net.parameters())


# ---------------------------------------------------------------- life cycle


def test_attached_while_fit_runs() -> None:
    """Hooks are there during `fit`, and none is left after it; a second `fit` is decayed again."""
    net, twin = twins(perceptron())
    seen = []
    callback = WeightDecay(λ)
    probe = AtEpoch(1, lambda trainer: seen.append((hooks(net), callback.decay.plan.weight_decay)))
    for _ in range(2):
        fit(Regression(net, KINDS["coupled"]), callback, probe)
        assert hooks(net) == 0
        assert callback.decay is None
        assert not _listener.attached()
        fit(Regression(twin, KINDS["coupled"], λ))
        assert_bit_equal(net.state_dict(), twin.state_dict())
    assert seen == [(3, λ), (3, λ)]


def test_the_same_trainer_goes_on() -> None:
    """`fit` called again on one Trainer, with new optimizers, is decayed by those."""
    net, twin = twins(perceptron())
    kind = KINDS["decoupled"]
    ours = Regression(net, kind), [WeightDecay(λ, mode="decoupled")]
    for module, callbacks in (ours, (Regression(twin, kind, λ), [])):
        trainer = fit(module, *callbacks)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, trainer.train_dataloader)
        assert trainer.global_step == 28
    assert_bit_equal(net.state_dict(), twin.state_dict())


def test_removed_by_an_exception() -> None:
    """An exception in the loop leaves no hook; the next `fit` attaches as if nothing had been."""
    net = perceptron()
    callback = WeightDecay(λ)
    with pytest.raises(ZeroDivisionError):
        fit(Regression(net, KINDS["coupled"]), callback, AtEpoch(1, stop))
    assert hooks(net) == 0
    assert not _listener.attached()
    fit(Regression(net, KINDS["coupled"]), callback)


def test_evaluation_attaches_nothing() -> None:
    """`validate` and `test` go by without a handle."""
    net = perceptron()
    callback, seen = WeightDecay(λ), []
    trainer = trainer_of(callback)

    module = Evaluated(net, lambda: seen.append((callback.decay, hooks(net))))
    trainer.validate(module, [torch.zeros(4, 4)], verbose=False)
    assert set(seen) == {(None, 0)}


# ---------------------------------------------------------------- logging


class Memory(pl.loggers.logger.Logger):
    """Keeps what it is given."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_: Any) -> None:
        """None."""


def test_log() -> None:
    """λ and the norms by role are logged at the steps that the Trainer logs, as after the step."""
    net = perceptron()
    expected: dict[int, dict[str, float]] = {}

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            squares = {"weight": 0.0, "bias": 0.0, "norm": 0.0}
            for module in net:
                for name, p in module.named_parameters():
                    role = "norm" if isinstance(module, nn.LayerNorm) else name
                    squares[role] += p.double().square().sum().item()
            norms = {f"wdhook/norm/{role}": square**0.5 for role, square in squares.items()}
            expected[trainer.global_step - 1] = {"wdhook/weight_decay": λ, **norms}

    logger = Memory()
    fit(
        Regression(net, KINDS["coupled"]),
        WeightDecay(λ, log=True),
        Probe(),
        logger=logger,
        log_every_n_steps=3,
    )
    assert list(logger.metrics) == [2, 5, 8, 11]
    for step, metrics in logger.metrics.items():
        found = {name: value for name, value in metrics.items() if name != "epoch"}
        # Of 50 float32 squares, summed and rooted.
        assert found == pytest.approx(expected[step], rel=50 * 2**-24)


def test_log_is_off() -> None:
    """Nothing is logged unless asked for."""
    logger = Memory()
    fit(
        Regression(perceptron(), KINDS["coupled"]),
        WeightDecay(λ),
        logger=logger,
        log_every_n_steps=1,
    )
    assert not any(
        name.startswith("wdhook") for metrics in logger.metrics.values() for name in metrics
    )


def test_norms_never_wait_for_the_device() -> None:
    """A meta tensor has no values, so that reading one would raise."""
    net = perceptron().to("meta")
    with pytest.raises(RuntimeError):
        next(net.parameters()).sum().item()
    assert set(norms(net, wdhook.plan(net, λ))) == {"norm/weight", "norm/bias", "norm/norm"}


# ---------------------------------------------------------------- refusals


def fit_adamw(**arguments: Any) -> None:
    """AdamW's own weight decay is 0.01."""

    class Doubled(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    fit(Doubled(perceptron(), None), WeightDecay(λ, **arguments))


REFUSED = {
    "a scaler": (
        lambda: WeightDecay(λ, scaler=None),
        wdhook.ArgumentError,
        ["`scaler`", "overrides"],
    ),
    "an optimizer": (
        lambda: WeightDecay(λ, optimizer=None),
        wdhook.ArgumentError,
        ["`optimizer`", "when training begins"],
    ),
    "a typing error": (
        lambda: WeightDecay(λ, mod="coupled"),
        wdhook.ArgumentError,
        ["`mod`", "mode"],
    ),
    "another mode": (lambda: fit_adamw(mode="l2"), wdhook.ArgumentError, ["`mode`", "l2"]),
    "own decay": (
        fit_adamw,
        wdhook.DoubleDecayError,
        ["net.0.weight", "AdamW", "0.01", "weight_decay=0"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """What has no meaning is an error that names the way out, and leaves nothing attached."""
    function, kind, pieces = REFUSED[case]
    with pytest.raises(kind) as error:
        function()
    assert [piece for piece in pieces if piece not in str(error.value)] == []
    assert not _listener.attached()


def test_two_callbacks() -> None:
    """A second callback for the same parameters is an error that leaves nothing attached."""
    with pytest.raises((wdhook.AlreadyAttachedError, RuntimeError)):
        fit(Regression(perceptron(), KINDS["coupled"]), WeightDecay(λ), WeightDecay(λ))
    assert not _listener.attached()
