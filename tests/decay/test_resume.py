"""Save, load in a new process, go on: bit for bit the run that was never interrupted, and that
never knew wdhook."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
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
    zero,
    λ,
)

import wdhook

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
STEPS, HALF = 20, 10
OVERFLOWS = {3, 12}  # where there is a scaler
CASES: dict[str, dict[str, Any]] = {
    "coupled, scaler": {
        "at": "backward",
        "kind": SGD,
        "options": {"momentum": 0.9},
        "scaled": True,
    },
    "coupled at step, scaler": {
        "at": "step",
        "kind": Adam,
        "options": {"amsgrad": True},
        "scaled": True,
    },
    "decoupled, scaler": {"mode": "decoupled", "at": "step", "kind": AdamW, "scaled": True},
    "decoupled in the backward": {"mode": "decoupled", "at": "backward", "kind": AdamW},
    "independent": {"mode": "independent", "at": "step", "kind": SGD},
    "independent in the backward": {"mode": "independent", "at": "backward", "kind": SGD},
    "independent, two optimizers": {
        "mode": "independent",
        "at": "step",
        "kind": SGD,
        "split": True,
    },
}


class Run:
    """All that a script has, saves and loads: with wdhook, or (own) with the decay of torch.optim
    or by hand."""

    def __init__(self, name: str, own: bool = False, seed: int = 0) -> None:
        case = {"mode": "coupled", "options": {}, "scaled": False, "split": False, **CASES[name]}
        self.mode, self.own, self.λ = case["mode"], own, λ
        self.model = perceptron(seed=seed)
        parts = [self.model[0], self.model[2:]] if case["split"] else [self.model]
        decays = own and self.mode != "independent"
        self.optimizers = [
            case["kind"](own_groups(part, λ if decays else 0.0), lr=LR / 10**i, **case["options"])
            for i, part in enumerate(parts)
        ]
        # λ schedules of "independent" are by hand: of them there is no trace in the param groups.
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)
            for o in self.optimizers
            if self.mode != "independent"
        ]
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=4, enabled=case["scaled"]
        )
        self.peaks = [0.0 for _ in self.optimizers]
        if not own:
            self.handle = wdhook.attach(
                self.model,
                λ,
                mode=self.mode,
                at=case["at"],
                optimizer=self.optimizers if case["at"] == "backward" else None,
                scaler=self.scaler if self.mode == "coupled" and case["at"] == "backward" else None,
            )

    def state(self) -> dict[str, Any]:
        """A checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "decay": self.handle.state_dict(),
        }

    def load(self, state: Mapping[str, Any], decay: bool = True) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        for part, saved in zip(
            (*self.optimizers, *self.schedulers),
            state["optimizers"] + state["schedulers"],
            strict=True,
        ):
            part.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if decay:
            self.handle.load_state_dict(state["decay"])
            self.λ = self.handle.weight_decay

    def go(self, steps: range) -> None:
        """Train, with a schedule of the learning rate and one of λ that goes on from the λ that
        there is."""
        for i in steps:
            self.λ *= 1.05
            self._set_λ()
            zero(self.model, to_none=True)
            loss = loss_of(self.model, batches(self.model, STEPS)[i])
            factor = float("inf") if self.scaler.is_enabled() and i in OVERFLOWS else 1.0
            self._set_lr(i)
            self.scaler.scale(loss * factor).backward()
            for index, optimizer in enumerate(self.optimizers):
                if index == 0 and len(self.optimizers) == 2 and i % 4:
                    # the first one steps seldom, so another one comes first after the checkpoint
                    continue
                self._decay_by_hand(index)
                self.scaler.step(optimizer)
            self.scaler.update()
            for scheduler in self.schedulers:
                scheduler.step()

    def _set_λ(self) -> None:
        if not self.own:
            self.handle.weight_decay = self.λ
        elif self.mode != "independent":
            self.optimizers[0].param_groups[0]["weight_decay"] = self.λ

    def _set_lr(self, step: int) -> None:
        if self.mode == "independent":
            for i, optimizer in enumerate(self.optimizers):
                for group in optimizer.param_groups:
                    group["lr"] = LR / 10**i / (1 + abs(step - 4))  # up to step 4, and down

    def _decay_by_hand(self, index: int) -> None:
        if self.own and self.mode == "independent":
            group = self.optimizers[index].param_groups[0]
            self.peaks[index] = max(self.peaks[index], group["lr"])
            with torch.no_grad():
                for weight in group["params"]:
                    weight.mul_(1 - group["lr"] / self.peaks[index] * self.λ)


def checkpointed(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as safely as torch loads."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume_all(folder: Path) -> None:
    """What the new process does: every case, from a model of other random numbers."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", wdhook.WdhookWarning)
    results = {}
    for name, state in torch.load(folder / "half.pt", weights_only=True).items():
        run = Run(name, seed=9)
        run.load(state)
        run.go(range(HALF, STEPS))
        results[name] = run.model.state_dict()
        run.handle.remove()
    torch.save(results, folder / "whole.pt")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The models of all cases, trained for 10 steps here and for 10 in a new process."""
    folder = tmp_path_factory.mktemp("resume")
    half = {}
    for name in CASES:
        run = Run(name)
        run.go(range(HALF))
        half[name] = run.state()
        run.handle.remove()
    torch.save(half, folder / "half.pt")
    command = [sys.executable, __file__, str(folder)]
    paths = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "whole.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_10_steps_and_10_in_a_new_process_are_20(
    name: str, resumed: dict[str, dict[str, Tensor]]
) -> None:
    """With schedules of lr and λ and a GradScaler, against torch.optim's own decay (independent:
    by hand)."""
    reference = Run(name, own=True)
    reference.go(range(STEPS))
    assert_bit_equal(resumed[name], reference.model.state_dict())


