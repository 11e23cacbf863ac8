"""Measures scale invariance by Euler's identity.

Where f(αw) = f(w) for all α > 0, ⟨w, ∂L/∂w⟩ = 0 for every loss L.

With ``L = ⟨r, f⟩`` for a random r, one backward pass asks all parameters at once. In terms of
the Jacobian J of the outputs, ``⟨w, g⟩ = ⟨r, J w⟩`` has the standard deviation ``‖J w‖``, and
``E‖g‖² = ‖J‖²`` (Frobenius). For a direction v of random entries, ``E‖J v‖² = ‖J‖² ‖v‖² / n``.
So the *sensitivity*

    s = √n · |⟨w, g⟩| / (‖w‖ · ‖g‖)

is of the order of 1 for a weight whose scale matters as much as an average direction, whatever
its size n, and 0 for a weight whose scale does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .projections import Projections

_LEAKS = 10.0  # ⟨r, Jw⟩ is normally distributed: ten standard deviations
# P(|N(0, 1)| < τ) ≤ √(2/π)·τ. The scale of a weight may matter less than that of an average
# direction; a quarter of it is assumed.
_BY_CHANCE = 4 * (2 / math.pi) ** 0.5
_NEGLIGIBLE = 1e-4  # probability that chance makes any weight or row of a model look invariant
_MOST = 8  # projections
_SMALL = 2**14  # elements of a tensor that is copied beside others to be measured with them
_CANCELLED = 1e3  # rounding of a sum of 1e6 terms that cancels, in units of machine epsilon: √1e6
_FAINT = 1e6  # the same where a division by a small deviation has magnified it
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
        sensitivity: s as above, the largest of the projections; None where the outputs do not
            depend on the parameter at all.
        invariant: whether the outputs do not depend on the scale of the parameter; None without
            a verdict.
        rows: (number of output channels that are invariant one by one, number with a verdict),
            or None.
        doubt: the reason why there is no verdict; empty where there is one.
        slope: ⟨w, g⟩ of the first projection.
        faint: the gradient is so small next to the largest of the model that rounding in the
            forward pass could have made it.
    """

    sensitivity: float | None = None
    invariant: bool | None = None
    rows: tuple[int, int] | None = None
    doubt: str = NO_GRADIENT
    slope: float = 0.0
    faint: bool = False


def threshold(epsilon: float, leak: float) -> float:
    """Return the s below which a parameter may count as invariant.

    Args:
        epsilon: machine epsilon of the arithmetic.
        leak: the part of eps that could not be removed, see `EpsWatch.leak`.

    Of an invariant weight, s is the relative rounding error of its gradient, plus what the eps of
    the normalization leaks. √epsilon is exceeded by the first only when half of all digits are lost
    in the backward pass. The second is a normal variable whose standard deviation is the leak. Of a
    weight whose scale matters, s is about |N(0, 1)|: each independent projection is below τ by
    chance with a probability of 0.8·τ, or of 3.2·τ where the scale matters a quarter as much.
    """
    return math.sqrt(epsilon) + _LEAKS * leak


