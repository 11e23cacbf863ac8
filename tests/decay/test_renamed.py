"""Parameters that get other names after `attach`: parametrized, normalized, pruned, and back."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from phases import MODES, Change, attached, in_phases, own, plain
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import remove_parametrizations
from twins import LR, assert_bit_equal, perceptron, twins, λ

import wdhook

LAYERS = (0, 3, 5)  # the linear ones

# The ways to rename a weight, and the way back.
CHANGES: dict[str, tuple[Change, Change]] = {
    "weight_norm": (parametrizations.weight_norm, lambda m: remove_parametrizations(m, "weight")),
    "spectral_norm": (
        parametrizations.spectral_norm,
        lambda m: remove_parametrizations(m, "weight"),
    ),
    "orthogonal": (parametrizations.orthogonal, lambda m: remove_parametrizations(m, "weight")),
    "older weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "older spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruning": (
        lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
        lambda m: prune.remove(m, "weight"),
    ),
}
CHANGED = pytest.mark.parametrize("name", CHANGES)
OLDER = pytest.mark.filterwarnings(
    "ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning"
)
DECAYED = re.compile(r"[035]\.(weight|weight_orig|weight_v|parametrizations\.weight\.original1?)")


def every_layer(change: Change) -> Change:
    """`change` of all linear layers, with the same random numbers each time."""

    def changed(model: nn.Module) -> None:
        torch.manual_seed(7)
        for layer in LAYERS:
            change(model[layer])

    return changed


def groups_by_name(model: nn.Module) -> list[dict[str, Any]]:
    """Hand-made param groups: what carries the weights, under any name."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if DECAYED.fullmatch(n)], "weight_decay": λ},
        {"params": [p for n, p in named if not DECAYED.fullmatch(n)], "weight_decay": 0.0},
    ]


@OLDER
@CHANGED
@MODES
def test_changed_after_attach_and_changed_back(mode: str, at: str, name: str) -> None:
    """What carries the weight is decayed, under its new name and again under the old one;
    magnitudes are not."""
    changes = tuple(every_layer(change) for change in CHANGES[name])
    model, twin = twins(perceptron())
    with attached(model, mode, at):
        in_phases(model, changes, plain(mode))
    in_phases(twin, changes, own(mode, groups_by_name))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@OLDER
@CHANGED
def test_the_comparison_can_fail(name: str) -> None:
    """Without decay in the changed phase, parameters end elsewhere."""
    changes = tuple(every_layer(change) for change in CHANGES[name])
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ) as handle:
        in_phases(model, (), plain("coupled"))
        with handle.paused():
            in_phases(model, changes[:1], plain("coupled"))
    in_phases(twin, (), own("coupled", groups_by_name))
    in_phases(twin, changes[:1], own("coupled", groups_by_name))
    with pytest.raises(AssertionError, match="differs by"):
        assert_bit_equal(model.state_dict(), twin.state_dict())


def λs_of_weights(model: nn.Module, handle: wdhook.WeightDecay) -> list[float]:
    """λ of what carries the three weights, under the names of now."""
    return [
        handle.plan[n].weight_decay for n, _ in model.named_parameters() if DECAYED.fullmatch(n)
    ]


OVERRIDES = {"0.weight": 0.0, "3.weight": 0.25}


@OLDER
@CHANGED
@pytest.mark.parametrize("at", ["backward", "step"])
def test_an_exemption_and_an_absolute_λ_survive_new_names(at: str, name: str) -> None:
    """A name in `overrides` goes on to mean its parameter when something renames it; so does a
    schedule's λ."""
    change, back = (every_layer(change) for change in CHANGES[name])
    model = perceptron()
    with wdhook.attach(model, λ, at=at, overrides=OVERRIDES) as handle:
        in_phases(model, (change,), plain("coupled"))
        assert λs_of_weights(model, handle) == [0.0, 0.25, λ]
        handle.weight_decay = 0.5
        in_phases(model, (back,), plain("coupled"))
        assert λs_of_weights(model, handle) == [0.0, 0.25, 0.5]


@OLDER
@CHANGED
@pytest.mark.parametrize("at", ["backward", "step"])
def test_an_exemption_survives_the_way_back(at: str, name: str) -> None:
    """So it is with a name that was new when `attach` saw it, and goes when the change is
    undone."""
    change, back = (every_layer(change) for change in CHANGES[name])
    model = perceptron()
    change(model)
    carriers = [n for n, _ in model.named_parameters() if DECAYED.fullmatch(n)]
    overrides = dict(zip(carriers, (0.0, 0.25), strict=False))
    with wdhook.attach(model, λ, at=at, overrides=overrides) as handle:
        in_phases(model, (back,), plain("coupled"))
        assert λs_of_weights(model, handle) == [0.0, 0.25, λ]


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_container_that_died_and_modules_that_came_later(at: str) -> None:
    """attach(nn.ModuleList([a, b]), λ): layers and parametrizations that a and b get later are
    found all the same."""
    body, head = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)
    container = nn.ModuleList([body, head])
    wdhook.attach(container, λ, mode="decoupled", at=at, lr=LR, overrides={"1.weight": 0.25})
    del container
    gc.collect()
    body.append(nn.Linear(4, 4))
    parametrizations.spectral_norm(head)
    found = [body[0].weight, body[1].weight, head.parametrizations.weight.original]
    before = [p.detach().clone() for p in found]
    for param in found:
        param.grad = torch.zeros_like(param)
    torch.optim.SGD([*body.parameters(), *head.parameters()], lr=LR).step()
    for param, old, value in zip(found, before, (λ, λ, 0.25), strict=True):
        assert torch.equal(param, old * (1 - LR * value))
