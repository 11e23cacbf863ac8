"""Scale invariance by Euler's identity: where f(αw) = f(w) for all α > 0, ⟨w, ∂L/∂w⟩ = 0 for every loss L.

With ``L = ⟨r, f⟩`` for a random r, one backward pass asks all parameters at once. In terms of the Jacobian J of the
outputs, ``⟨w, g⟩ = ⟨r, J w⟩`` has the standard deviation ``‖J w‖``, and ``E‖g‖² = ‖J‖²`` (Frobenius). For a
direction v of random entries, ``E‖J v‖² = ‖J‖² ‖v‖² / n``. So the *sensitivity*

    s = √n · |⟨w, g⟩| / (‖w‖ · ‖g‖)

is of the order of 1 for a weight whose scale matters as much as an average direction, whatever its size n, and 0
for a weight whose scale does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .projections import Projections

_LEAKS = 10.0  # ⟨r, Jw⟩ is normally distributed: ten standard deviations
_BY_CHANCE = (2 / math.pi) ** 0.5  # P(|N(0, 1)| < τ) ≤ √(2/π)·τ
_NEGLIGIBLE = 1e-4  # probability that chance makes any weight or row of a model look invariant
_MOST = 8  # projections
_CANCELLED = 1e3  # rounding of a sum of 1e6 terms that cancels, in units of machine epsilon: √1e6
_INDEPENDENT = 1e-3  # part of a gradient that the earlier projections do not span
_ANOTHER_FACTOR = 1.1  # no power of two: all roundings change
_REPRODUCED = 0.1  # relative change of a gradient above which rounding is all of it
_ROUNDING = 10.0  # an s is told from 0 above ten times its rounding error

NOT_MEASURED = "not measured"
NO_GRADIENT = "no gradient"
NO_EFFECT = "no effect on the outputs"
TOO_FEW = "undecided: chance cannot be excluded"
TOO_COARSE = "undecided: eps or rounding hides it"


@dataclass(frozen=True, slots=True)
class Scale:
    """The evidence of the backward passes about the scale of one parameter.

    Attributes:
        sensitivity: s as above, the largest of the projections; None where the outputs do not depend on
            the parameter at all.
        invariant: whether the outputs do not depend on the scale of the parameter; None without a verdict.
        rows: (number of output channels that are invariant one by one, number with a verdict), or None.
        doubt: the reason why there is no verdict; empty where there is one.
        slope: ⟨w, g⟩ of the first projection.
    """

    sensitivity: float | None = None
    invariant: bool | None = None
    rows: tuple[int, int] | None = None
    doubt: str = NO_GRADIENT
    slope: float = 0.0


def threshold(epsilon: float, leak: float) -> float:
    """Return the s below which a parameter may count as invariant.

    Args:
        epsilon: machine epsilon of the arithmetic.
        leak: the part of eps that could not be removed, see `EpsWatch.leak`.

    Of an invariant weight, s is the relative rounding error of its gradient, plus what the eps of the
    normalization leaks. √epsilon is exceeded by the first only when half of all digits are lost in the backward
    pass. The second is a normal variable whose standard deviation is the leak. Of a weight whose scale matters,
    s is about |N(0, 1)|: each independent projection is below τ by chance with a probability of 0.8·τ.
    """
    return math.sqrt(epsilon) + _LEAKS * leak


def scales(
    projections: Projections,
    leaves: Mapping[str, Tensor],
    axes: Mapping[str, int],
    epsilon: float,
    leak: float,
) -> dict[str, Scale]:
    """Measure the scale of each leaf: from one projection, and from more while chance is not excluded.

    Args:
        projections: of the outputs that depend on the leaves.
        leaves: name → parameter.
        axes: name → axis of the output channels, for parameters whose rows are measured too.
        epsilon: machine epsilon of the arithmetic.
        leak: as for `threshold`.
    """
    found = dict.fromkeys(leaves, Scale())
    gradients = projections.gradients(list(leaves))
    effects = _effects(leaves, gradients)
    largest = max(effects.values(), default=0.0)
    floor = (_CANCELLED * epsilon + leak) * largest
    moving = [name for name, effect in effects.items() if effect > floor]
    for name in effects.keys() - moving:
        found[name] = Scale(doubt=NO_EFFECT)
    faint = [name for name in moving if effects[name] <= math.sqrt(epsilon) * largest]
    rounding = _rounding(projections, gradients, faint)
    evidence = {
        name: Evidence(leaves[name], axes.get(name), floor)
        for name in moving
        if rounding.get(name, 0.0) < _REPRODUCED
    }
    for name in faint:
        if name not in evidence:
            found[name] = Scale(doubt=NO_EFFECT)
    limit = threshold(epsilon, leak)
    _collect(projections, evidence, gradients, limit)
    tests = sum(1 + one.rows for one in evidence.values())
    for name, one in evidence.items():
        found[name] = one.verdict(limit, tests, rounding.get(name, 0.0))
    return found


def _collect(
    projections: Projections,
    evidence: Mapping[str, Evidence],
    gradients: Mapping[str, Tensor],
    limit: float,
) -> None:
    """Add projections to the evidence until it decides, or no direction of the outputs is left."""
    for name, one in evidence.items():
        one.add(gradients[name])
    tests = sum(1 + one.rows for one in evidence.values())
    for _ in range(1, min(_MOST, projections.dimensions)):
        doubted = [name for name, one in evidence.items() if one.in_doubt(limit, tests)]
        if not doubted or limit >= 1:
            return
        more = projections.gradients(doubted)
        grown = [evidence[name].add(more[name]) for name in doubted if name in more]
        if not any(grown):
            return


def _rounding(
    projections: Projections, gradients: Mapping[str, Tensor], names: list[str]
) -> dict[str, float]:
    """Return the relative rounding error of some gradients.

    The projection is repeated with another factor: a gradient is multiplied by the factor, and what
    rounding has made is another draw.
    """
    if not names:
        return {}
    again = projections.repeated(names, _ANOTHER_FACTOR)
    found = {}
    for name in names:
        if name not in again:
            continue
        change = (again[name] / _ANOTHER_FACTOR - gradients[name]).norm()
        found[name] = float(change / gradients[name].norm())
    return found


def _effects(leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖w‖·‖g‖ for each gradient that is finite: the effect of changing w by its own size.

    Where the effect is rounding noise next to the largest of the model, the outputs do not depend on w at
    all: a bias before a BatchNorm, the bias of keys before a softmax.
    """
    names = list(gradients)
    if not names:
        return {}
    weights = torch._foreach_norm([leaves[name].detach() for name in names])
    slopes = torch._foreach_norm([gradients[name] for name in names])
    device = weights[0].device
    sizes = torch.stack([norm.real.double().to(device) for norm in (*weights, *slopes)]).tolist()
    products = zip(names, sizes[: len(names)], sizes[len(names) :], strict=True)
    effects = {name: w * g for name, w, g in products}
    return {name: effect for name, effect in effects.items() if math.isfinite(effect)}


