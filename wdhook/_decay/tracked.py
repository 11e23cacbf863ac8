"""What an attached engine remembers: its settings, its parameters, and the optimizers that it has met."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._plan.plan import Plan
from ..schedules import Schedule
from .formulas import Number
from .optimizers import LearningRate, tells_of_steps
from .window import Owner, Window


@dataclass(frozen=True)
class Settings:
    """The arguments of `attach` that say how, not how much."""

    mode: str
    at: str
    optimizers: tuple[weakref.ref[Any], ...]
    lr: LearningRate | None
    scaler: Any | None
    foreach: bool | None
    schedule: Schedule | None
    replan: Callable[[nn.Module, float], Plan] = field(repr=False)


class Entry(Window):
    """One decayed parameter: its window, its λ and its hook. Owned by the hook, so it dies with the parameter.

    It does not refer to the parameter, not even weakly: `torch.utils.swap_tensors` refuses those.
    """

    __slots__ = ("alpha", "follows", "handle", "name", "place", "sign", "weight_decay")

    def __init__(self, name: str, weight_decay: float, follows: bool, owner: Owner) -> None:
        super().__init__(owner)
        self.name = name
        self.follows = follows  # λ is that of the handle, not an absolute one
        self.sign = 1.0  # -1.0 where the optimizer maximizes, and so negates the gradient
        self.set(weight_decay)
        self.handle: RemovableHandle | None = None
        self.place: tuple[weakref.ref[Any], int] | None = (
            None  # optimizer, index of the param group
        )

    def set(self, weight_decay: float) -> None:
        """Change λ."""
        self.weight_decay = weight_decay
        self.alpha = (
            weight_decay if self.sign > 0 else -weight_decay
        )  # what coupled decay adds, times the parameter


Pair = tuple[Tensor, Entry]


class View:
    """The param groups of one optimizer, as far as they concern us."""

    def __init__(self, optimizer: Any) -> None:
        self.owner = Owner(heard=tells_of_steps(optimizer))
        self.params: list[list[Tensor]] = []  # as they were when the view was made
        self.buckets: list[list[list[Pair]]] = []  # per group: pairs that one foreach call can take
        self.dtypes: list[
            torch.dtype
        ] = []  # of the first parameter in each bucket, when the view was made
        self.peaks: dict[int, Number] = {}  # per group: the largest lr so far
        self.strays: list[Pair] = []  # tracked, and in no group of any optimizer given
        self.turned: str | None = None  # decayed before it was known that the optimizer maximizes
        self.wraps = False  # the optimizer holds another one that owns decayed parameters
        self.sample: Tensor | None = None  # the smallest of those
        self.cleared = False  # the optimizer steps no copies of ours
        self.checked = False

    def is_current(self, optimizer: Any) -> bool:
        """Whether the optimizer still holds just the parameters that it held when the view was made.

        Converting a model keeps its parameters, and what can be said of their precision changes.
        """
        groups = optimizer.param_groups
        return (
            len(groups) == len(self.params)
            and all(
                len(group["params"]) == len(known) and all(map(is_, group["params"], known))
                for group, known in zip(groups, self.params, strict=True)
            )
            and all(
                map(
                    is_,
                    (pairs[0][0].dtype for pairs in chain.from_iterable(self.buckets)),
                    self.dtypes,
                )
            )
        )

    def peaks_by_name(self) -> dict[str, Number]:
        """Parameter → largest lr of its param group, as plain numbers where they are no tensors."""
        return {
            entry.name: peak if isinstance(peak := self.peaks[index], Tensor) else float(peak)
            for index, buckets in enumerate(self.buckets)
            if index in self.peaks
            for _, entry in chain.from_iterable(buckets)
        }

    def set_peaks(self, known: Mapping[str, Number]) -> bool:
        """Undo of `peaks_by_name`; False where it names no parameter of this optimizer."""
        found = {
            index: known[entry.name]
            for index, buckets in enumerate(self.buckets)
            for _, entry in chain.from_iterable(buckets)
            if entry.name in known
        }
        self.peaks.update(found)
        return bool(found)

    def entries(self) -> Iterator[Entry]:
        """Of all decayed parameters that the optimizer owns."""
        return (entry for _, entry in chain.from_iterable(chain.from_iterable(self.buckets)))

    def has_entries(self) -> bool:
        """Whether the optimizer owns any decayed parameter."""
        return any(self.buckets)
