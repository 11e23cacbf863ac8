"""Cost by the number of parameters and by the number of elements."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .ratios import hook_case, pass_case
from .timing import side_by_side


@dataclass(frozen=True)
class Point:
    """Seconds of one variant at one size."""

    along: str
    size: int
    variant: str
    seconds: float


def growth(device: torch.device, quick: bool) -> Iterator[Point]:
    """Tensors of 16×16 in growing number; then 8 growing tensors."""
    counts = [100, 300] if quick else [100, 300, 1_000, 3_000, 10_000, 30_000]
    sides = [36, 112] if quick else [36, 112, 354, 1_118, 3_536]
    for count in counts:
        yield from _points("parameters", count, count, (16, 16), device)
    for side in sides:
        yield from _points("elements", 8 * side * side, 8, (side, side), device)


def _points(
    along: str, size: int, count: int, shape: tuple[int, int], device: torch.device
) -> Iterator[Point]:
    runs = max(5, min(30, 200_000 // count, 100_000_000 // size))
    passes = {mode: pass_case(count, shape, mode) for mode in ("coupled", "decoupled")}
    for mode, make in {"hook": hook_case(count, shape), **passes}.items():
        work = make(device, False)
        names = {"one foreach call": f"foreach call, {mode}"}
        for variant, times in side_by_side(work.variants, runs, device).items():
            yield Point(along, size, names.get(variant, variant), times.lower)
        for handle in work.handles:
            handle.remove()
        del work
        gc.collect()
