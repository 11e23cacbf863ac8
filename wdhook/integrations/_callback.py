"""What the callbacks of all frameworks share: a handle for as long as a training run lasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from .. import ArgumentError, Plan, WeightDecay, attach

# Not for typing alone: tools that read a YAML file look the types up here.
from .._decay.arguments import LowPrecision, Mode, Moment
from .._decay.optimizers import LearningRate
from .._plan.overrides import Overrides
from .._plan.recipes import Recipe
from .._plan.targets import Toward

if TYPE_CHECKING:
    from torch import nn

    from ..schedules import Schedule


class Arguments(TypedDict, total=False):
    """The keyword arguments of `wdhook.attach`, less those that a framework knows itself."""

    mode: Mode | None
    at: Moment
    lr: LearningRate | None
    overrides: Overrides | None
    recipe: Recipe | None
    foreach: bool | None
    low_precision: LowPrecision | None
    cautious: bool
    toward: Toward | None
    inputs: Any | None


class Attached:
    """A callback that attaches when a training run begins, and removes when it ends."""

    decay: WeightDecay | None = None
    """The handle of the run that is going on, else None. Set its ``weight_decay`` to change λ."""

    def __init__(self, weight_decay: float | Schedule | Plan, arguments: Mapping[str, Any]) -> None:
        unknown = [name for name in arguments if name not in Arguments.__annotations__]
        if unknown:
            raise ArgumentError(
                f"`{unknown[0]}` is no argument of {type(self).__name__}: the framework's "
                "optimizers and scaler are found when training begins.\n"
                f"  known: weight_decay, {', '.join(Arguments.__annotations__)}"
            )
        self.weight_decay = weight_decay
        self.arguments = dict(arguments)

    def attach(
        self, model: nn.Module, optimizers: Iterable[Any], scaler: Any | None
    ) -> WeightDecay:
        """Attach to `model`, in place of an earlier run that has not removed its handle."""
        self.remove()
        self.decay = attach(
            model, self.weight_decay, optimizer=list(optimizers), scaler=scaler, **self.arguments
        )
        return self.decay

    def remove(self) -> None:
        """Remove the handle now. A run that ends does this by itself."""
        if self.decay is not None:
            self.decay.remove()
            self.decay = None
