"""Deferred decay of sharded and of replicated bfloat16 parameters: what one process does, to the
last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import assert_ranks_agree
from processes import Group
from sharded import blocks, needs_dtensor, shard, whole_state
from torch import nn
from twins import assert_bit_equal

import wdhook


def _decay_alone(model: nn.Module, lr: Any, at: str, width: int) -> None:
    """Steps whose gradients are 0, so that the order of no sum matters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, foreach=False)
    with wdhook.attach(model, 0.04, mode="decoupled", at=at, optimizer=optimizer):
        for _ in range(30):
            optimizer.zero_grad()
            (model(torch.ones(2, width, dtype=torch.bfloat16)) * 0).sum().backward()
            optimizer.step()


def _sharded(at: str, on_device: bool) -> None:
    lr = torch.tensor(0.125) if on_device else 0.125
    model, alone = shard(blocks(torch.bfloat16)), blocks(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in alone.named_parameters()}
    width = next(m.in_features for m in alone.modules() if isinstance(m, nn.Linear))
    _decay_alone(model, lr, at, width)
    _decay_alone(alone, 0.125, at, width)
    assert_bit_equal(whole_state(model), whole_state(alone))
    assert any(not torch.equal(p, start[n]) for n, p in alone.named_parameters())


@needs_dtensor
@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("at", ["backward", "step"])
def test_sharded(at: str, on_device: bool, two: Group) -> None:
    """FSDP2: each rank multiplies its shards with the product that one process has."""
    two(_sharded, at, on_device)


def _replicated(at: str) -> None:
    torch.manual_seed(torch.distributed.get_rank())
    model, alone = blocks(torch.bfloat16), blocks(torch.bfloat16)
    width = next(m.in_features for m in alone.modules() if isinstance(m, nn.Linear))
    _decay_alone(nn.parallel.DistributedDataParallel(model), 0.125, at, width)
    _decay_alone(alone, 0.125, at, width)
    assert_ranks_agree(model.state_dict())
    assert_bit_equal(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_replicated(at: str, two: Group) -> None:
    """DDP: the ranks stay equal, whatever their random states are."""
    two(_replicated, at)
