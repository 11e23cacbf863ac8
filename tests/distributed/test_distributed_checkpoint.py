"""`torch.distributed.checkpoint` saves the handle next to model and optimizer, and a fresh run
goes on from there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import MOMENTS, assert_ranks_agree, local_batch
from processes import Group
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from twins import LR, assert_bit_equal, batches, loss_of, perceptron, λ

import wdhook

STEPS = 6


class Run:
    """A model, its optimizer, its decay and its scaler, as they are after a start or a restart."""

    def __init__(
        self, mode: str, at: str, scaled: bool = False, tensor_lr: bool = False, tell: bool = True
    ):
        lr = torch.tensor(LR) if tensor_lr else LR
        self.model = DistributedDataParallel(perceptron())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, enabled=scaled, growth_interval=2
        )
        given = self.scaler if (mode, at) == MOMENTS[0] else None
        optimizer = self.optimizer if tell else None
        self.decay = wdhook.attach(
            self.model, λ, mode=mode, at=at, optimizer=optimizer, scaler=given
        )

    def go_on(self, first: int, last: int, growth: float = 1.25) -> None:
        """Steps `first` to `last`, while λ grows and the learning rate sinks."""
        for step, batch in list(enumerate(batches(self.model, STEPS)))[first:last]:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * 0 + LR * (STEPS - step) / STEPS  # a tensor stays one
            self.optimizer.zero_grad()
            self.scaler.scale(loss_of(self.model, local_batch(batch))).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.decay.weight_decay *= growth

    def contents(self, as_object: bool) -> dict[str, Any]:
        """What is saved, and what a checkpoint is loaded into; the handle itself or its state."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        decay = self.decay if as_object else self.decay.state_dict()
        return {
            "model": model,
            "optimizer": optimizer,
            "decay": decay,
            "scaler": self.scaler.state_dict(),
        }

    def load(self, folder: str, as_object: bool) -> None:
        """Go on from a checkpoint."""
        state = self.contents(as_object)
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if not as_object:
            self.decay.load_state_dict(state["decay"])


def resumed(folder: str, as_object: bool, growth: float, *start: Any) -> None:
    """In a worker: raise unless three steps, a checkpoint and three steps in fresh objects are as
    good as six steps."""
    whole, half = Run(*start), Run(*start)
    whole.go_on(0, STEPS)
    half.go_on(0, STEPS // 2)
    checkpoint.save(half.contents(as_object), checkpoint_id=folder)
    rest = Run(*start)
    rest.load(folder, as_object)
    rest.go_on(STEPS // 2, STEPS, growth)
    assert_ranks_agree(rest.model.state_dict())
    assert_bit_equal(rest.model.state_dict(), whole.model.state_dict())
    assert rest.decay.weight_decay == whole.decay.weight_decay


@pytest.mark.parametrize("as_object", [True, False], ids=["handle", "state_dict"])
@pytest.mark.parametrize(
    ("mode", "at", "tensor_lr"),
    [
        *((*moment, tensor_lr) for moment in MOMENTS for tensor_lr in (False, True)),
        ("independent", "step", False),
        ("independent", "step", True),
    ],
)
def test_resume(
    two: Group, tmp_path: Path, mode: str, at: str, tensor_lr: bool, as_object: bool
) -> None:
    """Schedules of λ and lr, the largest lr and the windows go on: bit for bit the run that was
    not interrupted."""
    two(resumed, str(tmp_path), as_object, 1.25, mode, at, False, tensor_lr)


@pytest.mark.parametrize(("mode", "at"), MOMENTS[:3], ids=["-".join(m) for m in MOMENTS[:3]])
def test_resume_with_a_scaler(two: Group, tmp_path: Path, mode: str, at: str) -> None:
    """A fresh scaler goes on with the scale of the checkpoint."""
    two(resumed, str(tmp_path), False, 1.25, mode, at, True)


@pytest.mark.parametrize(("mode", "at"), [*MOMENTS[:3], ("independent", "step")])
def test_resume_of_a_handle_that_was_given_no_optimizer(
    two: Group, tmp_path: Path, mode: str, at: str
) -> None:
    """The optimizer is met at its first step, and what is known of it is loaded all the same."""
    two(resumed, str(tmp_path), True, 1.25, mode, at, False, False, False)


def rolled_back(folder: str, mode: str) -> None:
    """In a worker: attach anew, and go back to a checkpoint before any step."""
    run = Run(mode, "step", False, False, False)
    run.go_on(0, 2)
    saved = run.decay.state_dict()
    checkpoint.save(run.contents(True), checkpoint_id=folder)
    run.decay.remove()
    run.decay = wdhook.attach(run.model, λ, mode=mode, at="step")
    run.load(folder, True)
    assert run.decay.state_dict() == saved


@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_a_handle_that_has_met_no_optimizer(two: Group, tmp_path: Path, mode: str) -> None:
    """Its state has the same keys as that of any other, so that a checkpoint can be loaded into
    it."""
    two(rolled_back, str(tmp_path), mode)


def test_resume_can_fail(two: Group, tmp_path: Path) -> None:
    """A λ that goes on a little differently is seen."""
    with pytest.raises(AssertionError, match="differs by up to"):
        two(resumed, str(tmp_path), True, 1.26, "coupled", "step")


def fresh_state(mode: str, at: str, number: bool) -> None:
    """In a worker: `get_state_dict` takes a step, with gradients and a learning rate of zero, if
    there is no state."""
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer, lr=LR if number else None):
        get_state_dict(model, optimizer)
    assert_bit_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("mode", "at", "number"),
    [
        *((*moment, False) for moment in MOMENTS),
        ("independent", "step", False),
        ("decoupled", "step", True),
        ("decoupled", "backward", True),
    ],
)
def test_making_a_state_moves_nothing(two: Group, mode: str, at: str, number: bool) -> None:
    """The step that torch takes to make the state of a fresh optimizer changes no parameter."""
    two(fresh_state, mode, at, number)


def guarded(folder: str, repair: bool) -> None:
    """In a worker: load the checkpoint of an optimizer that decayed by itself."""
    old = Run("decoupled", "step")
    old.decay.remove()
    old.optimizer.param_groups[0]["weight_decay"] = 0.01
    old.go_on(0, 1, 1.0)
    checkpoint.save(old.contents(False), checkpoint_id=folder)
    new = Run("decoupled", "step")
    new.load(folder, False)
    before = copy.deepcopy(new.model.state_dict())
    if repair:
        new.optimizer.param_groups[0]["weight_decay"] = 0.0
    try:
        new.go_on(1, 2)
    finally:
        if not repair:
            assert_bit_equal(new.model.state_dict(), before)


def test_the_guard(two: Group, tmp_path: Path) -> None:
    """A checkpoint that brings the optimizer's own decay back is refused on every rank, and told
    how to repair."""
    with pytest.raises(AssertionError, match=r"rank 0:") as failure:
        two(guarded, str(tmp_path), False)
    message = str(failure.value)
    assert message.count("wdhook._base.errors.DoubleDecayError: ") == 2
    assert "again after loading a checkpoint of it" in message
    two(guarded, str(tmp_path), True)
