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
        carried: names of parameters whose gradient was taken away with its decay in it since the
            last step.
        seen: names of parameters that were seen to get a gradient since the last step of any
            optimizer, where no hook pays for it.
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
    carried: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def end_of_any_step(self) -> None:
        """Forget what was seen since the last step of any optimizer."""
        self.carried.clear()
        self.seen.clear()

    def describe(self, name: str, param: Any) -> str:
        """A parameter as messages show it."""
        return f"{name} {tuple(param.shape)}"
