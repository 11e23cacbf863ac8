"""Times variants in turns in one process: a slow machine slows all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Variant:
    """One way to do a piece of work."""

    work: Callable[[], Any]
    before: Callable[[], Any] = lambda: None
    """Done before each run, and not timed."""


@dataclass(frozen=True)
class Times:
    """The seconds of one variant."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The time that a share `q` of the runs did not exceed."""
        return sorted(self.seconds)[int(q * (len(self.seconds) - 1))]

    @property
    def lower(self) -> float:
        """The lower quartile: what the work costs while nobody disturbs it."""
        return self.quantile(0.25)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the lower one."""
        return self.quantile(0.75) / self.lower - 1


def side_by_side(
    variants: Mapping[str, Variant], runs: int, device: torch.device
) -> dict[str, Times]:
    """Run all variants `runs` times, in turns, each time beginning with another one."""
    clock = _cuda if device.type == "cuda" else _cpu
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for variant in variants.values():  # buffers, caches, lazily made state
        for _ in range(3):
            variant.before()
            clock(variant.work)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for run in range(runs):
            first = run % len(names)
            for name in names[first:] + names[:first]:
                variants[name].before()
                seconds[name].append(clock(variants[name].work))
    finally:
        if collects:
            gc.enable()
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def _cpu(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda(work: Callable[[], Any]) -> float:
    """Device time from events, the launches included: both ends wait for the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
