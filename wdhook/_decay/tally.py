"""Counts of decay: the part of a parameter that the decay of all steps so far would leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from . import tensors
from .tensors import Number


class Tally:
    """The decay of all finished steps, added up for the parameters that have had the same.

    One addition for each param group and step; what is on a device stays there until it is read.

    Attributes:
        sharers: parameters that have this tally.
        known: False once a step was taken whose decay cannot be told.
    """

    __slots__ = ("_on_device", "_sum", "known", "sharers")

    def __init__(self, dose: float | None = 0.0) -> None:
        self._sum = dose or 0.0
        self._on_device: Tensor | None = None  # product of the factors, 0-dim
        self.known = dose is not None
        self.sharers = 0

    @property
    def is_empty(self) -> bool:
        """No step has been counted."""
        return self.known and not self._sum and self._on_device is None

    def count(self, factor: Number | None, device: torch.device | None, replayed: bool) -> None:
        """Count one step.

        Args:
            factor: what decay alone multiplies a parameter with; None where nobody can tell.
            device: where the factor is, or has to be counted; None for Python.
            replayed: the step may be replayed by a CUDA graph, which runs no Python.
        """
        if factor is None or (replayed and device is None):
            self.known = False
        elif device is not None:
            self._count_on_device(factor, device, replayed)
        else:
            self._sum -= math.log(abs(float(factor))) if factor else -math.inf

    def _count_on_device(self, factor: Number, device: torch.device, replayed: bool) -> None:
        if self._on_device is None:
            if replayed and tensors.is_capturing():
                self.known = False  # a graph would make the number anew in each replay
                return
            self._on_device = torch.ones((), dtype=tensors.widest(device), device=device)
        if isinstance(factor, Tensor):
            factor = factor.detach().to(self._on_device.device, non_blocking=True).reshape(())
        self._on_device.mul_(factor)

    def copy(self) -> Tally:
        """The same count, which goes on by itself."""
        copy = Tally(self._sum)
        copy.known = self.known
        copy._on_device = None if self._on_device is None else self._on_device.clone()
        return copy

    def read(self) -> float | None:
        """−Σ log|factor|; None where nobody can tell. Waits for the device if a factor is there."""
        if not self.known:
            return None
        share = 1.0 if self._on_device is None else abs(float(self._on_device))
        return self._sum - math.log(share) if share else math.inf


class Tallies:
    """Tallies as a checkpoint holds them, by the names of the parameters."""

    def __init__(self) -> None:
        self._saved: dict[str, float | None] = {}  # of parameters that have not been met yet

    def waiting(self, name: str) -> Tally | None:
        """A copy of the tally that was saved of a parameter that is not met yet."""
        return Tally(self._saved[name]) if name in self._saved else None

    def recall(self, name: str) -> Tally | None:
        """The tally that was saved of a parameter that is met."""
        if name not in self._saved:
            return None
        tally = Tally(self._saved.pop(name))
        tally.sharers = 1
        return tally

    def save(self, tallies: Mapping[str, Tally]) -> tuple[dict[str, float | None], ...]:
        """Name → dose, in a tuple, which torch.distributed.checkpoint saves as one object. Waits
        for the device if numbers are there.

        Args:
            tallies: of the parameters that are known.
        """
        read = {id(tally): tally.read() for tally in tallies.values()}
        saved = {**self._saved, **{name: read[id(tally)] for name, tally in tallies.items()}}
        return (saved,) if saved else ()

    def load(
        self, saved: Iterable[Mapping[str, float | None]] | None, names: Iterable[str]
    ) -> list[Tally | None]:
        """Undo of `save`: the tallies of parameters that are known, in the order of `names`.

        Parameters with one dose share one tally, until they are in different param groups.

        Args:
            saved: None of a state of before there were tallies: no dose is known.
            names: of the parameters.
        """
        if saved is None:
            saved = (dict.fromkeys(names),)
        self._saved = {name: dose for known in saved for name, dose in known.items()}
        shared: dict[float | None, Tally] = {}
        found: list[Tally | None] = []
        for name in names:
            tally = None
            if name in self._saved:
                dose = self._saved.pop(name)
                tally = shared.setdefault(dose, Tally(dose))
                tally.sharers += 1
            found.append(tally)
        return found


def of_bucket(tally: Tally | None, parameters: int) -> tuple[Tally, bool]:
    """The tally of parameters that are decayed together from now on.

    Args:
        tally: the one that all of them have, if any.
        parameters: how many they are.

    Returns:
        The tally, and whether it is a new one in place of one that others have too.
    """
    if tally is not None and tally.sharers == parameters:
        return tally, False
    new = Tally() if tally is None else tally.copy()
    if tally is not None:
        tally.sharers -= parameters
    new.sharers = parameters
    return new, tally is not None
