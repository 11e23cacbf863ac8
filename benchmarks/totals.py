"""What is no ratio: the time of `attach`, memory, the time of the import, launches on a device."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import wdhook

from .models import Tensors
from .operations import Recorded
from .ratios import DECOUPLED, LR, MOMENTS, λ
from .timing import Variant, side_by_side

WAYS: dict[str, dict[str, str] | None] = {**MOMENTS, **DECOUPLED, "foreach SGD's own decay": None}


@dataclass(frozen=True)
class Total:
    """One number."""

    what: str
    value: float
    unit: str
    at_most: float | None


def totals(device: torch.device, quick: bool) -> Iterator[Total]:
    """All of them."""
    for count, at_most in ((20_000, 0.2), (100_000, 1.0)):
        if quick:
            count //= 100
        yield Total(f"attach, {count:,} parameters", _attach(count), "s", at_most)
    yield from _memories(200 if quick else 5_000)
    size = 64 if quick else 2048
    for name, how in WAYS.items():
        at_most = None if how is None else 0.0
        yield Total(
            f"tensor memory of a step with 4 weights, {name}",
            _added(device, 4, size, how)[1],
            "MiB",
            at_most,
        )
    for name, how in WAYS.items():
        yield Total(
            f"operations of a step with 100 weights, {name}",
            _added(device, 100, 16, how)[0],
            "",
            None,
        )
    runs = 3 if quick else 9
    yield Total("import wdhook after import torch", 1000 * _in_process(_IMPORT, runs), "ms", 15)
    yield Total("first audit of a process", _in_process(_AUDIT, 3), "s", 1)
    if device.type == "cuda":
        for name, how in (MOMENTS | DECOUPLED).items():
            yield Total(
                f"kernel launches for 100 tensors, {name}", _launches(device, how), "", None
            )


def _attach(count: int) -> float:
    """Seconds for a model with every parameter decayed, without the garbage collector."""
    device = torch.device("cpu")
    model = Tensors(count, (1, 1), device)
    handles: list[wdhook.WeightDecay] = []

    def detach() -> None:
        while handles:
            handles.pop().remove()

    attach = Variant(lambda: handles.append(wdhook.attach(model, λ)), detach)
    return side_by_side({"attach": attach}, 7, device)["attach"].lower


def _python_memory(model: nn.Module, register: Callable[[nn.Module], Any]) -> float:
    """Bytes of Python objects that `register` leaves for each parameter.

    Torch's own objects and the plan of a handle are counted too.
    """
    register(copy.deepcopy(model))  # what is allocated once
    gc.collect()
    tracemalloc.start()
    kept = register(model)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return used / len(list(model.parameters()))


def _memories(count: int) -> Iterator[Total]:
    device = torch.device("cpu")

    def bare(model: nn.Module) -> Any:
        def hook(param: Tensor) -> None:
            pass

        return [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]

    def attach(model: nn.Module) -> Any:
        return wdhook.attach(model, λ)

    weights = [
        _python_memory(Tensors(count, (1, 1), device), register) for register in (bare, attach)
    ]
    yield Total(
        "Python memory of a decayed parameter, torch's hook alone", weights[0], "bytes", None
    )
    yield Total(
        "Python memory of a decayed parameter, beyond that", weights[1] - weights[0], "bytes", 600
    )


def _added(
    device: torch.device, count: int, size: int, how: dict[str, str] | None
) -> tuple[int, float]:
    """Operations and MiB added to a backward and an SGD step; `count` weights of `size`²."""
    with_decay, without = (_recorded(device, count, size, how, decay) for decay in (True, False))
    return with_decay.operations - without.operations, (with_decay.bytes - without.bytes) / 2**20


def _recorded(
    device: torch.device, count: int, size: int, how: dict[str, str] | None, decay: bool
) -> Recorded:
    model = Tensors(count, (size, size), device)
    own = λ if how is None and decay else 0.0
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, foreach=True, weight_decay=own
    )
    handle = wdhook.attach(model, λ, **how) if how is not None and decay else None
    for _ in range(2):  # the momentum is made in the first step
        optimizer.zero_grad()
        loss = model.loss()
        with Recorded() as recorded:
            loss.backward()
            optimizer.step()
    if handle is not None:
        handle.remove()
    return recorded


_IMPORT = """
import time, torch
start = time.perf_counter()
import wdhook
print(time.perf_counter() - start)
"""
_AUDIT = """
import time, torch, wdhook
model, batch = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)), torch.ones(2, 4)
start = time.perf_counter()
wdhook.audit(model, batch)
print(time.perf_counter() - start)
"""


def _in_process(program: str, runs: int) -> float:
    """Seconds that a program prints, in new processes that find compiled files, as in an installed
    package."""
    with tempfile.TemporaryDirectory() as compiled:
        environment = {
            key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"
        }
        environment["PYTHONPYCACHEPREFIX"] = compiled
        command = [sys.executable, "-c", program]
        outputs = [
            subprocess.check_output(command, env=environment, text=True) for _ in range(runs)
        ]
    return min(map(float, outputs))


def _launches(device: torch.device, how: dict[str, str]) -> float:
    """Kernels that the decay adds to one backward and step."""
    counts = []
    for attached in (False, True):
        model = Tensors(100, (16, 16), device)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=True)
        handle = wdhook.attach(model, λ, **how) if attached else None
        loss = model.loss()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(
            len([event for event in recorded.events() if event.device_type.name == "CUDA"])
        )
        if handle is not None:
            handle.remove()
    return float(counts[1] - counts[0])
