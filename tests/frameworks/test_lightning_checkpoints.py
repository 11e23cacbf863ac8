"""The callback for Lightning in checkpoints: resumed runs are compared with torch.optim's decay."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import LR, assert_bit_equal, perceptron, twins, weights, λ

import wdhook
from wdhook._decay import step_listener as _listener

pytest.importorskip("lightning.pytorch", reason="needs Lightning")
from lightning_runs import (
    KINDS,
    MOMENTS,
    QUIET,
    AtEpoch,
    Evaluated,
    Regression,
    fit,
    pl,
    stop,
    trainer_of,
)

from wdhook.integrations.lightning import WeightDecay

pytestmark = QUIET


class Independent(pl.Callback):
    """Independent decay by hand, just before the step; no peak but LR is ever reached."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        with torch.no_grad():
            for p in weights(module.net):
                p.mul_(1 - optimizer.param_groups[0]["lr"] / LR * λ)


class Keep(pl.callbacks.Checkpoint):
    """Saves after the second epoch, or when something goes wrong."""

    def __init__(self, path: Path, saved: str) -> None:
        self.path, self.saved = path, saved

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.saved == "while fit runs" and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def halve(trainer: Any) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] /= 2


def multiply(trainer: Any) -> None:
    """Change λ of torch.optim."""
    for group in trainer.optimizers[0].param_groups:
        group["weight_decay"] *= 3


def resumed(
    module: Any,
    again: Any,
    path: Path,
    saved: str,
    first: list[Any],
    then: list[Any],
    forget: bool = False,
) -> None:
    """Train `module` and save; then `again` resumes, maybe from a file without callbacks."""
    if saved == "after fit":
        fit(module, *first).save_checkpoint(path)
    else:
        keep = [Keep(path, saved), *[AtEpoch(2, stop)] * (saved == "by an exception")]
        with pytest.raises(ZeroDivisionError) if len(keep) > 1 else nullcontext():
            fit(module, *first, *keep, max_epochs=3, enable_checkpointing=True)
    if forget:
        torch.save({**torch.load(path, weights_only=True), "callbacks": {}}, path)
    fit(again, *then, ckpt_path=path, max_epochs=5)


def check_resume(mode: str, at: str, saved: str, path: Path, forget: bool = False) -> None:
    """Raise unless resumed runs with the callback and without wdhook end alike."""
    kind = KINDS.get(mode, torch.optim.SGD)
    by_hand = mode == "independent"
    callback = WeightDecay(λ, mode=mode, at=at)

    def change(trainer: Any) -> None:
        callback.decay.weight_decay *= 3

    net, twin = perceptron(seed=8), perceptron(seed=9)
    then = [Independent()] if by_hand else []
    own = [Regression(model, kind, 0.0 if by_hand else λ) for model in (perceptron(), twin)]
    resumed(*own, path, saved, [AtEpoch(1, halve if by_hand else multiply), *then], then)
    first = [callback, AtEpoch(1, halve if by_hand else change)]
    ours = [Regression(model, kind) for model in (perceptron(), net)]
    resumed(*ours, path, saved, first, [WeightDecay(0.9, mode=mode, at=at)], forget)
    assert_bit_equal(net.state_dict(), twin.state_dict())


