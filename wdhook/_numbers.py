"""Reading the numbers that users give."""

from __future__ import annotations

import math
import numbers

from ._errors import ArgumentError


def check_weight_decay(value: object, argument: str = "weight_decay") -> float:
    """`value` as a float.

    Raises:
        ArgumentError: it is negative, not finite or not a number.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ArgumentError(f"`{argument}` must be a number.\n  got: {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(
            f"`{argument}` must be finite and not negative: it is the λ of one optimizer step.\n  got: {value!r}"
        )
    return float(value)
