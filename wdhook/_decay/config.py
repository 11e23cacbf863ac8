"""The arguments of `attach` that say how to decay, not how much."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._plan.plan import Plan
from ..schedules import Schedule
from .formulas import Formula
from .optimizers import LearningRate


@dataclass(frozen=True)
class Config:
    """The arguments of `attach` that say how to decay, not how much.

    Attributes:
        formula: what is written, and where; `Formula.name` is the mode.
        at: ``"backward"`` or ``"step"``.
        optimizers: weak references to those given.
        lr: learning rate in place of the param group's.
        scaler: the GradScaler given.
        foreach: as in torch.optim.
        schedule: λ as a function of finished steps.
        said_mode: the caller named the mode.
        replan: makes a plan of the model as it is now, with the caller's overrides and recipe.
    """

    formula: Formula
    at: str
    optimizers: tuple[weakref.ref[Any], ...]
    lr: LearningRate | None
    scaler: Any | None
    foreach: bool | None
    schedule: Schedule | None
    said_mode: bool
    replan: Callable[[nn.Module, float], Plan] = field(repr=False)

    @property
    def mode(self) -> str:
        """Name of the formula."""
        return self.formula.name

    @property
    def in_backward(self) -> bool:
        """Decay is paid by hooks of the backward pass."""
        return self.at == "backward"

    @property
    def in_gradient(self) -> bool:
        """The decay lives in gradients, and shares their fate."""
        return self.formula.in_gradient
