"""What one handle knows of a training: its owners of facts, and a few counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .config import Config
from .ownership import Optimizers
from .parameters import Parameters
from .rate import Rate


@dataclass(eq=False)
class State:
    """What one handle knows of a training.

    Attributes:
        config: the arguments of `attach`.
        parameters: what was decided for each tensor, and the entries.
        optimizers: those that were met, and what each owns.
        rate: λ, learning rates, the place in a run.
        pauses: contexts of `WeightDecay.paused` that run.
        steps: finished steps of optimizers that own a decayed parameter.
        announced: a step of an optimizer that owns a decayed parameter has begun.
        captured: a step, or it seems a backward pass, has gone into a CUDA graph.
        taken: names of parameters whose gradient was taken away in the backward pass that had made
        it.
    """

    config: Config
    parameters: Parameters
    optimizers: Optimizers
    rate: Rate
    pauses: int = 0
    steps: int = 0
    announced: bool = False
    captured: bool = False
    taken: set[str] = field(default_factory=set)

    def describe(self, name: str, param: Any) -> str:
        """A parameter as messages show it."""
        return f"{name} {tuple(param.shape)}"
