"""A target of decay with a value for each element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._base.errors import ArgumentError
from .._base.problem import Problem
from .._roles.marks import bare_name


class Anchor:
    """A target with a value for each element: those of the first step, or those of another model.

    Args:
        source: ``"init"``, the values that a parameter has before its first update; or a module,
            or a mapping from parameter name to tensor (a checkpoint), with values under the names
            of the model that is trained.
        device: where the values are kept, such as ``"cpu"``; None: beside the parameter.
        dtype: in which they are kept; None: that of the parameter.

    Values of ``"init"`` are part of `WeightDecay.state_dict`. Those of a source are not: give the
    same source again. A few of them are saved, so that another source is refused.
    """

    __slots__ = ("_values", "device", "dtype", "source")

    def __init__(
        self,
        source: Literal["init"] | nn.Module | Mapping[str, Tensor] = "init",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self._values = _values_of(source)

    @property
    def is_init(self) -> bool:
        """The values are those of the first step."""
        return self._values is None

    def value(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The values for a parameter; None for ``"init"``, and where the source has none of that
        shape.

        Args:
            name: of the parameter, with or without the prefixes of wrappers.
            shape: of the parameter; () where it is not known yet.
        """
        found = None if self._values is None else self._values.get(bare_name(name))
        fits = found is not None and (not shape or tuple(found.shape) == shape)
        return found if fits else None

    def probe(self, name: str, shape: tuple[int, ...]) -> tuple[float, ...]:
        """A few of the values, by which another source can be told. Waits for the device."""
        found = self.value(name, shape)
        if found is None or found.is_meta or hasattr(found, "to_local"):
            return ()
        flat = (torch.view_as_real(found) if found.is_complex() else found).flatten()
        few = flat[:: max(1, flat.numel() // _PROBES)][:_PROBES]
        return tuple(few.to("cpu", torch.float64).tolist())

    def __str__(self) -> str:
        return "init" if self.is_init else "given"

    def __repr__(self) -> str:
        return f"Anchor({self})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a plan is data: it has no tensors.
        return Anchor, ("init" if self.is_init else {},)


def _values_of(source: object) -> dict[str, Tensor] | None:
    if isinstance(source, str) and source == "init":
        return None
    named: Any = source
    if isinstance(source, nn.Module):
        named = dict(source.named_parameters(remove_duplicate=False))
    if not isinstance(named, Mapping) or not all(isinstance(v, Tensor) for v in named.values()):
        raise ArgumentError(
            Problem(
                'The source of an `Anchor` is "init", a module, or a mapping from parameter name '
                "to tensor.",
                'Give model.state_dict() of the other model, or torch.load("base.pt")',
                {"got": type(source).__name__},
            )
        )
    return {bare_name(name): value.detach() for name, value in named.items()}


_PROBES = 4
