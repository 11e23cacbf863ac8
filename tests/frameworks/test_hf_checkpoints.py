"""The callback for the Hugging Face Trainer: its state in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import LR, assert_bit_equal, perceptron, λ

import wdhook

pytest.importorskip("transformers", reason="needs transformers")
from hf_runs import MOMENTS, OWN, AtStep, DecayBeforeStep, train

from wdhook.integrations.transformers import WeightDecayCallback

SAVE = {"save_strategy": "steps", "save_steps": 4}


def multiply(optimizer: Any) -> None:
    """Change λ of torch.optim."""
    for group in optimizer.param_groups:
        group["weight_decay"] *= 3


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the callback."""
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    return saved["stateful_callbacks"].get("WeightDecayCallback")


def check_resume(mode: str, at: str, folder: Path, forget: bool = False, **arguments: Any) -> Any:
    """Raise unless resumed runs with the callback and without wdhook end alike."""
    by_hand = mode == "independent"
    callback = WeightDecayCallback(λ, mode=mode, at=at)

    def change(_: Any) -> None:
        callback.decay.weight_decay *= 3

    net, twin = perceptron(seed=8), perceptron(seed=9)
    arguments = {"optim": OWN.get(mode, "sgd"), **SAVE, **arguments}
    # 14 steps: λ changes after 3, a new process goes on from 8.
    then = [DecayBeforeStep(mode)] if by_hand else []
    first = then if by_hand else [AtStep(3, multiply)]
    own = {} if by_hand else {"weight_decay": λ}
    train(perceptron(), folder / "theirs", *first, **own, **arguments)
    train(
        twin,
        folder / "theirs",
        *then,
        resume=str(folder / "theirs" / "checkpoint-8"),
        **own,
        **arguments,
    )
    train(
        perceptron(),
        folder / "ours",
        callback,
        *([] if by_hand else [AtStep(3, change)]),
        **arguments,
    )
    checkpoint = folder / "ours" / "checkpoint-8"
    if forget:
        saved = json.loads((checkpoint / "trainer_state.json").read_text())
        del saved["stateful_callbacks"]["WeightDecayCallback"]
        (checkpoint / "trainer_state.json").write_text(json.dumps(saved))
    again = WeightDecayCallback(
        λ if arguments.get("restore_callback_states_from_checkpoint") else 0.9, mode=mode, at=at
    )
    train(net, folder / "ours", again, resume=str(checkpoint), **arguments)
    assert_bit_equal(net.state_dict(), twin.state_dict())
    return checkpoint


