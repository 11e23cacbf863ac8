"""Coupled decay in the backward where ranks or micro-batches are averaged: what makes an average of it wrong."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .._base.errors import LossScaleError, UnreachedError
from . import formulas as arithmetic

if TYPE_CHECKING:
    from .engine import Engine
    from .tracked import Entry, View


def check_replicas(engine: Engine) -> None:
    """Coupled decay in the backward is averaged over ranks: warn where that divides by more than have added it."""
    if engine.replicas is None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        engine.replicas = (
            [weakref.ref(ddp) for ddp in living(DistributedDataParallel)] if several else []
        )
    for ref in engine.replicas:
        ddp = ref()
        if (
            ddp is not None
            and ddp._join_config.enable
            and getattr(ddp, "_divide_by_initial_world_size", False)
        ):
            engine.warn_once(
                "join",
                "Once a rank has run out of inputs, join() divides the gradients of the others, and the decay in them, "
                "by the number of all ranks: that decay is too weak.\n"
                '  Use attach(..., at="step"), or join(divide_by_initial_world_size=False)',
            )


def check_was_reached(engine: Engine, due: Iterable[tuple[Tensor, Tensor, Entry]]) -> None:
    """Raise for coupled decay in the backward that other ranks have added to an average and this one has not.

    With `find_unused_parameters` a parameter that this rank has not used gets the gradients of the others: the hook
    has not run here, and the average holds a part of λ·p only.
    """
    living = [ddp for ref in engine.replicas or () if (ddp := ref()) is not None]
    lenient = [ddp for ddp in living if ddp.find_unused_parameters or ddp.static_graph]
    shared = {id(p) for ddp in lenient for p in ddp.parameters()}
    for param, grad, entry in due:
        # A gradient of zeros is one that no rank has used: all of them decay it now.
        if entry.handle is not None and id(param) in shared and bool(arithmetic.content(grad)):
            raise UnreachedError(
                "A parameter has a gradient from other ranks that its hook in this rank has not seen: the decay that "
                "they added was averaged with nothing from here.\n"
                f"  parameter: {entry.name} {tuple(param.shape)}\n  rank: {torch.distributed.get_rank()}\n"
                "  DistributedDataParallel(..., find_unused_parameters=True) lets ranks use different parameters in a "
                'step. Use attach(..., at="step"), which decays after averaging'
            )


def check_pipeline(view: View) -> None:
    """Coupled decay in the backward must not be divided by a pipeline schedule that averages over micro-batches."""
    schedules = sys.modules.get("torch.distributed.pipelining.schedules")
    owned = {
        id(param): entry.name
        for buckets in view.buckets
        for bucket in buckets
        for param, entry in bucket
    }
    for schedule in living(getattr(schedules, "_PipelineSchedule", ())):
        if not (getattr(schedule, "scale_grads", False) and schedule._n_microbatches > 1):
            continue
        for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
            name = next((owned[id(p)] for p in stage.submod.parameters() if id(p) in owned), None)
            if name is not None:
                raise LossScaleError(
                    "A pipeline schedule divides the gradients by the number of micro-batches, and with them the decay "
                    "that was added in the backward.\n"
                    f"  parameter: {name}\n  schedule: {type(schedule).__name__}(scale_grads=True), "
                    f"{schedule._n_microbatches} micro-batches\n"
                    '  Use attach(..., at="step"), or scale_grads=False with a loss_fn that divides by their number'
                )


def living(kind: type[Any] | tuple[()]) -> Iterator[Any]:
    """Every object of a class that the process holds. Slow; nothing is asked of objects of other classes."""
    return (
        (thing for thing in gc.get_objects() if issubclass(type(thing), kind)) if kind else iter(())
    )