def scales(
    projections: Projections,
    leaves: Mapping[str, Tensor],
    axes: Mapping[str, int],
    epsilon: float,
    leak: float,
) -> dict[str, Scale]:
    """Measure the scale of each leaf by as many projections as chance requires.

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
    faint = [n for n, effect in effects.items() if floor < effect <= math.sqrt(epsilon) * largest]
    rounding = _rounding(projections, gradients, faint)
    moving: dict[str, Tensor] = {}
    for name, effect in effects.items():
        if effect > floor and rounding.get(name, 0.0) < _REPRODUCED:
            moving[name] = gradients[name]
        else:
            found[name] = Scale(doubt=NO_EFFECT if effect else NO_GRADIENT)
    limit = threshold(epsilon, leak)
    found.update(_asked(projections, leaves, axes, moving, rounding, floor, limit))
    for name in faint:
        if effects[name] <= _FAINT * epsilon * largest:
            found[name] = replace(found[name], faint=True)
    return found


def _asked(
    projections: Projections,
    leaves: Mapping[str, Tensor],
    axes: Mapping[str, int],
    gradients: Mapping[str, Tensor],
    rounding: Mapping[str, float],
    floor: float,
    limit: float,
) -> dict[str, Scale]:
    """Return the verdicts on the parameters on which the outputs depend."""
    evidence = [
        Evidence(names, leaves, axes.get(names[0]), floor) for names in _alike(gradients, axes)
    ]
    question = Question(limit, sum(one.tests for one in evidence))
    _collect(projections, evidence, gradients, question)
    found: dict[str, Scale] = {}
    for one in evidence:
        found.update(one.verdicts(question, rounding))
    return found


@dataclass(frozen=True, slots=True)
class Question:
    """The question that all projections answer.

    Attributes:
        limit: see `threshold`.
        tests: number of weights and rows of the model that are asked at once.
    """

    limit: float
    tests: int


def _alike(gradients: Mapping[str, Tensor], axes: Mapping[str, int]) -> list[list[str]]:
    """Group small parameters of one shape, which are measured together; a large one is alone."""
    groups: dict[object, list[str]] = {}
    for name, g in gradients.items():
        small = g.numel() <= _SMALL
        key = (g.shape, axes.get(name), g.dtype, g.device) if small else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _collect(
    projections: Projections,
    evidence: Sequence[Evidence],
    gradients: Mapping[str, Tensor],
    question: Question,
) -> None:
    """Add projections to the evidence until it decides, or no direction of the outputs is left."""
    for one in evidence:
        one.add(gradients)
    if question.limit >= 1:
        return
    for _ in range(1, min(_MOST, projections.dimensions)):
        doubted = [one for one in evidence if one.in_doubt(question)]
        if not doubted:
            return
        more = projections.gradients([name for one in doubted for name in one.names])
        grown = [one.add(more) for one in doubted]
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

    Where the effect is rounding noise next to the largest of the model, the outputs do not
    depend on w at
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
    """The projections of parameters of one shape, of each as a whole and of each row.

    Only the part of a gradient counts that the earlier projections do not span: where a parameter
    acts on a scalar loss alone, every projection is a multiple of the first and adds nothing.

    Args:
        names: of the parameters.
        leaves: name → parameter.
        axis: of the rows; None without rows.
        floor: effect ‖w‖·‖g‖ below which a row does not act on the outputs.
    """

    def __init__(
        self, names: Sequence[str], leaves: Mapping[str, Tensor], axis: int | None, floor: float
    ) -> None:
        self.names = list(names)
        self._floor = floor
        weights = _stacked(names, leaves)
        self._axis = axis if axis is not None and weights.dim() > 2 else None
        self._wholes = Directions(weights.flatten(1))
        self._rows: Directions | None = None
        self._live = weights.new_zeros(0, dtype=torch.bool)
        rows = 0
        if self._axis is not None:
            self._rows = Directions(self._in_rows(weights))
            rows = weights.shape[1 + self._axis]
        self.tests = len(self.names) * (1 + rows)

    def add(self, gradients: Mapping[str, Tensor]) -> bool:
        """Add the gradients of one projection; tell whether any was new, see `Directions.add`."""
        stacked = _stacked(self.names, gradients)
        grown = bool(self._wholes.add(stacked.flatten(1)).any())
        if self._rows is None:
            return grown
        first = not self._live.numel()
        rows = self._in_rows(stacked)
        if first:
            self._live = self._rows.sizes * rows.norm(dim=1) > self._floor
        return bool(self._rows.add(rows).any()) or grown

    def in_doubt(self, question: Question) -> bool:
        """Tell whether a parameter or a row looks invariant, and chance is not excluded."""
        if bool(self._wholes.in_doubt(question).any()):
            return True
        return self._rows is not None and bool((self._rows.in_doubt(question) & self._live).any())

    def verdicts(self, question: Question, rounding: Mapping[str, float]) -> dict[str, Scale]:
        """Return the verdicts on the evidence so far.

        Args:
            question: the same for the whole model.
            rounding: name → relative rounding error of the gradient, where it was measured.
        """
        sensitivities = self._wholes.largest.tolist()
        slopes = self._wholes.slopes.tolist()
        doubtful = self._wholes.in_doubt(question).tolist()
        rows = self._row_counts(question)
        found = {}
        for i, name in enumerate(self.names):
            s = sensitivities[i]
            hidden = question.limit < s <= _ROUNDING * rounding.get(name, 0.0)
            if question.limit >= 1 or hidden:
                found[name] = Scale(s, None, None, TOO_COARSE, slopes[i])
            elif doubtful[i]:
                found[name] = Scale(s, None, rows[i], TOO_FEW, slopes[i])
            else:
                found[name] = Scale(s, s <= question.limit, rows[i], "", slopes[i])
        return found

    def _row_counts(self, question: Question) -> Sequence[tuple[int, int] | None]:
        """Return for each parameter (number of invariant rows, number of rows with a verdict)."""
        count = len(self.names)
        if self._rows is None:
            return [None] * count
        decided = self._live & ~self._rows.in_doubt(question)
        invariant = decided & (self._rows.largest <= question.limit)
        sums = (rows.reshape(count, -1).sum(1).tolist() for rows in (invariant, decided))
        return list(zip(*sums, strict=True))

    def _in_rows(self, stacked: Tensor) -> Tensor:
        assert self._axis is not None
        return stacked.movedim(1 + self._axis, 1).flatten(2).flatten(0, 1)


class Directions:
    """The sensitivities of m vectors in several projections.

    Attributes:
        largest: the largest sensitivity of each vector.
        sizes: the norm of each vector.
        slopes: ⟨w, g⟩ of each vector in the first projection.

    Args:
        weights: of shape (m, n).
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self.sizes = weights.norm(dim=1)
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
        fresh: Tensor = after > _INDEPENDENT * before
        dots = (self._weights * gradients).sum(1)
        if not self._spanned:
            self.slopes = dots
        n = self._weights.shape[1]
        s = math.sqrt(n) * dots.abs() / (self.sizes * after)
        self.largest = torch.where(fresh, torch.maximum(self.largest, s), self.largest)
        self._count = self._count + fresh
        self._spanned.append(torch.where(fresh[:, None], gradients / after[:, None], 0))
        return fresh

    def in_doubt(self, question: Question) -> Tensor:
        """Tell for each vector whether it looks invariant and could do so by chance.

        The chance that k independent projections of a weight whose scale matters are all below the
        largest s that was seen is (3.2·s)ᵏ; summed over all tests of the model.
        """
        chance = (_BY_CHANCE * self.largest.double()) ** self._count
        likely: Tensor = question.tests * chance >= _NEGLIGIBLE
        return likely & (self.largest <= question.limit)


def _stacked(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return tensors of one shape as one; complex ones as pairs of real numbers, in which Euler's
    identity holds as it is.
    """
    chosen = [tensors[name].detach() for name in names]
    stacked = chosen[0][None] if len(chosen) == 1 else torch.stack(chosen)
    if stacked.is_complex():
        return torch.view_as_real(stacked.resolve_conj())
    return stacked if stacked.dim() > 1 else stacked[:, None]
