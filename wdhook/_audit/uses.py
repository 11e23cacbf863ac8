"""The uses that a trace has seen, by parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .carried import Carried, Seen
from .operations import Use


class Uses:
    """The uses that were seen, by parameter."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._strong: dict[str, list[Seen]] = {}
        self._weak: dict[str, list[Seen]] = {}

    def of(self, name: str) -> list[Seen]:
        """Return the uses of a parameter; those of its statistics alone if there are no others."""
        return self._strong.get(name) or self._weak.get(name) or []

    def note(self, carried: Carried, seen: Seen) -> None:
        """Add a use, unless one of the kind is known."""
        seen = carried.judged(seen)
        known = (self._weak if carried.weak else self._strong).setdefault(carried.name, [])
        if all(other.use is not seen.use for other in known):
            known.append(seen)

    def became_contraction(self, name: str) -> None:
        """Replace the multiplication of a parameter: its product with data was summed over."""
        known = self._strong.get(name, [])
        for i, seen in enumerate(known):
            if seen.use is Use.MULTIPLICATION:
                known[i] = Seen(Use.CONTRACTION, f"{seen.operation}, sum", firm=False)

    def axis(self, name: str, tensor: Tensor, axis: int) -> int:
        """Return the axis of a parameter behind an axis of a view of it; casts keep strides too."""
        parameter = self._parameters[name]
        if tensor.dim() == 0 or parameter.dim() == 0:
            return 0
        step, size = tensor.stride(axis), tensor.size(axis)
        for i in range(parameter.dim()):
            if parameter.stride(i) == step and parameter.size(i) >= size > 1:
                return i
        return 0
