"""A target of decay with a value for each element."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._base.errors import ArgumentError
from .._base.problem import Problem
from .names import plain_name, plain_names


class Anchor:
    """A target with a value for each element: those of the first step, or those of another model.

    Args:
        source: ``"init"``, the values that a parameter has before its first update; or a module,
            or a mapping from parameter name to tensor (a checkpoint), with values under the names
            of the model that is trained.
        device: where the values are kept, such as ``"cpu"``; None: beside the parameter.
        dtype: in which they are kept; None: that of the parameter.

    Values of ``"init"`` are part of `WeightDecay.state_dict`. Those of a source are not: give the
    same source again. A few values of each whole tensor are saved, and compared. A source that is
    changed in place changes the target.

    Raises:
        ArgumentError: the source has no tensors, or no values (meta).
    """

    __slots__ = ("_plain", "_values", "device", "dtype")

    def __init__(
        self,
        source: Literal["init"] | nn.Module | Mapping[str, Any] = "init",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self._values = _values_of(source)
        names = plain_names(self._values or ())
        self._plain = {plain: name for name, plain in names.items()}

    @property
    def is_init(self) -> bool:
        """The values are those of the first step."""
        return self._values is None

    def value(self, names: Iterable[str], shape: tuple[int, ...]) -> Tensor | None:
        """The values for a parameter; None for ``"init"``, and where the source has none of that
        shape.

        Args:
            names: of the parameter; a tied one has several.
            shape: of the parameter; () where it is not known yet.
        """
        values = self._values or {}
        for name in names:
            found = values.get(name)
            if found is None:
                found = values.get(self._plain.get(plain_name(name), ""))
            if found is not None and (not shape or tuple(found.shape) == shape):
                return found
        return None

    def __str__(self) -> str:
        return "init" if self.is_init else "given"

    def __repr__(self) -> str:
        return f"Anchor({self})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a plan is data: it has no tensors.
        return _copied, ("init" if self.is_init else {}, self.device, self.dtype)


def _copied(source: Any, device: torch.device | None, dtype: torch.dtype | None) -> Anchor:
    return Anchor(source, device=device, dtype=dtype)


def _values_of(source: object) -> dict[str, Tensor] | None:
    if isinstance(source, str) and source == "init":
        return None
    named: Any = source
    if isinstance(source, nn.Module):
        named = dict(source.named_parameters(remove_duplicate=False))
    values = {}
    if isinstance(named, Mapping):  # a state dict may hold objects of modules beside its tensors
        values = {name: v.detach() for name, v in named.items() if isinstance(v, Tensor)}
    if (not values and named != {}) or any(value.is_meta for value in values.values()):
        raise ArgumentError(
            Problem(
                'The source of an `Anchor` is "init", a module with values, or a mapping from '
                "parameter name to tensor.",
                'Give model.state_dict() of the other model, or torch.load("base.pt")',
                {"got": type(source).__name__},
            )
        )
    return values


def probe(values: Tensor) -> list[float]:
    """A few of the values, by which others can be told; none of sharded ones. Waits for the
    device."""
    if hasattr(values, "to_local"):
        return []
    flat = (torch.view_as_real(values) if values.is_complex() else values).flatten()
    few = flat[:: max(1, flat.numel() // _PROBES)].to("cpu", torch.float64)
    return list(few.tolist()[:_PROBES])


_PROBES = 16
