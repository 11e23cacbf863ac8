"""Scale invariance by Euler's identity: where f(αw) = f(w) for all α > 0, ⟨w, ∂L/∂w⟩ = 0 for every loss L.

With ``L = ⟨r, f⟩`` for a random r, one backward pass asks all parameters at once. In terms of the Jacobian J of the
outputs, ``⟨w, g⟩ = ⟨r, J w⟩`` has the standard deviation ``‖J w‖``, and ``E‖g‖² = ‖J‖²`` (Frobenius). For a
direction v of random entries, ``E‖J v‖² = ‖J‖² ‖v‖² / n``. So the *sensitivity*

    s = √n · |⟨w, g⟩| / (‖w‖ · ‖g‖)

is of the order of 1 for a weight whose scale matters as much as an average direction, whatever its size n, and 0
for one whose scale does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 1706_05350  # one that nobody draws weights or inputs from
_LEAKS = 10.0  # ⟨r, Jw⟩ is normally distributed: ten standard deviations
_BY_CHANCE = (2 / math.pi) ** 0.5  # P(|N(0, 1)| < τ) = √(2/π)·τ for small τ
_NEGLIGIBLE = 1e-4  # parameters of a model that chance makes look invariant
_CANCELLED = (
    1e3  # rounding errors of a sum of 1e6 terms that cancels, in units of machine epsilon: √1e6
)


@dataclass(frozen=True, slots=True)
class Scale:
    """What a backward pass says about the scale of one parameter.

    Attributes:
        sensitivity: s as above, the larger of the two projections; None where no gradient came.
        invariant: whether the outputs do not depend on the parameter's scale; None where that cannot be told.
        rows: (how many output channels are invariant one by one, of how many with a gradient), or None.
    """

    sensitivity: float | None = None
    invariant: bool | None = None
    rows: tuple[int, int] | None = None


def threshold(epsilon: float, leak: float) -> float:
    """The s below which a parameter counts as invariant.

    Args:
        epsilon: machine epsilon of the arithmetic.
        leak: how far the eps of normalizations takes part, see `EpsWatch.leak`.

    Of an invariant weight, s is the relative rounding error of its gradient, plus what the eps of the
    normalization leaks. √epsilon is exceeded by the first only when half of all digits are lost in the backward pass.
    The second is a normal variable whose standard deviation is the leak. Of a weight whose scale matters, s is
    about |N(0, 1)|: it falls below a threshold τ by chance with a probability of 0.8·τ, and in two projections with
    the square of it.
    """
    return math.sqrt(epsilon) + _LEAKS * leak


class Projections:
    """Gradients of random projections of the outputs of one forward pass.

    Args:
        outputs: floating tensors that depend on the leaves. Each is weighted with the inverse of its norm; elements
            that are not finite (masks of -inf) are left out.
        leaves: name → parameter.
        seed: of the projections, which come from a generator of their own.
        reentrant: whether there are reentrant checkpoints, which know `backward` alone.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        leaves: Mapping[str, Tensor],
        seed: int = SEED,
        reentrant: bool = False,
    ) -> None:
        self._reentrant = reentrant
        self._outputs = outputs
        self._leaves = leaves
        self._generator = torch.Generator().manual_seed(seed)

    def gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The gradients of another projection with respect to some leaves; without those that it does not reach."""
        directions = [self._direction(output) for output in self._outputs]
        leaves = [self._leaves[name] for name in names]
        found: Sequence[Tensor | None]
        if self._reentrant:
            torch.autograd.backward(self._outputs, directions, retain_graph=True)
            found = [leaf.grad for leaf in leaves]
            for leaf in self._leaves.values():
                leaf.grad = None  # the leaves are our own
        else:  # reaches no tensor of others
            found = torch.autograd.grad(
                self._outputs, leaves, directions, retain_graph=True, allow_unused=True
            )
        reached = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        return {
            name: (g if g.layout is torch.strided else g.to_dense()).detach()
            for name, g in reached.items()
        }

    def _direction(self, output: Tensor) -> Tensor:
        value = output.detach()
        kind = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        noise = torch.randn(value.shape, generator=self._generator, dtype=kind)
        finite = torch.isfinite(value)
        size = torch.where(finite, value, 0).norm().clamp_min(torch.finfo(value.dtype).tiny)
        return torch.where(finite, noise.to(value.device, value.dtype) / size, 0)


def scales(
    projections: Projections,
    leaves: Mapping[str, Tensor],
    axes: Mapping[str, int],
    epsilon: float,
    leak: float,
) -> dict[str, Scale]:
    """The scale of each leaf, from one projection; from two where one would leave too much to chance.

    In float64 chance errs in one of a million models of a hundred weights, and a second pass would only cost time.

    Args:
        axes: name → axis of the output channels, for parameters of which rows are asked too.
    """
    limit = threshold(epsilon, leak)
    first = _measured(projections.gradients(list(leaves)), leaves, axes, epsilon, limit)
    doubted = [name for name, one in first.items() if one.invariant or (one.rows and one.rows[0])]
    if not doubted or _BY_CHANCE * limit * len(leaves) < _NEGLIGIBLE:
        return first
    second = _measured(
        projections.gradients(doubted),
        {name: leaves[name] for name in doubted},
        axes,
        epsilon,
        limit,
    )
    return first | {name: _both(first[name], second[name]) for name in doubted}


def _both(one: Scale, two: Scale) -> Scale:
    """What two projections agree on."""
    if one.sensitivity is None or two.sensitivity is None:
        return two
    rows = min(one.rows, two.rows) if one.rows and two.rows else None
    sensitivity = max(one.sensitivity, two.sensitivity)
    return Scale(sensitivity, one.invariant and two.invariant, rows)


def _measured(
    gradients: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    axes: Mapping[str, int],
    epsilon: float,
    limit: float,
) -> dict[str, Scale]:
    """One projection, read: three numbers for each parameter, brought to the CPU together."""
    sums = {
        name: torch.stack([_dot(leaves[name], g), leaves[name].detach().norm(), g.norm()])
        .cpu()
        .double()
        for name, g in gradients.items()
    }
    found = {name: Scale() for name in leaves}
    # ‖w‖·‖g‖ is the first-order effect of changing w by its own size. Where it is rounding noise next to that of the
    # others, the outputs do not depend on w at all: a bias before a BatchNorm, keys' biases before a softmax.
    effects = {name: float(w * g) for name, (_, w, g) in sums.items()}
    floor = (
        _CANCELLED * epsilon * max((e for e in effects.values() if math.isfinite(e)), default=0.0)
    )
    for name, (dot, w, g) in sums.items():
        if not math.isfinite(effects[name]) or effects[name] <= floor:
            continue
        sensitivity = float(math.sqrt(leaves[name].numel()) * dot.abs() / (w * g))
        invariant = sensitivity <= limit if limit < 1 else None
        rows = (
            _rows(leaves[name], gradients[name], axes[name], floor, limit) if name in axes else None
        )
        found[name] = Scale(sensitivity, invariant, rows)
    return found


def _dot(one: Tensor, other: Tensor) -> Tensor:
    product = one.detach() * other.conj()
    return product.real.sum() if product.is_complex() else product.sum()


def _rows(
    weight: Tensor, gradient: Tensor, axis: int, floor: float, limit: float
) -> tuple[int, int] | None:
    if weight.dim() < 2 or weight.is_complex():
        return None
    w = weight.detach().movedim(axis, 0).flatten(1)
    g = gradient.movedim(axis, 0).flatten(1)
    effects = w.norm(dim=1) * g.norm(dim=1)
    s = math.sqrt(w.shape[1]) * (w * g).sum(1).abs() / effects
    live = effects > floor
    return int(((s <= limit) & live).sum()), int(live.sum())
