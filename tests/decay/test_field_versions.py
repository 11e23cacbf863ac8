"""Gradients that change without a version, share one, or are summed out of place."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from field import (
    DECAY,
    LR,
    RIGHT,
    RIGHT_OR_TOLD,
    Brittle,
    PlannedError,
    both_moments,
    chain,
    check,
    dyadic,
    everywhere,
    lines,
    pull,
    sgd,
)
from torch import nn

# Writes that leave no version ----------------------------------------------------------------


@everywhere
def test_gradients_are_written_through_data(mode: str, at: str) -> None:
    """New gradients come by `p.grad.data.copy_(new)`, which does not change the version of
    `p.grad`.

    Evolution strategies, parameter servers. Each step has a new gradient and needs its decay. A
    gradient that is stepped again as it is looks the same to who reads versions; then it has to be
    said, as it is for CUDA graphs.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        yield model
        for _ in range(3):
            for p in model.parameters():
                p.grad.data.copy_(torch.full_like(p, 0.25))
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT_OR_TOLD if mode == "coupled" else RIGHT)


def test_a_hand_written_loop_that_zeroes_through_data() -> None:
    """`p.data.sub_(lr * p.grad.data)`, `p.grad.data.zero_()`: the loop of many tutorials
    (pytorch-examples#3).

    Coupled at "backward" promises an optimizer that is no torch Optimizer: each iteration's
    gradient holds λ·p.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        decay.attach(model)
        yield model
        for _ in range(4):
            pull(model).backward()
            decay.now()
            for p in model.parameters():
                p.data.sub_(LR * p.grad.data)
                p.grad.data.zero_()
            yield model

    check(loop, RIGHT_OR_TOLD)


@pytest.mark.parametrize("zero", ["None", "zero_()"])
def test_a_hand_written_loop_and_decoupled_decay(zero: str) -> None:
    """A hand-written SGD; decoupled at "backward" with `lr=` a number.

    Docs, "an optimizer that is no torch Optimizer": works "with lr= as a number". There is no
    object that could be given as `optimizer=`, so a warning that asks for it is of no use.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        decay.attach(model, mode="decoupled", at="backward", lr=LR)
        yield model
        for _ in range(4):
            pull(model).backward()
            decay.now()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(LR * p.grad)
                    p.grad = None if zero == "None" else p.grad.zero_()
            yield model

    check(loop, RIGHT_OR_TOLD, untrue=("give it as `optimizer=`",))


# Slices of one buffer, and neighbours as witnesses -------------------------------------------


def slices(model: nn.Module) -> torch.Tensor:
    """Let all gradients be slices of one buffer, which is returned."""
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params))
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    return flat


@pytest.mark.parametrize("what", ["raises", "is thrown away"])
def test_slices_of_one_buffer_and_a_backward_pass_that_does_not_count(what: str) -> None:
    """Gradients are slices of one flat buffer; a backward pass reaches the first parameter and
    raises (or is discarded); the buffer is zeroed in place, and the pass is done again. Coupled at
    "backward": each parameter is decayed once.
    """

    def loop(decay: Any) -> Any:
        model = lines(3)
        optimizer = sgd(model.parameters())
        decay.attach(model, optimizer=optimizer)
        flat = slices(model)
        first, second, _ = model.parameters()
        yield model
        if what == "raises":
            with contextlib.suppress(PlannedError):
                (Brittle.apply(second * 0.25) + first * 0.25).sum().backward()
        else:
            (first * 0.25).sum().backward()
        flat.zero_()
        pull(model).backward()
        decay.now()
        optimizer.step()
        yield model

    check(loop, RIGHT_OR_TOLD)


class Gated(nn.Module):
    """A layer beside a gate that is zero and whose gradient is zero (adaLN-Zero, an expert that is
    not routed to).
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2, bias=False)
        self.head = nn.ModuleDict(
            {"fc": nn.Linear(2, 2, bias=False), "gate": nn.Linear(2, 2, bias=False)}
        )
        nn.init.zeros_(dyadic(self).head["gate"].weight)

    def loss(self) -> torch.Tensor:
        return (
            0.25 * self.body.weight.sum()
            + 0.0 * self.head["gate"].weight.sum()
            + 0.25 * self.head["fc"].weight.sum()
        )


@both_moments
def test_a_zero_neighbour_and_clipping_after_each_micro_batch(at: str) -> None:
    """Two micro-batches, `clip_grad_norm_` after each; one parameter is 0 and has a gradient of 0.

    Clipping changes gradients in place, and the zero gradient is no proof that all were zeroed: one
    decay. (The bound of the norm is never reached.)
    """

    def loop(decay: Any) -> Any:
        model = Gated()
        optimizer = sgd(model.parameters())
        decay.attach(model, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                model.loss().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1024.0)
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT_OR_TOLD)


@both_moments
@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_and_a_loss_that_is_linear(at: str) -> None:
    """Three micro-batches with `backward(create_graph=True)` of a loss that is linear in the
    weights (a WGAN critic).

    Autograd adds out of place then, and the sum has no graph. One step, one decay.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        decay.attach(model, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                pull(model).backward(create_graph=True)
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT_OR_TOLD)


@pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="this torch has no grad_dtype")
@both_moments
def test_a_gradient_of_lower_precision_than_its_parameter(at: str) -> None:
    """`p.grad_dtype = torch.bfloat16` for a float32 parameter (pytorch/pytorch#158709).

    torch.optim's weight_decay adds λ·p in float32. Added into the bfloat16 buffer it is rounded:
    equal, or told.
    """

    def loop(decay: Any) -> Any:
        model = nn.Sequential(nn.Linear(3, 2, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(1, 7).view(2, 3) / 7)
        model[0].weight.grad_dtype = torch.bfloat16
        optimizer = sgd(model.parameters(), weight_decay=DECAY if decay.by_hand else 0.0)
        if not decay.by_hand:
            decay.attach(model, at=at, optimizer=optimizer)
        yield model
        model(torch.tensor([[1.0, 0.5, 0.25]])).square().sum().backward()
        optimizer.step()
        yield model

    check(loop, RIGHT_OR_TOLD)