@pytest.mark.parametrize("name", ["coupled, scaler", "independent"])
def test_the_handle_has_to_be_loaded(name: str) -> None:
    """Without its state λ starts again, and so does the peak of the learning rate: the comparison
    above can fail."""
    run = Run(name)
    run.go(range(HALF))
    state = checkpointed(run.state())
    run.handle.remove()
    other = Run(name, seed=9)
    other.load(state, decay=False)
    other.go(range(HALF, STEPS))
    reference = Run(name, own=True)
    reference.go(range(STEPS))
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(other.model.state_dict(), reference.model.state_dict())


def test_a_state_is_plain_numbers() -> None:
    """Numbers of other libraries, as schedules compute them, do not get into a checkpoint; tensors
    stay tensors."""
    numpy = pytest.importorskip("numpy")
    for lr in (numpy.float64(0.25), torch.tensor(0.25)):
        model = perceptron()
        optimizer = SGD(model.parameters(), lr=LR)
        with wdhook.attach(model, λ, mode="independent", at="step") as handle:
            optimizer.param_groups[0]["lr"] = lr
            handle.weight_decay = numpy.float64(0.5)
            train(model, optimizer, batches(model, 1))
            state = checkpointed(handle.state_dict())
        peaks = dict.fromkeys(("0.weight", "3.weight", "5.weight"), 0.25)
        assert state == {
            "weight_decay": 0.5,
            "mode": "independent",
            "lr_peaks": (peaks,),
            "finished_steps": (),
            "memory": (),
            "doses": (dict.fromkeys(peaks, math.log(2)),),
        }


def test_a_state_that_waits_for_its_optimizer_is_saved_again() -> None:
    """Loaded, and saved before any optimizer has stepped: nothing is lost."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="independent", at="step") as handle:
        train(model, optimizer, batches(model, 1))
        state = handle.state_dict()
    with wdhook.attach(model, λ, mode="independent", at="step") as handle:
        handle.load_state_dict(state)
        assert handle.state_dict() == state


def own_checkpoint() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """Five steps of AdamW with its own decay on the weights."""
    model = perceptron()
    optimizer = AdamW(own_groups(model), lr=LR)
    train(model, optimizer, batches(model, 5))
    return (
        model,
        optimizer,
        checkpointed({"model": model.state_dict(), "optimizer": optimizer.state_dict()}),
    )


@pytest.mark.parametrize("way", ["set it to 0", "adopt"])
def test_both_ways_out_of_a_checkpoint_that_decays(way: str) -> None:
    """A checkpoint brings weight_decay back: the error names two ways out, and either goes on as
    torch.optim would."""
    twin, reference, state = own_checkpoint()
    model = perceptron(seed=9)
    optimizer = AdamW(own_groups(model, 0.0), lr=LR)
    handle = wdhook.attach(model, λ, mode="decoupled", at="step")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    pattern = (
        r"(?s)param_groups\[0\]\['weight_decay'\] = 0.05"
        r".*wdhook\.adopt\(model, optimizer\)\n"
        r".*again after loading a checkpoint of it:\n.*group\[\"weight_decay\"\] = 0\.0"
    )
    with pytest.raises(wdhook.DoubleDecayError, match=pattern):
        train(model, optimizer, batches(model, 1, seed=2))
    assert_bit_equal(model.state_dict(), state["model"])
    if way == "adopt":
        handle.remove()
        handle = wdhook.adopt(model, optimizer)
    else:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    train(model, optimizer, batches(model, 5, seed=2))
    handle.remove()
    train(twin, reference, batches(twin, 5, seed=2))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_checkpoint_between_two_micro_batches(at: str) -> None:
    """Gradients are in no checkpoint: the first step after it has those of the rest alone, and one
    decay."""
    model, twin = twins(perceptron())
    first, second = batches(model, 2)
    with wdhook.attach(model, λ, at=at):
        loss_of(model, first).backward()
        state = checkpointed({"model": model.state_dict()})
    resumed = perceptron(seed=9)
    resumed.load_state_dict(state["model"])
    with wdhook.attach(resumed, λ, at=at):
        loss_of(resumed, second).backward()
        SGD(resumed.parameters(), lr=LR).step()
    train(twin, SGD(own_groups(twin), lr=LR), [second])
    assert_bit_equal(resumed.state_dict(), twin.state_dict())


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("at", ["backward", "step"])
def test_back_to_a_checkpoint_in_mid_step(at: str, mode: str) -> None:
    """Loading it all after a backward pass (the loss was not finite, say): the parameters of then
    are decayed again."""
    model = perceptron()
    batch = batches(model, 1)[0]
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer) as handle:
        state = checkpointed({"model": model.state_dict(), "decay": handle.state_dict()})
        loss_of(model, batch).backward()
        model.load_state_dict(state["model"])
        handle.load_state_dict(state["decay"])
        zero(model, to_none=True)
        (loss_of(model, batch) * 0).backward()
        optimizer.step()
    before = perceptron()
    for weight, other in zip(weights(model), weights(before), strict=True):
        expected = other * (1 - LR * λ) if mode == "decoupled" else other - LR * (λ * other)
        # Coupled: lr·(λ·p) is subtracted in one rounding or two, half a unit in the last place of
        # numbers below 1.
        assert (weight - expected).abs().max() <= (0.0 if mode == "decoupled" else 2**-24)


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
