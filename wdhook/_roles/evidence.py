"""Evidence in the tensor itself: its shape, and the values that it was initialized with.

Values are read only where a name leaves the role open, from a few elements first, and never on the
meta device, from shards, or while a CUDA graph is captured.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Shape: TypeAlias = "tuple[int, ...] | None"
"""None for a lazy parameter, which has no shape yet."""


class Fill(enum.Enum):
    """How the elements of a parameter are initialized."""

    UNKNOWN = enum.auto()
    CONSTANT = enum.auto()  # one value that is not zero: a factor that starts neutral
    ZERO = enum.auto()  # a term that starts without an effect
    RANDOM = enum.auto()  # a vector drawn around zero: factors are not, what contracts is
    ELSE = enum.auto()


def shape_of(parameter: torch.Tensor) -> Shape:
    """The shape before sharding, or None while the shape is not known."""
    # DeepSpeed ZeRO-3 leaves an empty 1-D tensor behind and keeps the shape in `ds_shape`.
    whole = getattr(parameter, "ds_shape", None)
    if whole is not None:
        return tuple(whole)
    return parameter.shape if has_shape(parameter) else None


def has_shape(parameter: torch.Tensor) -> bool:
    """False for a lazy parameter; most are of the plain type, which is the quicker question."""
    return type(parameter) is nn.Parameter or not is_lazy(parameter)


def dimensions(shape: tuple[int, ...]) -> int:
    """The number of dimensions larger than one: a (1, 1, C) scale is a vector."""
    return len(shape) - shape.count(1)


def is_vectorlike(shape: Shape) -> bool:
    """True where at most one dimension is larger than one."""
    return shape is not None and dimensions(shape) <= 1


def is_column(shape: Shape) -> bool:
    """True for (n, 1), the shape of a product with one output."""
    return shape is not None and len(shape) == 2 and shape[1] == 1 and shape[0] != 1


def is_broadcast(shape: Shape) -> bool:
    """True for (1, m, n) and longer: one of several dimensions is left open, as for a batch."""
    return shape is not None and len(shape) > 2 and shape[0] == 1 and dimensions(shape) > 1


_SMALLEST_SAMPLE = 16
"""Elements from which on a standard deviation says something."""


@torch.no_grad()
def fill_of(parameter: torch.Tensor) -> Fill:
    """Look at the values of a parameter, where they can be read without side effects."""
    if not _is_readable(parameter):
        return Fill.UNKNOWN
    values = parameter.detach().reshape(-1)
    first = values[0].item()
    if values[-1].item() == first and bool((values == first).all()):
        return Fill.CONSTANT if first else Fill.ZERO
    if values.numel() < _SMALLEST_SAMPLE or not is_vectorlike(parameter.shape):
        return Fill.ELSE
    deviation, mean = torch.std_mean(values.float())
    is_grid = bool((values[1:] >= values[:-1]).all())
    return Fill.ELSE if is_grid or abs(mean.item()) >= deviation.item() else Fill.RANDOM


def _is_readable(parameter: torch.Tensor) -> bool:
    if type(parameter) is not nn.Parameter or type(parameter.detach()) is not torch.Tensor:
        return False
    if parameter.is_meta or not parameter.is_floating_point() or parameter.numel() == 0:
        return False
    if hasattr(parameter, "ds_shape") or torch.compiler.is_compiling():
        return False
    return not (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
