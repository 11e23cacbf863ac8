"""λ now, learning rates and their peaks, and how far a run has come."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._base.errors import LearningRateError
from .._base.problem import Problem
from .._base.validate import check_factor, is_number
from .._plan.decision import Decision
from .._plan.names import plain_name
from ..schedules import Schedule
from .entry import Entry, Peak, Progress, Terms
from .formulas import Formula, Rates
from .optimizers import LearningRate, known_rates, learning_rate, maximizes
from .tensors import Number
from .window import Clock

NO_PROGRESS: Mapping[str, Any] = {"lr_peaks": (), "finished_steps": ()}


class Rate:
    """The numbers that decay is computed with, and their place in a checkpoint.

    λ belongs to a clock: each optimizer counts its own steps, and a schedule is a function of that
    count.
    """

    def __init__(self, weight_decay: float, schedule: Schedule | None, lr: LearningRate | None):
        self.weight_decay = weight_decay
        self._schedule = schedule
        self._lr = lr
        self._clocks: weakref.WeakSet[Clock] = weakref.WeakSet()
        self._saved_peaks: dict[str, Number] = {}  # loaded, of parameters not met yet
        self._saved_steps: dict[str, int] = {}
        self._after: dict[int, Clock] = {}  # of unowned parameters, by finished steps

    # ---------------------------------------------------------------- λ

    def new_clock(self, announced: bool = True) -> Clock:
        """A clock for an optimizer, or for the parameters of which none is known."""
        clock = Clock(self.weight_decay, announced)
        self._clocks.add(clock)
        return clock

    def set(self, weight_decay: float) -> None:
        """Change λ of every optimizer's next step."""
        self.weight_decay = weight_decay
        for clock in self._clocks:
            clock.weight_decay = weight_decay

    def weight_decay_of(self, decision: Decision, entry: Entry | None) -> float:
        """λ of a parameter now; at "step" it has no entry before the first one."""
        if entry is not None:
            return entry.weight_decay
        return self.weight_decay if decision.follows else decision.weight_decay

    def close_windows(self) -> None:
        """A step was taken that nobody announced: every window ends."""
        for clock in self._clocks:
            clock.steps += 1

    def advance(self, clock: Clock) -> None:
        """A step has been taken: go on to the next λ of the schedule."""
        if self._schedule is not None:
            clock.finished += 1
            self._follow(clock)

    def _follow(self, clock: Clock) -> None:
        assert self._schedule is not None
        λ = check_factor(self._schedule(clock.finished), f"weight_decay({clock.finished})")
        clock.weight_decay = self.weight_decay = λ

    # ---------------------------------------------------------------- numbers of a payment

    def of(self, terms: Terms, formula: Formula) -> Rates | None:
        """The numbers of a payment now; None where no learning rate can be known yet.

        Raises:
            LearningRateError: the learning rate is missing, negative, not finite or not the
            effective one.
        """
        owner, known = terms.owner_group(), terms.group()
        sign = -1.0 if owner is not None and maximizes(*owner) else 1.0
        if not formula.needs_lr:
            return Rates(terms.weight_decay, sign=sign)
        if known is None and terms.place is not None:
            # the optimizer is gone, or its group: a parameter that is not stepped does not shrink
            return None
        lr = self._learning_rate(None if known is None else known[1], formula)
        if lr is None:
            return None
        peak = self._raise_peak(terms, known[1], lr) if formula.needs_peak and known else None
        return Rates(terms.weight_decay, lr, peak, sign, terms.dtype)

    def note_peak(self, terms: Terms, formula: Formula) -> None:
        """Note the learning rate of a step at which λ is 0."""
        if formula.needs_peak:
            self.of(terms, formula)

    def _learning_rate(self, group: Mapping[str, Any] | None, formula: Formula) -> Number | None:
        if group is not None:
            return check_lr(learning_rate(group, self._lr), group)
        if is_number(self._lr) and not formula.needs_peak:
            return self._lr
        return None

    def _raise_peak(self, terms: Terms, group: Mapping[str, Any], lr: Number) -> Number:
        known = [*known_rates(group), lr]
        if terms.peak.value is not None:
            known.append(terms.peak.value)
        terms.peak.value = largest(known)
        return terms.peak.value

    # ---------------------------------------------------------------- the place in a run

    def meet(self, clock: Clock, entries: Iterable[Entry]) -> None:
        """Let a clock go on where its parameters were, or where they were saved.

        Args:
            clock: of an optimizer that was looked at.
            entries: the parameters that it owns, with the clocks that they had before.
        """
        if self._schedule is None:
            return
        before = [clock.finished]
        for entry in entries:
            before.append(entry.clock.finished)
            before.append(self._saved_steps.pop(plain_name(entry.name), 0))
        clock.finished = max(before)
        self._follow(clock)

    def recall_peak(self, entry: Entry) -> None:
        """Give a parameter that is met the peak that was saved under its name."""
        name = plain_name(entry.name)
        if name in self._saved_peaks:
            entry.peak = Peak(self._saved_peaks.pop(name))

    def save(self, progress: Mapping[str, Progress]) -> dict[str, Any]:
        """``lr_peaks``: parameter → lr; ``finished_steps``: parameter → steps of its optimizer.

        Each in a tuple, which torch.distributed.checkpoint saves as one object: it looks into
        lists and mappings, and then loads no more than the keys that are there already.
        """
        peaks, steps = dict(self._saved_peaks), dict(self._saved_steps)
        for name, of in progress.items():
            if of.peak.value is not None:
                peaks[name] = plain(of.peak.value)
            steps.setdefault(name, of.clock.finished)
        finished = () if self._schedule is None else (steps,)
        return {"lr_peaks": (peaks,) if peaks else (), "finished_steps": finished}

    def load(self, state: Mapping[str, Any], entries: Iterable[tuple[str, Entry]]) -> None:
        """Undo of `save`. What is saved of parameters that are not known waits until they are
        met.

        Args:
            state: what was saved.
            entries: of the parameters that are known, by their names in checkpoints.
        """
        self._saved_peaks = {n: lr for known in state["lr_peaks"] for n, lr in known.items()}
        self._saved_steps = {n: k for known in state["finished_steps"] for n, k in known.items()}
        shared: dict[Any, Peak] = {}
        for clock in self._clocks:
            clock.finished = 0
        self._after.clear()
        for name, entry in entries:
            peak = self._saved_peaks.pop(name, None)
            key = peak if is_number(peak) else id(peak)
            entry.peak = shared.setdefault(key, Peak(peak))
            steps = self._saved_steps.pop(name, 0)
            if entry.terms.place is None:
                entry.move(self._clock_after(steps))
            else:
                entry.clock.finished = max(entry.clock.finished, steps)
        λ = self.weight_decay
        for clock in self._clocks if self._schedule is not None else ():
            self._follow(clock)
        self.weight_decay = λ

    def _clock_after(self, steps: int) -> Clock:
        """A clock for parameters of which no optimizer is known, after so many finished steps."""
        if steps not in self._after:
            clock = self._after[steps] = self.new_clock()
            clock.finished = steps
            if self._schedule is not None:
                λ = self.weight_decay
                self._follow(clock)
                self.weight_decay = λ
        return self._after[steps]


def check_lr(lr: Number, group: Mapping[str, Any]) -> Number:
    """`lr`, if it is a number that a step can be made with.

    Raises:
        LearningRateError: it is negative or not finite. A tensor on a device is not read.
    """
    value = lr.item() if isinstance(lr, Tensor) and lr.is_cpu and lr.numel() == 1 else lr
    if isinstance(value, Tensor) or (is_number(value) and math.isfinite(value) and value >= 0):
        return lr
    raise LearningRateError(
        Problem(
            "The learning rate of decoupled decay must be finite and not negative.",
            "Mend the function given as `lr=`, or the param group's lr",
            {"lr": lr, "group['lr']": group.get("lr", "missing")},
        )
    )


def largest(rates: list[Number]) -> Number:
    """The largest of several learning rates, on the device of those that are tensors."""
    device = next((rate.device for rate in rates if isinstance(rate, Tensor)), None)
    if device is None:
        return max(rates)
    return torch.stack([torch.as_tensor(rate, device=device).detach() for rate in rates]).max()


def plain(rate: Number) -> Number:
    """A number as a checkpoint holds it: numpy's as Python's, a tensor as it is."""
    return rate if isinstance(rate, Tensor) else float(rate)
