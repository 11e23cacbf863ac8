"""Runs a model without side effects: on copies of what it holds, with random states restored."""

from __future__ import annotations

import gc
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .._base.errors import WdhookWarning
from .copies import Copies
from .nested import tensors_in

__all__ = ["isolated", "tensors_in"]


@contextmanager
def isolated(model: nn.Module, copies: Copies) -> Iterator[None]:
    """Exchange what a model holds for copies, and put the originals back at the end.

    The exchanged parameters are other leaves: no gradient reaches those of the model, and none
    of their hooks runs. The fields of objects that the model holds, of its classes, and of
    modules in lists or dicts are exchanged too.

    Not put back: values in closures, files, and values that forward hooks write elsewhere.

    Warns:
        WdhookWarning: a generator that the model holds has run; Python cannot run it back.
    """
    with ExitStack() as stack:
        stack.callback(copies.undo)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_uncompiled())
        for module in model.modules():
            copies.of(module)
        for module in model.modules():
            if "_compiled_call_impl" in vars(module):
                # Set by `module.compile()`. A trace needs the operations.
                vars(module)["_compiled_call_impl"] = None
        stack.enter_context(_random_state_kept({t.device for t in copies.tensors()}))
        yield
    advanced = copies.advanced()
    if advanced:
        warnings.warn(
            "The forward pass of the audit has advanced a generator that the model holds, "
            f"and Python cannot run it back.\n  generator: {', '.join(advanced)}",
            WdhookWarning,
            stacklevel=2,
        )


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector of cycles: copies and marks are many, and each is needed to the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _uncompiled() -> AbstractContextManager[object]:
    """Let compiled functions run as they were written, so that the trace sees their operations."""
    # Before torch._dynamo is loaded nothing is compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def _random_state_kept(devices: set[torch.device]) -> Iterator[None]:
    """Restore the generators of Python, NumPy (if it is loaded), the CPU and the devices."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy.random")
    arrays = numpy.get_state() if numpy is not None else None
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
            for kind, some in _accelerators(devices).items():
                if kind == "mps":  # one device, which its functions do not take as an argument
                    stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
                    continue
                stack.enter_context(torch.random.fork_rng(devices=some, device_type=kind))
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(arrays)


def _accelerators(devices: set[torch.device]) -> dict[str, list[torch.device]]:
    kinds: dict[str, list[torch.device]] = {}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            kinds.setdefault(device.type, []).append(device)
    return kinds
