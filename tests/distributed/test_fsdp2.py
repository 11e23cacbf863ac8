"""FSDP2 (`fully_shard`): each against the same sharded run by torch's own decay, and against one
process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from distributed import local_batch
from processes import Group
from sharded import (
    LOOPS,
    WAYS,
    Loop,
    Trainer,
    assert_clean,
    assert_same_shards,
    assert_sees_decay,
    assert_whole_is_close,
    blocks,
    compare,
    needs_dtensor,
    play_scaled,
    reasons,
    reference,
    shard,
    shard_one,
)
from torch import nn
from twins import own_groups, λ

import wdhook

pytestmark = needs_dtensor


@contextmanager
def syncing(model: nn.Module, sync: bool) -> Iterator[None]:
    """Reduce the gradients of this micro-batch, or leave them for a later one."""
    if hasattr(model, "set_requires_gradient_sync"):  # a model on its own has none
        model.set_requires_gradient_sync(sync)
    yield


def _in_a_loop(name: str, mode: str, at: str) -> None:
    trainer = Trainer(LOOPS[name], local_batch, syncing)
    model = compare(mode, at, blocks, shard, trainer, replace(trainer, part=lambda batch: batch))
    if (name, mode) == ("plain", "coupled"):
        assert_sees_decay(model)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop(name: str, mode: str, at: str, two: Group) -> None:
    """Accumulation, both kinds of zeroing, clipping and skipped steps; attached before and after;
    rows that do not
    divide and empty shards; names and reasons of the plan are those of the user's model."""
    two(_in_a_loop, name, mode, at)


def _each_block(model: nn.Module) -> nn.Module:
    for block in model[:2]:
        shard_one(block)
    return shard_one(model)


def _ignoring(model: nn.Module) -> nn.Module:
    return shard_one(model, ignored_params={model[1][0].weight, model[2].bias})


def _offloaded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def _hybrid(model: nn.Module) -> nn.Module:
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(model, mesh=mesh)


LAYOUTS = {
    "one group": shard_one,
    "each block": _each_block,
    "whole after forward": partial(shard, reshard_after_forward=False),
    "sharded after forward": partial(shard_one, reshard_after_forward=True),
    "ignored parameters": _ignoring,
    "offloaded": _offloaded,
    "hybrid": _hybrid,
    "in parts after forward": partial(shard, reshard_after_forward=2),
}


@contextmanager
def _reducing(model: nn.Module, sync: bool) -> Iterator[None]:
    """Sum over replicas with this micro-batch, or with a later one; over shards each time."""
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(sync)
    yield


def _in_a_layout(name: str, mode: str, at: str) -> None:
    # Each rank sees the whole batch, since nobody reduces the gradients of ignored parameters.
    trainer = Trainer(Loop(micro=2), syncing=syncing)
    if name == "ignored parameters":  # keep their hooks, where the others lose theirs
        trainer = Trainer(Loop())
    elif name == "hybrid":
        trainer = Trainer(Loop(micro=2, sync_last=True), syncing=_reducing)
    compare(mode, at, blocks, LAYOUTS[name], trainer, trainer)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", list(LAYOUTS)[:6])
def test_every_layout(name: str, mode: str, at: str, two: Group) -> None:
    """However the parameters are grouped, resharded, ignored or offloaded."""
    two(_in_a_layout, name, mode, at)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", list(LAYOUTS)[6:])
def test_every_layout_of_four(name: str, mode: str, at: str, four: Group) -> None:
    """Shards on two ranks, replicas on two others; four shards, some empty, that are gathered by
    two."""
    four(_in_a_layout, name, mode, at)


def _in_low_precision(mode: str, at: str, micro: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def make(model: nn.Module) -> nn.Module:
        return shard(model.float(), mp_policy=policy)

    trainer = Trainer(Loop(micro=micro), local_batch)
    model = compare(mode, at, blocks, make, trainer, None)
    assert all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(("mode", "at"), WAYS)
def test_mixed_precision(mode: str, at: str, micro: int, two: Group) -> None:
    """bfloat16 parameters and gradients, float32 shards and sums: the decay is that of the
    shards."""
    two(_in_low_precision, mode, at, micro)


def _materialised(mode: str, at: str, when: str) -> None:
    from torch.distributed.tensor import distribute_tensor

    def make(attaching: str) -> tuple[nn.Module, wdhook.WeightDecay | None]:
        with torch.device("meta"):
            model = blocks()
        handle = wdhook.attach(model, λ, mode=mode, at=at) if attaching == "on meta" else None
        shard(model)
        if attaching == "sharded on meta":
            handle = wdhook.attach(model, λ, mode=mode, at=at)
        model.to_empty(device="cpu")
        if attaching == "materialised":
            handle = wdhook.attach(model, λ, mode=mode, at=at)
        with torch.no_grad():
            for p, full in zip(model.parameters(), blocks().parameters(), strict=True):
                p.copy_(distribute_tensor(full, p.device_mesh, p.placements))
        return model, handle

    trainer = Trainer(Loop(micro=2, clip=0.05), local_batch, syncing)
    model, handle = make(when)
    trainer.play_attached(model, mode)
    late = (
        when == "on meta"
    )  # `to_empty` swaps sharded parameters for others, which keeps their hooks
    assert_same_shards(model, reference(mode, at, lambda: make("")[0], trainer, late))
    assert_whole_is_close(
        model, reference(mode, at, blocks, replace(trainer, part=lambda batch: batch), late)
    )
    assert handle is not None
    assert reasons(handle.plan) == reasons(wdhook.plan(blocks(), λ))
    handle.remove()
    assert_clean(model)


@pytest.mark.parametrize("when", ["on meta", "sharded on meta", "materialised"])
@pytest.mark.parametrize(("mode", "at"), WAYS)
def test_a_model_made_on_meta(mode: str, at: str, when: str, two: Group) -> None:
    """Parameters without storage, attached before they are sharded, before they are materialised,
    and after."""
    two(_materialised, mode, at, when)


def _scaled(at: str) -> None:
    scaler, its = (
        torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)
    )
    model = shard(blocks())
    with wdhook.attach(model, λ, at=at, scaler=scaler):
        play_scaled(
            model, torch.optim.Adam(model.parameters(), lr=0.01), scaler, local_batch, (1, 2)
        )
    other = shard(blocks())
    play_scaled(other, torch.optim.Adam(own_groups(other), lr=0.01), its, local_batch, (1, 2))
    assert scaler.get_scale() == its.get_scale() < 4096
    assert_same_shards(model, other)


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_scaled_loss(at: str, two: Group) -> None:
    """A `GradScaler` that skips after an overflow on one rank, and grows: S·λ·p is added to the
    sharded gradients."""
    two(_scaled, at)
