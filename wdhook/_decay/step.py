"""Decay at the optimizer step: all of it at "step", and at "backward" whatever no hook has reached."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, compress
from operator import attrgetter
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import formulas as arithmetic
from .engine import Engine
from .formulas import Number
from .optimizers import is_nested_step, only_accumulates
from .rules import check_step, check_unmoved
from .rules_averaging import check_was_reached
from .tracked import Entry, View
from .window import Owner, local_version

Due = tuple[list[Tensor], list[Tensor], list[Entry]]  # parameters, their gradients, their entries
_is_sparse = attrgetter("is_sparse")


def check(engine: Engine, optimizer: Optimizer, view: View, claimed: bool) -> bool:
    """Raise what is wrong with a step, before anything is changed; False where there is nothing to do."""
    if engine.pauses:
        return False
    check_step(engine, optimizer, view, claimed)
    return view.has_entries() and not only_accumulates(optimizer)


def enter(engine: Engine, view: View) -> None:
    """The step of a wrapper begins; that of the optimizer inside will follow."""
    if engine.settings.at == "step" and view.sample is not None:
        engine.outside = view.sample, view.sample.detach().clone()


def is_capturing() -> bool:
    """Whether what runs now goes into a CUDA graph, numbers such as λ as constants."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def begin(engine: Engine, optimizer: Optimizer) -> None:
    """A step begins."""
    if engine.running and not is_nested_step():
        engine.running.clear()  # an earlier one raised, so its end was never heard
    engine.running.append(id(optimizer))
    if is_capturing():
        engine.captured = True


def end(engine: Engine, optimizer: Optimizer) -> None:
    """A step has ended: so have the windows of the parameters that this optimizer owns."""
    if engine.running and engine.running[-1] == id(optimizer):
        engine.running.pop()
    view = engine.known_view(optimizer)
    if view is not None and view.wraps:
        engine.outside = None
    if (
        view is not None
        and view.has_entries()
        and not (only_accumulates(optimizer) or _was_skipped(engine, optimizer))
    ):
        view.owner.steps += 1
        engine.steps += not engine.running  # a step within a step is not another one
        if id(optimizer) not in engine.running:  # as super().step() is
            engine.advance(optimizer, view)
            for snapshot in list(engine.watchers):
                snapshot.note_step(view)
        _let_gradients_be_swapped(view)


