"""Removes the eps of normalizations for one pass, and measures how far it took part.

A weight before a normalization has no scale of its own only where eps is zero: with y = x/√(σ² +
ε) and x scaled by α, d log‖y‖/d log α = ε/(σ² + ε) =: κ. So the audit runs without eps. A fused
normalization is called with ε = 0; where ε was added in Python, it is subtracted again when the
sum reaches a square root or a denominator. A channel that is constant up to rounding keeps its
eps: it would be divided by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .operations import Operation

ATTRIBUTES = ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps")
_LARGEST_ATTRIBUTE = 1.0
_LARGEST_CONSTANT = 0.01  # a larger constant in code is not called an eps
# Operation → index of the result 1/√(σ² + ε).
_FUSED = {
    "native_batch_norm": 2,
    "_native_batch_norm_legit": 2,
    "_batch_norm_with_update": 2,
    "cudnn_batch_norm": 2,
    "miopen_batch_norm": 2,
    "native_layer_norm": 2,
    "native_group_norm": 2,
    "_fused_rms_norm": 1,
}
_KEEP_EPS = ("cudnn_batch_norm", "miopen_batch_norm")  # they refuse a smaller one
# Operation → index of the argument that must not be zero.
_DENOMINATORS = {"sqrt": 0, "rsqrt": 0, "reciprocal": 0, "div": 1, "true_divide": 1}
_ADDITIONS = ("add",)


def weak_storage(tensor: Tensor) -> object:
    """Return a weak reference to the storage of a tensor, which keeps its address from reuse."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def smallest_ratio(dtype: torch.dtype) -> float:
    """Return the σ²/ε below which a channel counts as constant, and keeps its eps."""
    return float(torch.finfo(dtype).eps ** 0.75)


def shrink(modules: Iterable[nn.Module], by: float) -> dict[float, float]:
    """Multiply the eps that modules hold, for functions that a trace cannot see into.

    Returns:
        new eps → former eps.
    """
    former = {}
    for module in modules:
        held = vars(module)
        for name in ATTRIBUTES:
            eps = held.get(name)
            if isinstance(eps, float) and 0 < eps < _LARGEST_ATTRIBUTE:
                former[eps * by] = eps
                held[name] = eps * by
    return former


class EpsWatch:
    """Runs the operations of a forward pass without the eps of its normalizations.

    Args:
        former: as `shrink` returned it.
    """

    def __init__(self, former: dict[float, float]) -> None:
        self._former = former
        # Storage → (weak reference to it, ε that was added).
        self._sums: dict[int, tuple[object, float]] = {}
        # (ε that remains, ε of the model, σ² + the remaining ε) of each normalization.
        self._seen: list[tuple[float, float, Tensor]] = []

    def run(self, op: Operation, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; a normalization or a denominator without its eps."""
        if op.name in _FUSED:
            return self._fused(op, func, args, kwargs)
        place = _denominator(op, args)
        if place is not None:
            self._remove(args[place])
        result = func(*args, **kwargs)
        if op.name in _ADDITIONS:
            self._note_sum(args, result)
        return result

    def leak(self, of_model: bool = False) -> float:
        """Return the root mean square of κ·√(1 - κ), of the normalization with the most; or 0.0.

        A channel with κ = 1 is constant and passes nothing on: κ·‖y‖ leaks, with ‖y‖² ~ 1 - κ.

        Args:
            of_model: for the eps that the model has, in place of those that remained.
        """
        worst = 0.0
        for remaining, own, total in self._seen:
            eps = own if of_model else remaining
            if eps == 0.0 or total.device.type == "meta" or not total.numel():
                continue
            κ = eps / (total - remaining + eps).clamp_min(eps)
            worst = max(worst, float((κ.square() * (1 - κ)).mean().sqrt()))
        return worst

    # ------------------------------------------------------------------------------- fused

    def _fused(self, op: Operation, func: Any, args: Any, kwargs: Any) -> Any:
        place = op.arguments.index("epsilon" if "epsilon" in op.arguments else "eps")
        given = args[place] if place < len(args) else kwargs.get(op.arguments[place])
        if given is None:
            given = torch.finfo(args[0].dtype).eps
        if op.name in _KEEP_EPS or _uses_running_statistics(op, args) or args[0].is_meta:
            result = func(*args, **kwargs)
            self._note_fused(op, given, given, result)
            return result

        def with_eps(eps: float) -> Any:
            if place < len(args):
                return func(*args[:place], eps, *args[place + 1 :], **kwargs)
            return func(*args, **{**kwargs, op.arguments[place]: eps})

        return self._least_eps(op, given, args[0].dtype, with_eps)

    def _least_eps(
        self, op: Operation, given: float, dtype: torch.dtype, with_eps: Callable[[float], Any]
    ) -> Any:
        own = self._former.get(given, given)
        result = with_eps(0.0)
        inverse = result[_FUSED[op.name]]
        largest = (smallest_ratio(dtype) * own) ** -0.5
        # A comparison with NaN is False.
        if not inverse.numel() or float(inverse.max()) <= largest:
            self._note_fused(op, 0.0, own, result)
            return result
        remaining = own * torch.finfo(dtype).eps ** 0.5
        result = with_eps(remaining)
        self._note_fused(op, remaining, own, result)
        return result

    def _note_fused(self, op: Operation, remaining: float, own: float, result: Any) -> None:
        inverse = result[_FUSED[op.name]]
        if inverse.numel():
            own = self._former.get(own, own)
            self._seen.append((remaining, own, inverse.detach().square().reciprocal()))

    # ------------------------------------------------------------------------------- in Python

    def _note_sum(self, args: Any, result: Any) -> None:
        constant = _constant(args[1]) if len(args) > 1 else None
        if constant is None or constant <= 0:
            return
        if constant <= _LARGEST_CONSTANT or constant in self._former:
            storage = result.untyped_storage()._cdata
            self._sums[storage] = weak_storage(result), constant

    def _remove(self, total: Any) -> None:
        """Subtract the eps from a sum in place, where the rest is not zero up to rounding."""
        if not isinstance(total, Tensor) or not self._sums:
            return
        known = self._sums.pop(total.untyped_storage()._cdata, None)
        if known is None or total.is_meta or not total.is_floating_point():
            return
        eps = known[1]
        own = self._former.get(eps, eps)
        for axis, stride in enumerate(total.stride()):
            if stride == 0 and total.shape[axis] > 1:  # expanded: one element in many places
                total = total.narrow(axis, 0, 1)
        rest = total - eps
        dead = rest.abs() <= smallest_ratio(total.dtype) * own
        # Below autograd: what is saved for the backward pass changes along.
        total.copy_(torch.where(dead, total, rest))
        self._seen.append((0.0, own, rest[~dead]))
        self._seen.append((eps, own, (rest + eps)[dead]))


def _denominator(op: Operation, args: Any) -> int | None:
    """Return the index of the argument that an operation divides by or takes the root of."""
    if op.name == "pow":
        exponent = args[1] if len(args) > 1 else None
        fractional = isinstance(exponent, (int, float)) and (exponent < 0 or exponent == 0.5)
        return 0 if fractional else None
    place = _DENOMINATORS.get(op.name)
    return place if place is not None and len(args) > place else None


def _constant(value: Any) -> float | None:
    return float(value) if isinstance(value, float) else None


def _uses_running_statistics(op: Operation, args: Any) -> bool:
    """Tell a BatchNorm in evaluation mode, whose scale is a constant."""
    for name in ("training", "train"):
        if name in op.arguments:
            place = op.arguments.index(name)
            return place < len(args) and args[place] is False
    return False
