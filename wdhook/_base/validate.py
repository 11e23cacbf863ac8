"""Checks the numbers and the words that users give."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import TypeGuard

from .errors import ArgumentError
from .text import did_you_mean


def check_factor(value: object, argument: str = "weight_decay") -> float:
    """Return `value` as a float.

    Raises:
        ArgumentError: it is negative, not finite or not a number.
    """
    if not is_number(value):
        kind = type(value).__name__
        raise ArgumentError(f"`{argument}` must be a number.\n  got: {value!r} ({kind})")
    try:
        λ = float(value)
    except OverflowError:  # an integer or a fraction beyond the range of a float
        λ = math.inf
    if not (math.isfinite(λ) and λ >= 0):
        raise ArgumentError(
            f"`{argument}` must be finite and not negative.\n  got: {_shortened(value)}"
        )
    return λ


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Check a word.

    Raises:
        ArgumentError: `value` is none of the choices; the message has the nearest.
    """
    if isinstance(value, str) and value in choices:
        return
    raise ArgumentError(
        f"`{argument}` must be one of {', '.join(map(repr, choices))}.\n"
        f"  got: {value!r}{did_you_mean(value, choices, quoted=True)}"
    )


def is_number(value: object) -> TypeGuard[float]:
    """Tell a real number (of numpy, too) from a truth value and other objects."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _shortened(value: object) -> str:
    """The value as text; Python refuses to print integers of many thousand digits."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits, beyond the range of a float"
    return repr(value)
