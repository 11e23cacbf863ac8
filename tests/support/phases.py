"""Training in phases, between which the model or its optimizer changes, with wdhook and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins import LR, assert_bit_equal, batches, own_groups, train, twins, λ

import wdhook

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
Optimize = Callable[[nn.Module], torch.optim.Optimizer]
Groups = Callable[[nn.Module], list[dict[str, Any]]]
Change = Callable[[nn.Module], Any]
MODES = pytest.mark.parametrize(
    ("mode", "at"), [(mode, at) for mode in ("coupled", "decoupled") for at in ("backward", "step")]
)


def plain(mode: str) -> Optimize:
    """An optimizer that leaves the decay to wdhook."""
    kind = SGD if mode == "coupled" else AdamW
    return lambda part: kind(part.parameters(), lr=LR, weight_decay=0)


def own(mode: str, groups: Groups = own_groups) -> Optimize:
    """The same optimizer with the decay of torch.optim on what `groups` says."""
    kind = SGD if mode == "coupled" else AdamW
    return lambda part: kind(groups(part), lr=LR)


def attached(model: nn.Module, mode: str, at: str) -> wdhook.WeightDecay:
    # A number as `lr` needs no optimizer, so that one may be made, remade or extended later.
    lr = LR if mode == "decoupled" else None
    return wdhook.attach(model, λ, mode=mode, at=at, lr=lr, low_precision="round")


def compare(
    model: nn.Module, mode: str, at: str, script: Callable[[nn.Module, Optimize], object]
) -> None:
    """Run `script` with wdhook, and on a copy with torch.optim's decay; raise if a bit differs."""
    model, twin = twins(model)
    with attached(model, mode, at):
        script(model, plain(mode))
    script(twin, own(mode))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def in_phases(model: nn.Module, changes: tuple[Change, ...], optimize: Optimize) -> None:
    """Train, change the model, train with a new optimizer, and so on."""
    for seed, change in enumerate((lambda m: None, *changes)):
        change(model)
        train(model, optimize(model), batches(model, 3, seed=seed))
