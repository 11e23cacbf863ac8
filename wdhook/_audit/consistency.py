"""Compares gradients with the function itself, where a stop-gradient may set them apart.

Euler's identity speaks of gradients. Behind ``detach``, ``torch.no_grad``, a straight-through
estimator or a custom autograd function they can be those of another function. One pair of
forward passes, in which every such parameter is scaled a little, compares all of them with their
gradients at once. If the comparison fails, each parameter is doubled by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .invariance import NO_EFFECT, TOO_COARSE, Scale
from .projections import SEED, Projections

DISAGREE = "undecided: outputs and gradients disagree"
_MOST = 16  # parameters that are doubled one by one, at a forward pass each
_MOST_FAINT = 8  # the same, for faint gradients
_FORESEEN = 0.05  # part of the change that a gradient foresees
_TOLERANCE = 10.0

Forward = Callable[[Mapping[str, float]], Sequence[Tensor]]
"""Runs the model with some parameters multiplied by a factor each."""


@dataclass(frozen=True)
class Checked:
    """The scales after the comparison, and the names of the parameters behind a stop-gradient."""

    scales: Mapping[str, Scale]
    stopped: tuple[str, ...] = field(default=())


def checked(
    scales: Mapping[str, Scale],
    suspects: Sequence[str],
    projections: Projections,
    outputs: Sequence[Tensor],
    forward: Forward,
    epsilon: float,
) -> Checked:
    """Compare the verdicts on some parameters with the function itself.

    Args:
        scales: the verdicts from gradients.
        suspects: parameters whose gradient may not be that of the function.
        projections: of the outputs.
        outputs: of the forward pass, detached.
        forward: runs the model again.
        epsilon: machine epsilon of the arithmetic.
    """
    found = _without_rounding(scales, projections, outputs, forward)
    if not suspects:
        return Checked(found)
    tolerance = _TOLERANCE * epsilon ** (1 / 3)
    size = float(len(outputs)) ** 0.5  # each output was divided by its own size
    if _consistent(suspects, scales, projections, forward, epsilon ** (1 / 3), tolerance, size):
        return Checked(found)
    doubled = [name for name in suspects if found[name].invariant is not None]
    for name in doubled[:_MOST]:
        matters = _change(outputs, forward({name: 2.0})) > tolerance
        if matters is found[name].invariant:
            found[name] = _undecided(found[name], DISAGREE)
    for name in doubled[_MOST:]:
        found[name] = _undecided(found[name], DISAGREE)
    return Checked(found, tuple(suspects))


def _without_rounding(
    scales: Mapping[str, Scale],
    projections: Projections,
    outputs: Sequence[Tensor],
    forward: Forward,
) -> dict[str, Scale]:
    """Take back the verdict on a parameter whose faint gradient is made by rounding alone.

    A normalization that leaves only signs (of two samples, of two channels) has no gradient; the
    rounding of its outputs looks like one. Doubling the parameter is exact in binary arithmetic:
    the outputs then stay what they are, where a true gradient of this size moves them.
    """
    found = dict(scales)
    faint = [name for name, scale in scales.items() if scale.faint and scale.invariant is False]
    before = projections.along(outputs) if faint else 0.0
    for name in faint[:_MOST_FAINT]:
        moved = abs(projections.along(forward({name: 2.0})) - before)
        if moved < _FORESEEN * abs(scales[name].slope):
            found[name] = Scale(doubt=NO_EFFECT)
    for name in faint[_MOST_FAINT:]:
        found[name] = _undecided(scales[name], TOO_COARSE)
    return found


def _undecided(scale: Scale, doubt: str) -> Scale:
    return replace(scale, invariant=None, rows=None, doubt=doubt)


def _consistent(
    names: Sequence[str],
    scales: Mapping[str, Scale],
    projections: Projections,
    forward: Forward,
    step: float,
    tolerance: float,
    size: float,
) -> bool:
    """Tell whether gradients foresee a central difference along random changes of all scales."""
    generator = torch.Generator().manual_seed(SEED + 2)
    draws = torch.randn(len(names), generator=generator).tolist()
    changes = dict(zip(names, draws, strict=True))
    more = forward({name: 1 + step * change for name, change in changes.items()})
    less = forward({name: 1 - step * change for name, change in changes.items()})
    difference = (projections.along(more) - projections.along(less)) / (2 * step)
    terms = [change * scales[name].slope for name, change in changes.items()]
    scale = size + math.fsum(map(abs, terms))
    return abs(difference - math.fsum(terms)) <= tolerance * scale


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest relative change of an output."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        finite = torch.isfinite(old) & torch.isfinite(new)
        old, new = old[finite], new[finite]
        norm = float(old.norm())
        if norm > 0:
            worst = max(worst, float((new - old).norm()) / norm)
    return worst
