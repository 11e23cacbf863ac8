"""Decay toward a target of sharded parameters: what one process does, and checkpoints of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Group
from sharded import (
    Trainer,
    assert_whole_is_close,
    blocks,
    needs_dtensor,
    parallel,
    shard,
    tower,
    whole_state,
)
from torch import nn
from torch.distributed import checkpoint
from twins import LR, assert_bit_equal, λ

import wdhook

pytestmark = needs_dtensor
MODES = [("coupled", "backward"), ("coupled", "step"), ("decoupled", "step")]


def _attach(model: nn.Module, mode: str, at: str, toward: Any) -> tuple[Any, wdhook.WeightDecay]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    return optimizer, wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer, toward=toward)


def _play(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 4, dtype=torch.float64, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()


def _toward(kind: str) -> Any:
    anchor = wdhook.Anchor(blocks(seed=3).state_dict())  # whole tensors, beside sharded ones
    return {"number": 1.0, "init": "init", "given": anchor}[kind]


def _sharded(mode: str, at: str, kind: str, late: bool) -> None:
    model, alone = blocks(), blocks()
    if late:
        optimizer, decay = _attach(shard(model), mode, at, _toward(kind))
    else:
        decay = wdhook.attach(model, λ, mode=mode, at="step", toward=_toward(kind))
        shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    other, twin = _attach(alone, mode, at, _toward(kind))
    _play(model, optimizer, 4)
    _play(alone, other, 4)
    assert_whole_is_close(model, alone)
    for each in (decay, twin):
        each.remove()


@pytest.mark.parametrize("late", [True, False], ids=["attach-after", "attach-before"])
@pytest.mark.parametrize("kind", ["number", "init", "given"])
@pytest.mark.parametrize(("mode", "at"), MODES)
def test_sharded(mode: str, at: str, kind: str, late: bool, two: Group) -> None:
    """FSDP2: each rank draws its shards to its shards of the target."""
    two(_sharded, mode, at, kind, late)


def _parallel(style: str, mode: str, at: str, kind: str) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    source = tower()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.5)
    toward = {"number": 1.0, "init": "init", "given": wdhook.Anchor(source)}[kind]
    trained = []
    for make in (partial(parallel, style, mesh), nn.Module.train):
        model: Any = make(tower())
        optimizer, decay = _attach(model, mode, at, toward)
        with decay:
            Trainer().play(model, optimizer)
        trained.append(model)
    assert_whole_is_close(*trained)


@pytest.mark.parametrize("kind", ["number", "init", "given"])
@pytest.mark.parametrize("style", ["columns and rows", "sequence", "replicated"])
@pytest.mark.parametrize(("mode", "at"), [("coupled", "step"), ("decoupled", "step")])
def test_tensor_parallel(mode: str, at: str, style: str, kind: str, two: Group) -> None:
    """Sharded, replicated and plain parameters, and gradients that are partial sums."""
    two(_parallel, style, mode, at, kind)


def _resumed(folder: str) -> None:
    model = shard(blocks())
    optimizer, decay = _attach(model, "decoupled", "step", "init")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    _play(model, optimizer, 3)
    checkpoint.save({"decay": decay.state_dict()}, checkpoint_id=folder)
    again = shard(blocks(seed=9))
    *_, other = _attach(again, "decoupled", "step", "init")
    state = {"decay": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state["decay"])
    targets = other.state_dict()["targets"]
    assert_bit_equal(
        {name: t.full_tensor() for name, t in targets.items()},
        {name: start[name].full_tensor() for name in other.plan.decayed},
    )
    with pytest.raises(AssertionError, match="differs"):
        assert_bit_equal(whole_state(again), whole_state(model))


def test_a_distributed_checkpoint_holds_the_targets(two: Group, tmp_path: Path) -> None:
    """Sharded, into a fresh handle that has made no step."""
    two(_resumed, str(tmp_path))
