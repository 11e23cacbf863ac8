"""Gradients of random projections of the outputs of one forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SEED = 1706_05350  # one that nobody draws weights or inputs from


class Projections:
    """Gradients of random projections of the outputs of one forward pass.

    Args:
        outputs: floating tensors that depend on the leaves. Each is divided by its usual size;
            elements that are not finite (masks of -inf) are left out.
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
        self._first: list[Tensor] | None = None

    @property
    def dimensions(self) -> int:
        """The number of independent projections at most: of real numbers in the outputs."""
        return sum(output.numel() * (2 if output.is_complex() else 1) for output in self._outputs)

    def gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradients of a new projection, of the leaves that it reaches, by name."""
        directions = [self._direction(output) for output in self._outputs]
        if self._first is None:
            self._first = directions
        return self._backward(names, directions)

    def repeated(self, names: Sequence[str], factor: float) -> dict[str, Tensor]:
        """Return the gradients of the first projection, multiplied by a factor."""
        assert self._first is not None
        return self._backward(names, [direction * factor for direction in self._first])

    def along(self, outputs: Sequence[Tensor]) -> float:
        """Return the first projection of other outputs of the same shapes."""
        assert self._first is not None
        total = 0.0
        for direction, output in zip(self._first, outputs, strict=True):
            value = torch.where(torch.isfinite(output), output, 0)
            product = direction.conj() * value
            total += float(product.real.sum() if product.is_complex() else product.sum())
        return total

    def _backward(self, names: Sequence[str], directions: list[Tensor]) -> dict[str, Tensor]:
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
        gradients = {}
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
                gradients[name] = dense.detach()
        return gradients

    def _direction(self, output: Tensor) -> Tensor:
        value = output.detach()
        kind = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        noise = torch.randn(value.shape, generator=self._generator, dtype=kind)
        finite = torch.isfinite(value)
        return torch.where(finite, noise.to(value.device, value.dtype) / _size(value[finite]), 0)


def _size(values: Tensor) -> float:
    """Return the usual size of the elements of an output; 1.0 where there is none.

    The median of those that are not zero: neither an output that is exactly zero nor one in which a
    few elements are masked by a huge number decides about the others.
    """
    sizes = values.abs()
    sizes = sizes[sizes > 0]
    if not sizes.numel():
        return 1.0
    return float(sizes.median()) * math.sqrt(values.numel())
