"""Reads numbers of users."""

from __future__ import annotations

import math
import numbers
from typing import TypeGuard

from .errors import ArgumentError


def check_factor(value: object, argument: str = "weight_decay") -> float:
    """`value` as a float.

    Raises:
        ArgumentError: it is negative, not finite or not a number.
    """
    if not is_number(value):
        raise ArgumentError(
            f"`{argument}` must be a number.\n  got: {value!r} ({type(value).__name__})"
        )
    λ = float(value)
    if not (math.isfinite(λ) and λ >= 0):
        raise ArgumentError(f"`{argument}` must be finite and not negative.\n  got: {value!r}")
    return λ


def is_number(value: object) -> TypeGuard[float]:
    """Tell a real number (of numpy, too) from a truth value and other objects."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
