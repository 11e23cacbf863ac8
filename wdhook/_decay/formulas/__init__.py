"""The formulas of decay, one file each: numbers and gradients come in, gradients or parameters are
changed in place.

A formula knows nothing of hooks, steps, windows or optimizers. To add one: a file here, and a row
below.
"""

from __future__ import annotations

from .base import Formula, How, Rates, Rest, Shrinking
from .cautious import Cautious
from .corrected import Corrected
from .coupled import Coupled
from .decoupled import Decoupled
from .deferred import Deferred
from .independent import Independent
from .toward import first_values, shares_memory, toward_targets

FORMULAS: dict[str, Formula] = {
    formula.name: formula for formula in (Coupled(), Decoupled(), Independent(), Corrected())
}


def compose(
    mode: str, defers: bool = True, cautious: bool = False, toward: bool = False
) -> Formula:
    """The formula of a handle.

    Args:
        mode: a key of `FORMULAS`.
        defers: collect decay that parameters of low precision cannot hold yet.
        cautious: decay where the update agrees; for a formula that changes parameters.
        toward: some parameter has another target than 0.
    """
    formula = toward_targets(FORMULAS[mode]) if toward else FORMULAS[mode]
    if not isinstance(formula, Shrinking):
        return formula
    return Cautious(formula) if cautious else Deferred(formula, defers)


__all__ = [
    "FORMULAS",
    "Formula",
    "How",
    "Rates",
    "Rest",
    "compose",
    "first_values",
    "shares_memory",
]
