"""The callback for Lightning, in every loop: bit for bit a fit with torch.optim's own decay."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Group
from torch import nn
from twins import assert_bit_equal, perceptron, twins, λ

import wdhook

pytest.importorskip("lightning.pytorch", reason="needs Lightning")
from lightning.pytorch.plugins import MixedPrecision
from lightning_runs import KINDS, MOMENTS, QUIET, Gan, InBackward, Parts, Regression, ddp, fit

from wdhook.integrations.lightning import WeightDecay

pytestmark = QUIET


def compare(
    mode: str,
    at: str,
    loop: dict[str, Any],
    *,
    fresh: Callable[[], dict[str, Any]] = dict,
    overflows: tuple[int, ...] = (),
    seed: int = 1,
    off: float = 1.0,
) -> nn.Module:
    """Raise unless the callback and a reference without wdhook end with the same parameters.

    Args:
        fresh: makes the arguments of the Trainer that only one Trainer can have.
    """
    net, twin = twins(perceptron())
    kind = KINDS[mode]
    fit(
        Regression(net, kind, 0.0, overflows),
        WeightDecay(λ * off, mode=mode, at=at),
        seed=seed,
        **loop,
        **fresh(),
    )
    if (mode, at) == ("coupled", "backward"):
        fit(Regression(twin, kind, 0.0, overflows), InBackward(), seed=seed, **loop, **fresh())
    else:
        fit(Regression(twin, kind, λ, overflows), seed=seed, **loop, **fresh())
    assert_bit_equal(net.state_dict(), twin.state_dict())
    assert all(p.isfinite().all() for p in net.parameters())
    return net


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.3},
    "clipped by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
    "accumulated, clipped": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
}
AGAIN = "second gradient before the optimizer stepped"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_every_loop(mode: str, at: str, loop: str) -> None:
    """Accumulation and clipping by the Trainer: the optimizer's own decay, or decay by hand."""
    if (mode, at) == ("decoupled", "backward") and "accumulated" in loop:
        with pytest.warns(wdhook.WdhookWarning, match=AGAIN):
            fit(
                Regression(perceptron(), KINDS[mode]),
                WeightDecay(λ, mode=mode, at=at),
                **LOOPS[loop],
            )
    else:
        compare(mode, at, LOOPS[loop])


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(mode: str, at: str) -> None:
    """A λ that is wrong by one percent is seen."""
    with pytest.raises(AssertionError, match="differs by up to"):
        compare(mode, at, LOOPS["plain"], off=1.01)


# Decoupled decay in the backward cannot know that the step will be skipped.
@pytest.mark.parametrize("loop", ["plain", "accumulated, clipped"])
@pytest.mark.parametrize("overflows", [(), (2, 3)], ids=["finite", "overflow"])
@pytest.mark.parametrize(
    ("mode", "at"), [("coupled", "backward"), ("coupled", "step"), ("decoupled", "step")]
)
def test_the_scaler_of_the_precision_plugin(
    mode: str, at: str, overflows: tuple[int, ...], loop: str
) -> None:
    """16-mixed: the callback finds the scaler; clipping and skipped steps change no bit."""

    def fresh() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    compare(mode, at, LOOPS[loop], fresh=fresh, overflows=overflows)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_manual_optimization_with_two_optimizers(mode: str, at: str) -> None:
    """A GAN: each optimizer's step ends the windows of its own parameters only, toggled or not."""
    (g, g2), (d, d2) = (
        twins(perceptron(seed=1)),
        twins(nn.Sequential(nn.Linear(2, 5), *perceptron(seed=2)[3:])),
    )
    clip = (
        1e9 if (mode, at) == ("coupled", "backward") else 0.3
    )  # at "backward" clipping sees the decay
    apart = (mode, at) == (
        "decoupled",
        "backward",
    )  # else one's backward decays the other too early
    fit(Gan(g, d, KINDS[mode], 0.0, clip, apart), WeightDecay(λ, mode=mode, at=at))
    fit(Gan(g2, d2, KINDS[mode], λ, clip, apart))
    assert_bit_equal(g.state_dict(), g2.state_dict())
    assert_bit_equal(d.state_dict(), d2.state_dict())


def check_ddp(mode: str, at: str, loop: dict[str, Any], views: bool) -> None:
    """In a worker: raise unless DDP with the callback equals DDP with decay of another kind."""
    rank = torch.distributed.get_rank()
    net = compare(mode, at, loop, fresh=lambda: ddp(gradient_as_bucket_view=views), seed=1 + rank)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    everywhere = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(everywhere, flat)
    assert torch.equal(*everywhere)


@pytest.mark.parametrize("views", [False, True], ids=["copies", "views"])
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_ddp(two: Group, mode: str, at: str, views: bool) -> None:
    """strategy="ddp", two processes: the bits of DDP with the optimizer's decay, on both."""
    loop = LOOPS["clipped" if (mode, at) == ("decoupled", "backward") else "accumulated"]
    # An even number, so that the first gradient of each step is a local one for decay by hand too.
    two(check_ddp, mode, at, {**loop, "limit_train_batches": 6}, views)


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_trainer_of_the_other_package(mode: str, at: str) -> None:
    """`pytorch_lightning`, the same under its older name, takes the callback too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the framework's imports
        other = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    net, twin = twins(perceptron())
    module = type("Module", (Parts, other.LightningModule), {})
    fit(module(net, KINDS[mode]), WeightDecay(λ, mode=mode, at=at), package=other)
    fit(module(twin, KINDS[mode], λ), package=other)
    assert_bit_equal(net.state_dict(), twin.state_dict())