def _was_skipped(engine: Engine, optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler has skipped this step on the device.

    It matters where the parameters were shrunk in the backward: their window stays open. Reading the flag costs a
    synchronisation, as it does the scaler with an optimizer that is not fused.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or engine.settings.mode == "coupled" or engine.settings.at == "step":
        return False
    return bool(found_inf)


def _let_gradients_be_swapped(view: View) -> None:
    """Where converting a model swaps tensors: `torch.utils.swap_tensors` refuses those with weak references."""
    everywhere = torch.__future__.get_swap_module_params_on_conversion()
    for bucket in chain.from_iterable(view.buckets):
        if everywhere or not arithmetic.is_plain(bucket[0][0]):
            for _, entry in bucket:
                entry.buffer = None


def decay(engine: Engine, optimizer: Optimizer, view: View, evaluated: bool) -> None:
    """Decay what has a gradient and was not decayed in this window.

    Args:
        evaluated: the closure of the step has just run; it may run again before the step ends.
    """
    if engine.pauses:
        return
    if evaluated and engine.settings.at == "step":
        check_unmoved(engine, optimizer, view)
    coupled, hooked = engine.settings.mode == "coupled", engine.settings.at == "backward"
    with torch.no_grad():
        for index, (group, buckets) in enumerate(
            zip(optimizer.param_groups, view.buckets, strict=True)
        ):
            for bucket in buckets:
                first = bucket[0][1]  # all of a bucket have its λ
                due = _due(engine, view.owner, bucket, evaluated) if first.alpha else ([], [], [])
                if not due[0] or _was_skipped(engine, optimizer):
                    continue
                if hooked:
                    _warn_of_unheard_backward(engine, view, due)
                if coupled and hooked:
                    check_was_reached(engine, zip(*due, strict=True))
                if coupled:
                    _add(engine, optimizer, due, first.alpha)
                else:
                    _multiply(
                        engine,
                        optimizer,
                        due,
                        engine.factor(view, index, group, first.weight_decay),
                    )
                _mark(view.owner, due)
                for param, entry in zip(due[0], due[2], strict=True) if hooked else ():
                    if entry.handle is None:
                        engine.track(
                            entry.name, param
                        )  # unfrozen since: from now on in its backward


def _mark(owner: Owner, due: Due) -> None:
    """`Window.mark` for many, without a call for each."""
    _, grads, entries = due
    for grad, entry in zip(grads, entries, strict=True):
        entry.stamp = owner.steps
        entry.buffer = ref(grad)
        entry.version = grad._version
        if type(grad) is not Tensor:
            entry.local = local_version(grad)


def _due(
    engine: Engine, owner: Owner, bucket: Iterable[tuple[Tensor, Entry]], evaluated: bool
) -> Due:
    params: list[Tensor] = []
    grads: list[Tensor] = []
    entries: list[Entry] = []
    hooked = engine.settings.at == "backward"
    coupled = engine.settings.mode == "coupled"
    for param, entry in bucket:
        grad = param.grad
        if grad is None:
            continue
        if entry.owner is not owner:
            entry.move(owner)
        if entry.stamp == owner.steps:
            if _is_done(engine, grad, entry, evaluated):
                continue
            entry.reopen()
        elif (
            coupled
            and entry.buffer is not None
            and entry.buffer() is grad
            and entry.version == grad._version
        ):
            entry.stamp = (
                owner.steps
            )  # stepped again as it is: the decay of the last step is in it still
            if _may_be_replayed(grad):
                if hooked:
                    engine.captured = (
                        True  # in the backward pass, which has not run since: λ is a constant in it
                    )
                else:
                    _warn_of_replay(engine, entry)
            continue
        params.append(param)
        grads.append(grad)
        entries.append(entry)
    return params, grads, entries


def _may_be_replayed(grad: Tensor) -> bool:
    """Whether a CUDA graph may have written a new gradient into the buffer: that leaves no trace in its version."""
    return grad.is_cuda


def _warn_of_replay(engine: Engine, entry: Entry) -> None:
    engine.warn_once(
        "replay",
        "A gradient was stepped again, and nothing but the last decay seems to have changed it: it is taken to hold "
        "that decay still. If a CUDA graph has written a new gradient into it, that one is not decayed.\n"
        f"  parameter: {entry.name}\n"
        '  Capture the step with the backward pass, or use attach(..., at="backward"), whose decay is in the graph',
    )


def _warn_of_unheard_backward(engine: Engine, view: View, due: Due) -> None:
    """No hook has run since the last step, and yet something has changed a gradient in the buffer of an earlier one."""
    _, (grad, *_), (entry, *_) = due
    if (
        entry.handle is None
        or entry.buffer is None
        or entry.buffer() is not grad
        or not _may_be_replayed(grad)
    ):
        return
    if not any(
        other.decayed for bucket in chain.from_iterable(view.buckets) for _, other in bucket
    ):
        engine.captured = True
        engine.warn_once(
            "unheard",
            "A gradient has changed since the last step, and no backward pass was heard: it is decayed now. If a CUDA "
            "graph replays the backward pass, the decay is in the graph too, and this one is too much.\n"
            f"  parameter: {entry.name}\n"
            '  Capture the step with the backward pass, or use attach(..., at="step")',
        )


def _is_done(engine: Engine, grad: Tensor, entry: Entry, evaluated: bool) -> bool:
    """Whether the decay that this window has seen is in the gradient that the step will read."""
    if engine.settings.mode != "coupled":
        return True
    same = entry.buffer() is grad
    if (
        engine.settings.at == "step" or entry.handle is None
    ):  # frozen when it was decayed, and no hook has heard since
        # What a step does to its gradients before it calls another one is that optimizer's business; but a
        # closure that ran again, or a step after one that raised, brings new gradients.
        nested = len(engine.running) > 1 and not evaluated
        return nested or (same and entry.version == grad._version)
    if same:
        entry.version = grad._version
        return True
    if not grad._is_view():
        engine.warn_once(
            "replaced",
            "A gradient was replaced between its decay and the optimizer step. It is taken to be derived from "
            "the one that was decayed, so it is not decayed again.\n"
            f"  parameter: {entry.name}\n"
            '  If it is a new one, use attach(..., at="step")',
        )
    entry.mark(grad)  # stepped again as it is, it holds its decay still
    return True


def _add(engine: Engine, optimizer: Optimizer, due: Due, alpha: float) -> None:
    # A fused optimizer under a GradScaler un-scales inside its kernel: its gradients are scaled still.
    scale = getattr(optimizer, "grad_scale", None)
    (params, grads, _), sparse = _split(due)
    arithmetic.add_all_(
        grads, params, alpha, scale, arithmetic.use_foreach(engine.settings.foreach, params)
    )
    for param, grad, entry in zip(*sparse, strict=True):
        rows = entry.rows if entry.decayed else None
        entry.rows = arithmetic.add_rows_(grad, param, arithmetic.scaled(alpha, scale), rows)


def _multiply(engine: Engine, optimizer: Optimizer, due: Due, by: Number) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        by = arithmetic.unless(found_inf, by)
    (params, _, _), sparse = _split(due)
    arithmetic.mul_all_(params, by, arithmetic.use_foreach(engine.settings.foreach, params))
    for param, grad, _ in zip(*sparse, strict=True):
        arithmetic.mul_rows_(grad, param, by, None)


def _split(due: Due) -> tuple[Due, Due]:
    """Those whose gradient is dense, and those whose gradient is sparse."""
    _, grads, _ = due
    sparse = list(map(_is_sparse, grads))
    if not any(sparse):
        return due, ([], [], [])
    dense = [not kind for kind in sparse]
    return tuple(tuple(list(compress(column, kind)) for column in due) for kind in (dense, sparse))  # type: ignore[return-value]