@pytest.mark.parametrize("anew", [False, True], ids=["kept", "made anew"])
@pytest.mark.parametrize(("mode", "at"), [*MOMENTS, ("independent", "step")])
def test_resume(mode: str, at: str, anew: bool, tmp_path: Path) -> None:
    """A resumed run keeps the λ of its schedule, also where the Trainer makes new callbacks."""
    checkpoint = check_resume(mode, at, tmp_path, restore_callback_states_from_checkpoint=anew)
    resumed = state_of(checkpoint)["attributes"]["resumed"]
    assert resumed["weight_decay"] == pytest.approx(λ if mode == "independent" else 3 * λ)
    assert resumed["mode"] == mode


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Without the state in the checkpoint, λ is the one given to the second callback."""
    with pytest.raises(AssertionError, match="differs by up to"):
        check_resume("coupled", "step", tmp_path, forget=True)


def test_a_schedule_goes_on(tmp_path: Path) -> None:
    """λ as a function of the step: a resumed run is the run that was never interrupted."""
    schedule = wdhook.schedules.linear(0.0, 0.5, 12)
    straight, again = perceptron(seed=8), perceptron(seed=9)
    train(straight, tmp_path, WeightDecayCallback(schedule), **SAVE)
    train(
        again,
        tmp_path,
        WeightDecayCallback(schedule),
        resume=str(tmp_path / "checkpoint-8"),
        **SAVE,
    )
    assert_bit_equal(again.state_dict(), straight.state_dict())


def test_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    """Resumed with a new callback: λ is the one given, and further checkpoints can be saved."""
    train(perceptron(), tmp_path, **SAVE)
    callback, seen = WeightDecayCallback(λ), []
    probe = AtStep(13, lambda _: seen.append(callback.decay.weight_decay))
    train(perceptron(), tmp_path, callback, probe, resume=str(tmp_path / "checkpoint-8"), **SAVE)
    assert seen == [λ]
    assert state_of(tmp_path / "checkpoint-12")["attributes"]["resumed"]["weight_decay"] == λ


ARGUMENTS: dict[str, dict[str, Any]] = {
    "overrides": {"overrides": {torch.nn.Linear: 0.1, "*.0.weight": 0.2}},
    "lr": {"lr": lambda group: group["lr"], "mode": "decoupled", "at": "step"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_json_cannot_hold(name: str, tmp_path: Path) -> None:
    """λ is resumed; a Trainer that makes the callback anew without them is told so."""
    train(perceptron(), tmp_path, WeightDecayCallback(λ, **ARGUMENTS[name]), **SAVE)
    resume, seen = str(tmp_path / "checkpoint-8"), []
    callback = WeightDecayCallback(0.9, **ARGUMENTS[name])
    train(
        perceptron(),
        tmp_path,
        callback,
        AtStep(10, lambda _: seen.append(callback.decay.weight_decay)),
        resume=resume,
    )
    assert seen == [λ]
    anew = {"resume": resume, "restore_callback_states_from_checkpoint": True}
    with pytest.raises(
        wdhook.ArgumentError, match=rf"`{name}`.*\n.*restore_callback_states_from_checkpoint=False"
    ):
        train(perceptron(), tmp_path, WeightDecayCallback(0.9, **ARGUMENTS[name]), **anew)


def test_a_learning_rate_that_is_a_tensor() -> None:
    """Peaks of "independent" are plain numbers in the checkpoint, whatever the optimizer keeps."""
    callback, net = WeightDecayCallback(λ, mode="independent", at="step"), perceptron()
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(LR))
    callback.attach(net, [optimizer], None)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = json.loads(json.dumps(callback.state()))["attributes"]["resumed"]
    assert state["lr_peaks"][0]["0.weight"] == torch.tensor(LR).item()
    callback.remove()


def test_toward_given_values_goes_on(tmp_path: Path) -> None:
    """Decay toward the values of another model: JSON holds a few of them, by which others are
    told."""

    def anchor(seed: int) -> wdhook.Anchor:
        return wdhook.Anchor({f"net.{n}": p for n, p in perceptron(seed=seed).named_parameters()})

    how: dict[str, Any] = {"mode": "decoupled", "at": "step"}
    straight, again = perceptron(seed=8), perceptron(seed=9)
    train(straight, tmp_path, WeightDecayCallback(λ, toward=anchor(5), **how), **SAVE)
    checkpoint = str(tmp_path / "checkpoint-8")
    same = WeightDecayCallback(λ, toward=anchor(5), **how)
    train(again, tmp_path, same, resume=checkpoint, **SAVE)
    assert_bit_equal(again.state_dict(), straight.state_dict())
    other = WeightDecayCallback(λ, toward=anchor(6), **how)
    with pytest.raises(wdhook.ArgumentError, match="other values of the source"):
        train(perceptron(), tmp_path, other, resume=checkpoint, **SAVE)
    other.remove()


def test_first_values_do_not_fit_into_json(tmp_path: Path) -> None:
    """An error when training begins, not at the first checkpoint."""
    with pytest.raises(wdhook.ArgumentError, match=r"wdhook\.Anchor\(start\)"):
        train(perceptron(), tmp_path, WeightDecayCallback(λ, toward="init"))
