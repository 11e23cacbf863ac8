"""One decayed parameter, and the terms that it shares with others."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .memory import Memo
from .tally import Tally
from .tensors import Number, is_plain
from .window import Clock, Window

Place = tuple[weakref.ref[Any], int]
"""An optimizer, and the index of one of its param groups."""


class Peak:
    """The largest learning rate so far of the parameters that share it: those of a param group.

    Attributes:
        value: None before the first payment.
        shared: a param group has it.
    """

    __slots__ = ("shared", "value")

    def __init__(self, value: Number | None = None, shared: bool = False) -> None:
        self.value = value
        self.shared = shared


_NO_PEAK = Peak()  # of all parameters whose optimizer is not known; nothing is noted in it


class Receipt:
    """What several parameters were decayed with.

    Attributes:
        number: what the formula wrote with (`Formula.number`).
        sign: -1.0 if it was for an optimizer that maximizes, else 1.0.
        is_scaled: a loss scale took part.
    """

    __slots__ = ("is_scaled", "number", "sign")

    def __init__(self, number: Number, sign: float = 1.0) -> None:
        self.number = number
        self.sign = sign
        self.is_scaled = False


_NOTHING = Receipt(0.0)


class Progress:
    """How far a parameter has come: more than its optimizers know, which may be made anew.

    Attributes:
        peak: the largest learning rate so far.
        clock: counts the steps of its optimizer.
        memo: what the formula remembers of the parameter; None for a formula that remembers
            nothing.
        tally: the decay of all steps so far; None before an optimizer is known.
    """

    __slots__ = ("clock", "memo", "peak", "tally")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.peak = _NO_PEAK
        self.memo: Memo | None = None
        self.tally: Tally | None = None

    def copy(self) -> Progress:
        """The same for a second tensor that is made of the parameter."""
        copy = Progress(self.clock)
        copy.memo = None if self.memo is None else self.memo.copy()
        copy.peak = self.peak
        copy.tally = self.tally
        if copy.tally is not None:
            copy.tally.sharers += 1
        return copy


class Terms:
    """The numbers that several parameters share, so that one foreach call can pay for all of them.

    Attributes:
        clock: counts the steps of their optimizer.
        place: the param group whose learning rate they have; None before an optimizer is known.
        owner: the param group that is stepped; another one than `place` where a wrapper's schedule
            counts.
        own: an absolute λ; None where λ is the handle's.
        peak: the largest learning rate so far.
        tally: the decay of all steps so far, where an optimizer is known.
        device, dtype: of the parameters.
        plain: the foreach kernels know them.
    """

    __slots__ = ("clock", "device", "dtype", "own", "owner", "peak", "place", "plain", "tally")

    def __init__(
        self,
        clock: Clock,
        place: Place | None,
        entry: Entry,
        param: Tensor,
        owner: Place | None = None,
    ) -> None:
        self.clock = clock
        self.place = place
        self.owner = place if owner is None else owner
        self.own = entry.own
        self.peak = entry.peak
        self.tally = entry.progress.tally
        self.device = param.device
        self.dtype = param.dtype
        self.plain = is_plain(param)

    @staticmethod
    def key(place: Place | None, entry: Entry, param: Tensor) -> tuple[Any, ...]:
        """Parameters with one key can share terms."""
        group = None if place is None else (id(place[0]()), place[1])
        return group, entry.own, id(entry.peak), param.device, param.dtype, is_plain(param)

    @property
    def weight_decay(self) -> float:
        """λ of the next step."""
        return self.clock.weight_decay if self.own is None else self.own

    def group(self) -> tuple[Any, dict[str, Any]] | None:
        """The optimizer and its param group now; None where there is none.

        Looked up at each use: `load_state_dict` of an optimizer replaces its param groups.
        """
        return _group(self.place)

    def owner_group(self) -> tuple[Any, dict[str, Any]] | None:
        """The optimizer that steps, and its param group now; None where there is none."""
        return _group(self.owner)


def _group(place: Place | None) -> tuple[Any, dict[str, Any]] | None:
    optimizer = None if place is None else place[0]()
    if optimizer is None or place is None:
        return None
    groups = optimizer.param_groups
    return (optimizer, groups[place[1]]) if place[1] < len(groups) else None


class Entry(Window):
    """One decayed parameter: its window, its λ, and what its formula remembers.

    A hook on the parameter owns the entry, which dies with the parameter; at "step", the optimizers
    own it. An entry does not refer to its parameter, not even weakly: `torch.utils.swap_tensors`
    refuses tensors with weak references.

    Attributes:
        name: of the parameter, in the model.
        own: an absolute λ; None where λ is the handle's.
        progress: what outlives the entry.
        receipt: what the last payment was made with.
        terms: numbers shared with other parameters.
        handle: of the hook; None where there is none.
    """

    __slots__ = ("handle", "name", "own", "progress", "receipt", "terms")

    terms: Terms

    def __init__(self, name: str, own: float | None, clock: Clock) -> None:
        super().__init__(clock)
        self.name = name
        self.own = own
        self.progress = Progress(clock)
        self.receipt = _NOTHING
        self.handle: RemovableHandle | None = None

    @property
    def weight_decay(self) -> float:
        """λ of the next step."""
        return self.clock.weight_decay if self.own is None else self.own

    @property
    def peak(self) -> Peak:
        """The largest learning rate so far."""
        return self.progress.peak

    @peak.setter
    def peak(self, peak: Peak) -> None:
        self.progress.peak = peak

    @property
    def memo(self) -> Memo | None:
        """What the formula remembers of the parameter."""
        return self.progress.memo

    def move(self, clock: Clock) -> None:
        """Let another optimizer close this window from now on."""
        super().move(clock)
        self.progress.clock = clock

    def resume(self, progress: Progress) -> None:
        """Go on where the parameter was, or the one that it has replaced."""
        self.progress = progress
        self.clock = progress.clock


Pair = tuple[Tensor, Entry]


class Due:
    """Parameters that are to be decayed together: their gradients, their entries, their terms."""

    __slots__ = ("entries", "grads", "params", "terms")

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.entries: list[Entry] = []

    def add(self, param: Tensor, grad: Tensor, entry: Entry) -> None:
        """Add one parameter."""
        self.params.append(param)
        self.grads.append(grad)
        self.entries.append(entry)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Entry]]:
        return zip(self.params, self.grads, self.entries, strict=True)

    def split_sparse(self) -> tuple[Due, Due]:
        """The parameters with a dense gradient, and those with a sparse one."""
        dense, sparse = Due(self.terms), Due(self.terms)
        for param, grad, entry in self:
            (sparse if grad.is_sparse else dense).add(param, grad, entry)
        return dense, sparse

    def has_sparse(self) -> bool:
        """Some gradient is sparse."""
        return any(map(_is_sparse, self.grads))


_is_sparse = attrgetter("is_sparse")
