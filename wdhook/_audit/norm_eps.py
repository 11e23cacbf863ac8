"""How far the eps of normalizations takes part: without it a normalized weight would have no scale at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

ATTRIBUTES = ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps")
_LARGEST = 0.01  # an addend above it is no eps
# Operation → which of its results is 1/√(σ² + ε).
_NATIVE = {
    "native_batch_norm": 2,
    "_native_batch_norm_legit": 2,
    "_batch_norm_with_update": 2,
    "cudnn_batch_norm": 2,
    "miopen_batch_norm": 2,
    "native_layer_norm": 2,
    "native_group_norm": 2,
    "_fused_rms_norm": 1,
}


def weak_storage(tensor: Tensor) -> object:
    """A weak reference to a tensor's storage: while it lives, no other storage gets the address of this one."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def shrink(modules: Iterable[nn.Module], by: float) -> dict[float, float]:
    """Make the eps that modules hold smaller.

    Returns:
        new eps → the eps that it was.
    """
    were = {}
    for module in modules:
        for name in ATTRIBUTES:
            eps = vars(module).get(name)
            if isinstance(eps, float) and 0 < eps <= _LARGEST:
                were[eps * by] = eps
                vars(module)[name] = eps * by
    return were


class EpsWatch:
    """Sees ε and 1/√(σ² + ε) of each normalization in a forward pass, fused or written out.

    Where y = x/√(σ² + ε) and x is scaled by α, d log‖y‖/d log α = ε/(σ² + ε) =: κ, which is 0 for an invariant
    function. A channel with κ = 1 is constant, and passes nothing on: what leaks is κ·‖y‖, with ‖y‖² ~ 1 - κ.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, Tensor]] = []
        self._sums: dict[int, tuple[object, float]] = {}

    def see(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Look at one operation that has just run."""
        if name in _NATIVE:
            eps = _eps_argument(func, args, kwargs)
            rstd = result[_NATIVE[name]]
            if eps and rstd.numel():
                self._seen.append((eps, rstd.detach().square().reciprocal()))
        elif (
            name == "add"
            and len(args) > 1
            and isinstance(args[1], float)
            and 0 < args[1] <= _LARGEST
        ):
            self._sums[result.untyped_storage()._cdata] = weak_storage(result), args[1]
        elif name in ("rsqrt", "sqrt") or (name == "pow" and args[1:2] in ((-0.5,), (0.5,))):
            known = self._sums.get(args[0].untyped_storage()._cdata)
            if known:
                self._seen.append((known[1], args[0].detach().clone()))

    def leak(self, were: dict[float, float] | None = None) -> float:
        """Root mean square of κ·√(1 - κ), of the normalization with the most; 0.0 where there is none.

        Args:
            were: as `shrink` returned it, to tell the leak of the eps that the modules have.
        """
        worst = 0.0
        for eps, total in self._seen:
            if total.device.type == "meta":
                continue
            true = (were or {}).get(eps, eps)
            κ = true / (total - eps + true).clamp_min(true)
            worst = max(worst, float((κ.square() * (1 - κ)).mean().sqrt()))
        return worst


def _eps_argument(func: Any, args: Any, kwargs: Any) -> float | None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("eps", "epsilon"):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            return float(value) if value is not None else torch.finfo(torch.float64).eps
    return None
