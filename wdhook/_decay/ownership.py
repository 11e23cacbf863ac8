"""Optimizers as far as they concern one handle: which decayed parameters each owns, and on which
terms."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from .config import Config
from .entry import Entry, Pair, Peak, Place, Terms
from .optimizers import (
    announces_steps,
    inner_optimizers,
    owned_ids,
    zeroes_by_foreach,
)
from .parameters import Known, Parameters
from .rate import Rate
from .stand_ins import Loan, StandIn, stand_ins
from .tally import of_bucket
from .window import Clock

Bucket = tuple[Terms, list[Pair]]


class View:
    """The param groups of one optimizer, as far as they concern one handle.

    Attributes:
        clock: counts the optimizer's steps.
        buckets: for each param group, its decayed parameters by terms.
        wraps: the optimizer holds another one that owns decayed parameters.
        sample: the smallest of those; None where there is none.
        params: all parameters of each group, when the view was made.
        dtypes: of the first parameter of each bucket, when the view was made.
        loans: parts of flat tensors that the optimizer steps in place of decayed parameters.
        counts: its steps are steps of the handle; of the flat tensors of one optimizer, those of
            the first are.
        changes: how often the view was made.
        lazy: some parameter was not materialised when the view was made.
        unchecked: no step has been checked since the view was made.
        begun: a step has begun since then.
    """

    __slots__ = (
        "begun",
        "buckets",
        "changes",
        "clock",
        "counts",
        "dtypes",
        "lazy",
        "loans",
        "params",
        "sample",
        "unchecked",
        "wraps",
    )

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.buckets: list[list[Bucket]] = []
        self.wraps = False
        self.sample: Tensor | None = None
        self.params: list[list[Tensor]] = []
        self.dtypes: list[torch.dtype] = []
        self.loans: list[Loan] = []
        self.counts = True
        self.changes = 0
        self.lazy = False
        self.unchecked = True
        self.begun = False

    def is_current(self, optimizer: Any) -> bool:
        """The optimizer holds the parameters that it held when the view was made, in the same
        precision."""
        groups = optimizer.param_groups
        if self.lazy or len(groups) != len(self.params):
            return False
        for group, known in zip(groups, self.params, strict=True):
            params = group["params"]
            if len(params) != len(known) or not all(map(is_, params, known)):
                return False
        if not all(loan.is_current() for loan in self.loans):
            return False
        dtypes = (pairs[0][0].dtype for _, pairs in chain.from_iterable(self.buckets))
        return all(map(is_, dtypes, self.dtypes))

    def all_buckets(self) -> Iterator[Bucket]:
        """The buckets of all groups."""
        return chain.from_iterable(self.buckets)

    def pairs(self) -> Iterator[Pair]:
        """Every decayed parameter that the optimizer owns, with its entry."""
        return chain.from_iterable(pairs for _, pairs in self.all_buckets())

    def owns_any(self) -> bool:
        """The optimizer owns a decayed parameter."""
        return any(self.buckets)

    def some_paid(self) -> bool:
        """The decay of some parameter has been paid since the last step."""
        return any(entry.paid for _, entry in self.pairs())

    def borrow_gradients(self) -> None:
        """Let parts of flat tensors have their parts of the gradients that are there now."""
        for loan in self.loans:
            loan.borrow()

    def give_gradients_back(self) -> None:
        """Let go of those gradients: the step has ended."""
        for loan in self.loans:
            loan.give_back()


class Optimizers:
    """The optimizers that a handle has met, and the decayed parameters that each owns."""

    def __init__(self, config: Config, parameters: Parameters, rate: Rate) -> None:
        self._config = config
        self._parameters = parameters
        self._rate = rate
        self._views: Any = WeakIdKeyDictionary()
        # id of a parameter → the wrapper group that lends it an lr
        self._lenders: dict[int, Place] = {}

    def given(self) -> list[Any]:
        """The optimizers given to `attach` that still exist."""
        return [o for ref in self._config.optimizers if (o := ref()) is not None]

    def was_given(self, optimizer: Any) -> bool:
        """The optimizer was given to `attach`."""
        return any(optimizer is other for other in self.given())

    def met(self) -> list[Any]:
        """Every optimizer, or flat tensor of one, that owns a decayed parameter and was given or
        has stepped."""
        return [o for o, view in list(self._views.items()) if view.owns_any()]

    def has_met(self) -> bool:
        """There is such an optimizer. Asked at each step, so it ends with the first."""
        return any(view.owns_any() for view in self._views.values())

    def views(self) -> list[View]:
        """The views of all optimizers that were met."""
        return list(self._views.values())

    def known_view(self, optimizer: Any) -> View | None:
        """The view of an optimizer that was met before, as it was then."""
        view: View | None = self._views.get(self._key(optimizer))
        return view

    def _key(self, optimizer: Any) -> Any:
        """The optimizer, or the flat tensor that it steps now, where it steps several in turn.

        ZeRO lets its optimizer step the flat tensors of its param groups one after the other, each
        in a step of its own: each has a clock, so that a schedule goes on once for each step of the
        engine.
        """
        params = list(islice(chain.from_iterable(g["params"] for g in optimizer.param_groups), 2))
        if len(params) != 1 or self._parameters.entry(params[0]) is not None:
            return optimizer
        if params[0] in self._views:
            return params[0]
        view = self._views.get(optimizer)
        if view is not None and view.is_current(optimizer):
            return optimizer  # as when it was met: no walk through the model at each step
        if next(inner_optimizers(optimizer), None) is not None:
            return optimizer  # a wrapper shows the groups of the optimizer inside
        if any(params[0] is one.stepped for _, one in self._stand_ins() if one.numel is not None):
            return params[0]
        return optimizer

    def _counts_already(self) -> bool:
        """A flat tensor with decayed parameters is stepped in its turn, and counts the steps."""
        known = list(self._views.items())
        return any(view.loans for key, view in known if isinstance(key, Tensor))

    def _stand_ins(self, stepped: Iterable[Tensor] = ()) -> Iterator[tuple[Tensor, StandIn]]:
        return stand_ins((found.param for found in self._parameters.walk()), stepped)

    def forget(self) -> None:
        """Forget every view: they are made anew when they are asked for."""
        for view in self.views():
            view.params = []

    def clear(self) -> None:
        """Forget every optimizer."""
        self._views.clear()
        self._lenders.clear()

    # ---------------------------------------------------------------- making views

    def meet(self, optimizer: Any) -> View:
        """The view of an optimizer, made anew if its parameters have changed."""
        key = self._key(optimizer)
        view: View | None = self._views.get(key)
        if view is not None and view.is_current(optimizer):
            return view
        before = [] if view is None else list(view.pairs())
        if view is None:
            view = View(self._rate.new_clock(announces_steps(optimizer)))
            view.counts = key is optimizer or not self._counts_already()
        if self.was_given(optimizer):
            self._lend(optimizer)
        self._fill(view, optimizer)
        self._views[key] = view  # only now: a look that raised is no look
        self._release(view, before)
        return view

    def _lend(self, wrapper: Any) -> None:
        """Note the groups of a wrapper that was given.

        Its schedule is the one that counts: ZeroRedundancyOptimizer hands it on at the step, after
        the backward pass.
        """
        inner = owned_ids(inner_optimizers(wrapper))
        for index, group in enumerate(wrapper.param_groups):
            for param in group["params"]:
                if id(param) in inner:
                    self._lenders[id(param)] = weakref.ref(wrapper), index
        if inner:
            for optimizer in inner_optimizers(wrapper):
                self.meet(optimizer)

    def _fill(self, view: View, optimizer: Any) -> None:
        decided = self._parameters.decided()
        inner = owned_ids(inner_optimizers(optimizer))
        groups = [list(group["params"]) for group in optimizer.param_groups]
        # A wrapper (SAM, Lookahead) lets the optimizer inside step, whose step is the real one.
        own = [[p for p in params if id(p) not in inner] for params in groups]
        view.lazy = any(map(is_lazy, chain.from_iterable(own)))
        wrapped = [p for params in groups for p in params if id(p) in inner]
        view.loans = []
        entries = [self._entries_of(params, decided, view) for params in own]
        if not view.changes:
            self._rate.meet(view.clock, [entry for pairs in entries for _, entry in pairs])
        held = Counter(id(entry.peak) for entry in self._parameters.entries())
        view.buckets = [
            self._buckets(view, optimizer, index, pairs, held)
            for index, pairs in enumerate(entries)
        ]
        governed = self._parameters.governed()
        decayed = [p for p in wrapped if id(p) in governed]
        view.sample = min(decayed, key=Tensor.numel, default=None)
        view.wraps = any(key in decided for key in inner)
        view.dtypes = [pairs[0][0].dtype for _, pairs in view.all_buckets()]
        view.params = groups
        view.changes += 1
        view.unchecked = True
        view.begun = False

    def _entries_of(
        self, params: list[Tensor], decided: dict[int, Known], view: View
    ) -> list[Pair]:
        found: list[Pair] = []
        others: dict[int, Tensor] = {}
        for param in params:
            if is_lazy(param):
                continue  # neither its device nor its dtype is settled
            entry = self._parameters.track(param, decided.get(id(param)))
            if entry is not None:
                found.append((param, entry))
            elif id(param) not in decided:
                others[id(param)] = param
        if others:
            found += self._entries_behind(others, decided, view)
        return found

    def _entries_behind(
        self, stepped: dict[int, Tensor], decided: dict[int, Known], view: View
    ) -> Iterator[Pair]:
        """The parameters that tensors of an engine stand for, with those in their place."""
        for param, stand_in in self._stand_ins(stepped.values()):
            if id(stand_in.stepped) not in stepped:
                continue
            entry = self._parameters.track(param, decided.get(id(param)))
            if entry is None:
                continue
            if stand_in.numel is None:
                yield stand_in.stepped, entry
                continue
            loan = Loan(stand_in)
            view.loans.append(loan)
            yield loan.part, entry

    def _buckets(
        self, view: View, optimizer: Any, index: int, pairs: list[Pair], held: Mapping[int, int]
    ) -> list[Bucket]:
        """The decayed parameters of one group, by terms; each goes over to the clock of the
        optimizer.

        Args:
            view: of the optimizer.
            optimizer: whose group it is.
            index: of the group.
            pairs: the parameters, with their entries.
            held: id of a peak → how many parameters have it.
        """
        blind = zeroes_by_foreach(optimizer)
        own = weakref.ref(optimizer), index
        peaks = _peaks(pairs, held)
        buckets: dict[Any, Bucket] = {}
        lent: dict[Any, Terms] = {}
        for param, entry in pairs:
            entry.move(view.clock)
            entry.blind = blind and hasattr(param, "to_local")
            others = self._belongs_to_given(entry, optimizer)
            if not others or entry.peak.value is None:
                entry.peak = peaks[id(entry.peak)]
            key = (*Terms.key(own, entry, param), id(entry.progress.tally))
            if key not in buckets:
                buckets[key] = Terms(view.clock, own, entry, param), []
            buckets[key][1].append((param, entry))
            if others:
                continue
            entry.terms = buckets[key][0]
            lender = self._lenders.get(id(param))
            if lender is not None and lender[0]() is not None:
                key = Terms.key(lender, entry, param)
                if key not in lent:
                    lent[key] = Terms(view.clock, lender, entry, param, owner=own)
                entry.terms = lent[key]
        for bucket in buckets.values():
            self._share_a_tally(bucket)
        return list(buckets.values())

    def _share_a_tally(self, bucket: Bucket) -> None:
        """Give the parameters of a bucket a tally that no others have."""
        terms, pairs = bucket
        before = terms.tally
        terms.tally, parted = of_bucket(before, len(pairs))
        for _, entry in pairs:
            entry.progress.tally = terms.tally
        for view in self.views() if parted else ():
            if any(others.tally is before for others, _ in view.all_buckets()):
                view.params = []  # another optimizer steps some of the parameters too

    def _belongs_to_given(self, entry: Entry, optimizer: Any) -> bool:
        """The hook of a parameter goes by an optimizer that was given, and `optimizer` is none."""
        known = entry.terms.group()
        return known is not None and self.was_given(known[0]) and not self.was_given(optimizer)

    def _release(self, view: View, before: list[Pair]) -> None:
        """Let go of what the optimizer no longer owns: its steps are no longer steps of those
        parameters."""
        kept = {id(entry) for _, entry in view.pairs()}
        orphans = [(p, e) for p, e in before if id(e) not in kept and e.clock is view.clock]
        if not orphans:
            return
        clock = self._rate.new_clock()
        clock.finished = view.clock.finished
        clock.weight_decay = view.clock.weight_decay
        for param, entry in orphans:
            entry.move(clock)
            entry.terms = self._parameters.unowned_terms(entry, param)


def _peaks(pairs: list[Pair], held: Mapping[int, int]) -> dict[int, Peak]:
    """id of a peak so far → the one of a param group from now on: a new one of the same value,
    where parameters of others have that peak too."""
    mine = Counter(id(entry.peak) for _, entry in pairs)
    peaks: dict[int, Peak] = {}
    for _, entry in pairs:
        peak, key = entry.peak, id(entry.peak)
        if key not in peaks:
            parts = held[key] > mine[key] or not peak.shared
            peaks[key] = Peak(peak.value, shared=True) if parts else peak
    return peaks
