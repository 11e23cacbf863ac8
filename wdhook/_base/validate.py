"""Checks the numbers and the words that users give."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
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


def check_choice(
    argument: str, value: object, choices: Collection[str], also: Mapping[str, str] | None = None
) -> None:
    """Check a word.

    Args:
        argument: name of the argument.
        value: as the user gave it.
        choices: the words that have a meaning.
        also: words that others use, in lower case → the choice.

    Raises:
        ArgumentError: `value` is none of the choices; the message has the nearest.
    """
    if isinstance(value, str) and value in choices:
        return
    meant = (also or {}).get(str(value).lower())
    question = f". Did you mean {meant!r}?" if meant else did_you_mean(value, choices, quoted=True)
    raise ArgumentError(
        f"`{argument}` must be one of {', '.join(map(repr, choices))}.\n  got: {value!r}{question}"
    )


def is_number(value: object) -> TypeGuard[float]:
    """Tell a real number (of numpy, too) from a truth value and other objects."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _shortened(value: object) -> str:
    """The value as text; Python refuses to print integers of many thousand digits."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits, beyond the range of a float"
    return repr(value)