@pytest.mark.parametrize("saved", ["while fit runs", "after fit", "by an exception"])
@pytest.mark.parametrize(("mode", "at"), [*MOMENTS, ("independent", "step")])
def test_resume(mode: str, at: str, saved: str, tmp_path: Path) -> None:
    """A resumed run keeps the λ that a schedule had set, and the peaks of "independent"."""
    check_resume(mode, at, saved, tmp_path / "saved.ckpt")
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["WeightDecay"]
    assert state["weight_decay"] == pytest.approx(λ if mode == "independent" else 3 * λ)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Without the state in the checkpoint, λ is the one given to the second callback."""
    with pytest.raises(AssertionError, match="differs by up to"):
        check_resume("coupled", "step", "after fit", tmp_path / "saved.ckpt", forget=True)


def test_a_schedule_goes_on(tmp_path: Path) -> None:
    """λ as a function of the step: a resumed run is the run that was never interrupted."""
    schedule, kind = wdhook.schedules.linear(0.0, 0.5, 12), torch.optim.SGD
    straight, first, again = perceptron(seed=8), perceptron(seed=8), perceptron(seed=9)
    fit(Regression(straight, kind), WeightDecay(schedule), max_epochs=5)
    modules = [Regression(model, kind) for model in (first, again)]
    resumed(
        *modules, tmp_path / "a.ckpt", "after fit", [WeightDecay(schedule)], [WeightDecay(schedule)]
    )
    assert_bit_equal(again.state_dict(), straight.state_dict())


class Late(pl.strategies.SingleDeviceStrategy):
    """Loads checkpoints when `fit` has started, as the strategies for sharded models do."""

    restore_checkpoint_after_setup = True


def test_a_checkpoint_that_is_loaded_late(tmp_path: Path) -> None:
    """λ of the checkpoint wins also where it comes after the callback has attached."""
    path = tmp_path / "late.ckpt"
    fit(Regression(perceptron(), KINDS["coupled"]), WeightDecay(λ)).save_checkpoint(path)
    callback, seen = WeightDecay(0.9), []
    probe = AtEpoch(2, lambda trainer: seen.append(callback.decay.weight_decay))
    fit(
        Regression(perceptron(), KINDS["coupled"]),
        callback,
        probe,
        ckpt_path=path,
        max_epochs=3,
        strategy=Late("cpu"),
    )
    assert seen == [λ]


def test_a_checkpoint_for_evaluation_changes_no_later_fit(tmp_path: Path) -> None:
    """`validate` loads the state of callbacks too; a new `fit` has the λ that was given."""
    path = tmp_path / "a.ckpt"
    fit(Regression(perceptron(), KINDS["coupled"]), WeightDecay(λ)).save_checkpoint(path)
    callback, seen = WeightDecay(0.9), []
    trainer_of(callback).validate(
        Evaluated(perceptron(), None), [torch.zeros(4, 4)], ckpt_path=path, verbose=False
    )
    probe = AtEpoch(1, lambda trainer: seen.append(callback.decay.weight_decay))
    fit(Regression(perceptron(), KINDS["coupled"]), callback, probe)
    assert seen == [0.9]


def test_a_checkpoint_of_another_mode(tmp_path: Path) -> None:
    """The same λ means something else in another mode: an error."""
    path = tmp_path / "a.ckpt"
    fit(Regression(perceptron(), KINDS["coupled"]), WeightDecay(λ)).save_checkpoint(path)
    with pytest.raises(wdhook.ArgumentError, match="of another mode"):
        fit(
            Regression(perceptron(), KINDS["coupled"]),
            WeightDecay(λ, mode="decoupled"),
            ckpt_path=path,
        )
    assert not _listener.attached()


@pytest.mark.parametrize("mode", [*KINDS, "independent"])
def test_a_search_for_the_learning_rate(mode: str, tmp_path: Path) -> None:
    """Lightning's search precedes the callback, then restores a checkpoint: no effect."""
    kind = KINDS.get(mode, torch.optim.SGD)
    net, twin = twins(perceptron())
    own = (0.0, [Independent()]) if mode == "independent" else (λ, [])
    for module, callbacks in (
        (Regression(net, kind), [WeightDecay(λ, mode=mode, at="step")]),
        (Regression(twin, kind, own[0]), own[1]),
    ):
        search = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
        fit(module, *callbacks, search, default_root_dir=tmp_path)
        assert search.optimal_lr.results["lr"][-1] == 1.0
    assert_bit_equal(net.state_dict(), twin.state_dict())


@pytest.mark.parametrize("saved", ["while fit runs", "after fit"])
def test_toward_first_values_goes_on(saved: str, tmp_path: Path) -> None:
    """Decay toward the values before the first update: those of the run that was interrupted."""
    kind, path = torch.optim.SGD, tmp_path / "run.ckpt"

    def callback() -> WeightDecay:
        return WeightDecay(λ, mode="decoupled", at="step", toward="init")

    straight, net = perceptron(), perceptron(seed=8)
    fit(Regression(straight, kind), callback(), max_epochs=5)
    ours = [Regression(model, kind) for model in (perceptron(), net)]
    resumed(*ours, path, saved, [callback()], [callback()])
    assert_bit_equal(net.state_dict(), straight.state_dict())
