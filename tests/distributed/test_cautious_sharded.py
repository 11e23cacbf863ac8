"""Cautious decay of sharded parameters: each rank compares its own shards."""

from __future__ import annotations

from typing import Any

import torch
from processes import Group
from sharded import blocks, needs_dtensor, shard, whole_state
from torch import nn
from twins import LR, assert_bit_equal, λ

import wdhook

pytestmark = needs_dtensor


def _train(model: nn.Module, **how: Any) -> nn.Module:
    """The same batch on each rank: the mean of two equal gradients is that gradient to the last
    bit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    with wdhook.attach(model, λ, mode="decoupled", at="step", **how):
        for _ in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, 4, dtype=torch.float64, generator=generator)
            model(x).square().mean().backward()
            optimizer.step()
    return model


def _sharded() -> None:
    alone = _train(blocks(), cautious=True).state_dict()
    assert_bit_equal(whole_state(_train(shard(blocks()), cautious=True)), alone)
    everywhere = _train(blocks()).state_dict()
    assert any(not torch.equal(alone[name], everywhere[name]) for name in alone)


def test_sharded(two: Group) -> None:
    """FSDP2: to the last bit what one process does, without communication about the masks."""
    two(_sharded)
