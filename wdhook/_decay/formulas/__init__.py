"""The formulas of decay, one file each: numbers and gradients come in, gradients or parameters are
changed in place.

A formula knows nothing of hooks, steps, windows or optimizers. To add one: a file here, and a row
below.
"""

from __future__ import annotations

from .base import Formula, How, Rates, Rest
from .coupled import Coupled
from .decoupled import Decoupled
from .independent import Independent

FORMULAS: dict[str, Formula] = {
    formula.name: formula for formula in (Coupled(), Decoupled(), Independent())
}

__all__ = ["FORMULAS", "Formula", "How", "Rates", "Rest"]