class Evidence:
    """The projections of one parameter, of the whole and of each row.

    Only the part of a gradient counts that the earlier projections do not span: where the parameter
    acts on a scalar loss alone, every projection is a multiple of the first and adds nothing.

    Args:
        weight: the parameter.
        axis: of the rows; None without rows.
        floor: effect ‖w‖·‖g‖ below which a row does not act on the outputs.
    """

    def __init__(self, weight: Tensor, axis: int | None, floor: float) -> None:
        weight = _real(weight.detach())
        self._floor = floor
        self._axis = axis if axis is not None and weight.dim() > 1 else None
        self._whole = Directions(weight.reshape(1, -1))
        self._parts: Directions | None = None
        self._live: Tensor | None = None
        self._rows_of = weight
        self.rows = 0 if self._axis is None else weight.shape[self._axis]

    def add(self, gradient: Tensor) -> bool:
        """Add the gradient of one projection; tell whether it was independent of the earlier ones."""
        gradient = _real(gradient)
        grown = bool(self._whole.add(gradient.reshape(1, -1)).any())
        if self._axis is None:
            return grown
        rows = gradient.movedim(self._axis, 0).flatten(1)
        if self._parts is None:
            weight = self._rows_of.movedim(self._axis, 0).flatten(1)
            self._parts = Directions(weight)
            self._live = weight.norm(dim=1) * rows.norm(dim=1) > self._floor
        return bool(self._parts.add(rows).any()) or grown

    def in_doubt(self, limit: float, tests: int) -> bool:
        """Tell whether the whole or a row looks invariant, and chance is not excluded."""
        return any(
            bool(directions.in_doubt(limit, tests, live).any())
            for directions, live in ((self._whole, None), (self._parts, self._live))
            if directions is not None
        )

    def verdict(self, limit: float, tests: int, rounding: float) -> Scale:
        """Return the verdict on the evidence so far.

        Args:
            limit: see `threshold`.
            tests: number of weights and rows of the model that are asked at once.
            rounding: relative rounding error of the gradient.
        """
        sensitivity, slope = float(self._whole.largest), float(self._whole.slopes)
        hidden = limit < sensitivity <= _ROUNDING * rounding
        if limit >= 1 or hidden:
            return Scale(sensitivity, None, None, TOO_COARSE, slope)
        rows = self._row_counts(limit, tests)
        if bool(self._whole.in_doubt(limit, tests, None).any()):
            return Scale(sensitivity, None, rows, TOO_FEW, slope)
        return Scale(sensitivity, sensitivity <= limit, rows, "", slope)

    def _row_counts(self, limit: float, tests: int) -> tuple[int, int] | None:
        if self._parts is None or self._live is None:
            return None
        decided = self._live & ~self._parts.in_doubt(limit, tests, self._live)
        invariant = decided & (self._parts.largest <= limit)
        return int(invariant.sum()), int(decided.sum())


