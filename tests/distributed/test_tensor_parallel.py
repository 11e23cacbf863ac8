"""Tensor and sequence parallel models, alone and with FSDP2: against torch's own decay, and
against one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from distributed import local_batch
from processes import Group
from sharded import (
    LOOPS,
    NORMS,
    WAYS,
    Loop,
    Trainer,
    compare,
    groups,
    needs_dtensor,
    parallel,
    tower,
)
from torch import Tensor, nn

pytestmark = needs_dtensor


def _tensor_parallel(style: str, loop: Loop, mode: str, at: str) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    trainer = Trainer(loop, groups=groups)
    # Of the modules that are not in the plan the parameters stay, and with them their hooks.
    trainer = (
        replace(trainer, loop=replace(loop, micro=1, clip=None))
        if style == "columns and rows"
        else trainer
    )
    model = compare(mode, at, tower, partial(parallel, style, mesh), trainer, trainer, NORMS)
    partial_sums = [
        name
        for name, p in model.named_parameters()
        if any(x.is_partial() for x in placements(p.grad))
    ]
    assert ("norm.weight" in partial_sums) == (style != "columns and rows")
    assert ("mid.weight" in partial_sums) == (style == "replicated")


def placements(grad: Tensor | None) -> tuple[Any, ...]:
    return getattr(grad, "placements", ())


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("style", ["columns and rows", "replicated"])
def test_every_style(style: str, mode: str, at: str, two: Group) -> None:
    """Sharded, replicated and plain parameters in one model; a gradient that is a partial sum gets
    λ·p once."""
    two(_tensor_parallel, style, Loop(micro=2, clip=0.05), mode, at)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if not loop.sync_last])
def test_every_loop(name: str, mode: str, at: str, two: Group) -> None:
    """Sequence parallel, attached before and after: accumulation, both kinds of zeroing, skipped
    steps."""
    two(_tensor_parallel, "sequence", LOOPS[name], mode, at)


def _in_two_dimensions(loop: Loop, mode: str, at: str) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def make(model: nn.Module) -> nn.Module:
        parallel("sequence", mesh["tensor"], model)
        fully_shard(model.mid, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    mine = partial(local_batch, rank=mesh["data"].get_local_rank(), world=2)
    trainer = Trainer(loop, mine, groups=groups)
    model = compare(mode, at, tower, make, trainer, Trainer(loop, groups=groups), NORMS)
    assert model.mid.weight.device_mesh.ndim == 2


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", ["accumulated, clipped", "skipped, zeroed in place"])
def test_tensor_parallel_with_fsdp2(name: str, mode: str, at: str, four: Group) -> None:
    """A mesh of 2×2: each parameter is split twice, and decayed once."""
    loops = {**LOOPS, "accumulated, clipped": Loop(micro=2, clip=0.05)}
    four(_in_two_dimensions, loops[name], mode, at)