class Directions:
    """The sensitivities of m vectors in several projections.

    Attributes:
        largest: the largest sensitivity of each vector.
        slopes: ⟨w, g⟩ of each vector in the first projection.

    Args:
        weights: of shape (m, n).
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._sizes = weights.norm(dim=1)
        self._spanned: list[Tensor] = []
        self.largest = weights.new_zeros(len(weights))
        self.slopes = self.largest
        self._count = torch.zeros(len(weights), dtype=torch.long, device=weights.device)

    def add(self, gradients: Tensor) -> Tensor:
        """Add a gradient for each vector, of shape (m, n); return where they were independent."""
        before = gradients.norm(dim=1)
        for known in self._spanned:
            gradients = gradients - (gradients * known).sum(1, keepdim=True) * known
        after = gradients.norm(dim=1)
        fresh = after > _INDEPENDENT * before
        dots = (self._weights * gradients).sum(1)
        if not self._spanned:
            self.slopes = dots
        n = self._weights.shape[1]
        s = math.sqrt(n) * dots.abs() / (self._sizes * after)
        self.largest = torch.where(fresh, torch.maximum(self.largest, s), self.largest)
        self._count = self._count + fresh
        self._spanned.append(torch.where(fresh[:, None], gradients / after[:, None], 0))
        return fresh

    def in_doubt(self, limit: float, tests: int, live: Tensor | None) -> Tensor:
        """Tell for each vector whether it looks invariant, and the chance of that is not negligible.

        The chance that k independent projections of a weight whose scale matters are all below the
        largest s that was seen is (0.8·s)ᵏ; summed over all tests of the model.
        """
        chance = (_BY_CHANCE * self.largest.double()) ** self._count
        doubtful = (self.largest <= limit) & (tests * chance >= _NEGLIGIBLE)
        return doubtful if live is None else doubtful & live


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, in which the identity holds as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
