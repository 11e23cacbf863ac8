"""One optimizer step that runs, and the part that each handle has in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._base.torch_private import version, versions
from . import tensors
from .call_stack import Running
from .engine import Engine
from .entry import Due, Entry, Terms
from .formulas import How, Rest
from .optimizers import is_capturable, only_accumulates, sgd_gain
from .ownership import Bucket, View
from .payment import begin, pay
from .rules.base import Facts, Moment
from .tensors import is_capturing
from .window import STEP_AFTER_HOOK, STEP_ALONE, Answer, Evidence
from .zeroing import is_distributed


class Part:
    """The part of one handle in a step: its checks, its payments, its end."""

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.view: View = engine.view(optimizer)
        self._begun_at = self.view.clock.steps
        self.sample: Tensor | None = None  # of the parameters of a wrapper, before its step
        self._rests: list[Rest] = []

    @property
    def is_active(self) -> bool:
        """The handle decays in this step: not while it is paused, nor once it is removed.

        Nor where the optimizer only accumulates.
        """
        return (
            self.view.owns_any()
            and not self.engine.closed
            and not self.engine.state.pauses
            and not only_accumulates(self.optimizer)
        )

    # ---------------------------------------------------------------- before

    def check(self, running: Running, claimed: bool) -> None:
        """Raise for everything that would make the decay of this step wrong. Changes nothing."""
        state = self.engine.state
        if state.pauses:
            return
        owner = self.view.owns_any()
        moment = Moment.STEP if owner else Moment.FOREIGN_STEP
        facts = Facts(state, self.optimizer, self.view, running, claimed)
        self.engine.rules.check(moment, facts)
        self.view.unchecked = False

    def begin(self) -> None:
        """The step begins: what is kept for its end."""
        if (
            self.view.wraps
            and self.view.sample is not None
            and not self.engine.state.config.in_backward
        ):
            self.sample = self.view.sample.detach().clone()
        if self.view.owns_any():
            self.engine.state.announced = True
            self.engine.passes.forget()
            self.engine.state.captured |= is_capturing()
            if not self.view.begun:
                state = self.engine.state
                begin(state, ((param, entry.memo) for param, entry in self.view.pairs()))
                begin(state, state.parameters.trained())  # other processes may step them
                self.view.begun = True

    def was_moved(self) -> bool:
        """The step of a wrapper has moved the parameters. Some write to ``p.data``, so the content
        tells."""
        return self.sample is not None and not torch.equal(self.view.sample, self.sample)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- payment

    def decay(self, nested: bool, evaluated: bool) -> None:
        """Decay what has a gradient and was not decayed in this window.

        Args:
            nested: another step of this handle, which has decayed, runs this one inside.
            evaluated: the closure of the step has just run; it may run again before the step ends.
        """
        if not self.is_active:
            return
        self.view.borrow_gradients()
        inside = nested and not evaluated
        dues = []
        for bucket in self.view.all_buckets():
            if not bucket[0].weight_decay:
                self.engine.state.rate.note_peak(bucket[0], self.engine.state.config.formula)
                continue
            due = self._due(bucket, inside)
            if due.params:
                dues.append(due)
        if not dues or self.was_skipped():
            return
        for due in dues:
            self._notice_replay(due.entries[0], due.grads[0])
        self._rests += pay(self.engine.state, dues, self._how)
        self.engine.cover(dues)

    def _due(self, bucket: Bucket, nested: bool) -> Due:
        terms, pairs = bucket
        due = Due(terms)
        clock = self.view.clock
        steps = clock.steps
        in_gradient = self.engine.state.config.in_gradient
        params, grads, entries = due.params, due.grads, due.entries
        paid: list[Entry] = []
        held: list[Tensor] = []
        for param, entry in pairs:
            grad = param.grad
            if grad is None:
                continue
            if entry.clock is not clock:
                entry.move(clock)
            if entry.stamp == steps:
                if not in_gradient:
                    continue
                if entry.handle is not None and entry.doubted != steps and entry.holds(grad):
                    paid.append(entry)  # the short cut of STEP_AFTER_HOOK
                    held.append(grad)
                    continue
            elif not in_gradient or not entry.holds(grad):
                params.append(param)  # the short cut of UNPAID, and `Due.add` without a frame
                grads.append(grad)
                entries.append(entry)
                continue
            if self._is_due(entry, grad, nested):
                due.add(param, grad, entry)
        for entry, seen in zip(paid, versions(held), strict=True):
            entry.version = seen
        return due

    def _is_due(self, entry: Entry, grad: Tensor, nested: bool) -> bool:
        """Ask the table of transitions, and act on its answer."""
        hooked = entry.handle is not None
        evidence = entry.when_step_begins(grad, in_buckets=hooked and is_distributed())
        answer = (STEP_AFTER_HOOK if hooked else STEP_ALONE)[evidence]
        if entry.paid and nested and not hooked:
            # An outer optimizer has changed the gradient since it was decayed there.
            answer = Answer.PAID
        if answer is Answer.REFUSE:
            self._tell("ambiguous-gradient", entry)
        elif answer is Answer.TELL:
            self._take(entry, grad, evidence)
        elif answer is Answer.PAID:
            entry.version = version(grad)
        elif entry.paid:
            entry.reopen()
        return answer is Answer.PAY

    def _take(self, entry: Entry, grad: Tensor, evidence: Evidence) -> None:
        """Take a gradient to hold its decay, and say so."""
        if evidence is Evidence.CARRIED:
            entry.stamp = self.view.clock.steps
            if may_be_replayed(grad) and entry.handle is not None:
                # The backward pass is captured: no hook was called since.
                self.engine.state.captured = True
                return
            self._tell("stepped-again", entry)
            return
        self._tell("gradient-replaced", entry)
        entry.look(grad)  # stepped again as it is, it is taken to hold its decay still

    def _notice_replay(self, entry: Entry, grad: Tensor) -> None:
        """A CUDA gradient changed since the last step, and no hook was called: a graph may replay
        the backward."""
        hooked = entry.handle is not None
        if hooked and may_be_replayed(grad) and entry.holds(grad) and not self.view.some_paid():
            self.engine.state.captured = True
            self._tell("replayed-backward", entry)

    def _tell(self, rule: str, entry: Entry) -> None:
        facts = Facts(self.engine.state, self.optimizer, self.view, entry=entry)
        self.engine.rules.tell(rule, facts)

    def _how(self, due: Due) -> How:
        # A fused optimizer under a GradScaler un-scales inside its kernel: its gradients are
        # scaled still.
        scale = getattr(self.optimizer, "grad_scale", None)
        found_inf = getattr(self.optimizer, "found_inf", None)
        return How(
            self.engine.state.config.foreach,
            scale,
            found_inf,
            is_capturable(due.terms.owner_group()),
            is_capturing(),
        )

    def was_skipped(self) -> bool:
        """A fused optimizer will skip the step under a GradScaler, or has skipped it.

        It matters where the parameters were shrunk in the backward: their window stays open.
        Reading the flag costs a synchronisation, as it does the scaler with an optimizer that is
        not fused.
        """
        config = self.engine.state.config
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is None or config.in_gradient or not config.in_backward:
            return False
        return bool(found_inf)

    # ---------------------------------------------------------------- after

    def end(self, nested: bool, again: bool) -> None:
        """The step has ended, and so have the windows of the parameters that the optimizer owns.

        Args:
            nested: this step ran inside another one of the handle.
            again: that one is a step of the same optimizer, as ``super().step()`` is.
        """
        self.sample = None
        self.engine.state.end_of_any_step()
        if not self.view.owns_any() or only_accumulates(self.optimizer) or self.was_skipped():
            return
        alone = self.view.clock.steps == self._begun_at  # no step inside has closed the windows
        suspects = self._suspects() if alone and self.is_active else []
        for rest in self._rests:
            rest()
        state = self.engine.state
        self._count()
        self.view.clock.steps += 1
        state.steps += not nested and self.view.counts
        state.taken.clear()
        self.engine.passes.waiting = 0
        self.engine.passes.dismiss()
        self.engine.passes.forget()
        if not again and not self._schedule_stays():
            state.rate.advance(self.view.clock)
        self._let_gradients_be_swapped()
        self.view.give_gradients_back()
        self.engine.note_step(self.view)
        if suspects:
            facts = Facts(state, self.optimizer, self.view, suspects=suspects)
            self.engine.rules.tell("undecayed", facts)

    def _count(self) -> None:
        """Add the decay of this step to the tally of each bucket. Nothing is read."""
        steps = self.view.clock.steps
        for terms, pairs in self.view.all_buckets():
            for _, entry in pairs:
                if entry.stamp == steps:
                    self._count_bucket(terms, entry)
                    break  # what is decayed together has one tally

    def _count_bucket(self, terms: Terms, entry: Entry) -> None:
        state, known, tally = self.engine.state, terms.owner_group(), terms.tally
        if known is None or tally is None:
            return
        formula = state.config.formula
        gain = sgd_gain(*known) if formula.in_gradient else None
        factor = formula.kept(entry.receipt.number, gain)
        found_inf = getattr(self.optimizer, "found_inf", None)
        if factor is not None and found_inf is not None:
            factor = tensors.unless(found_inf, factor)
        device = terms.device if is_capturable(known) else None
        if isinstance(factor, Tensor):
            device = factor.device
        tally.count(factor, device, state.captured)

    def _schedule_stays(self) -> bool:
        """A fused optimizer has skipped the step under a GradScaler; to read that costs a
        synchronisation."""
        if self.engine.state.config.schedule is None:
            return True
        return bool(getattr(self.optimizer, "found_inf", None))

    def _suspects(self) -> list[tuple[Tensor, Entry]]:
        """Parameters with a gradient that is not 0 and that no decay has reached."""
        steps = self.view.clock.steps
        found = []
        for terms, pairs in self.view.all_buckets():
            if not terms.weight_decay:
                continue
            for param, entry in pairs:
                if entry.stamp != steps and param.grad is not None:
                    found.append((param, entry))
        # Some optimizers put zeros where there was no gradient. Read only what would be reported.
        return [(p, e) for p, e in found if tensors.is_not_zero(p.grad)]

    def _let_gradients_be_swapped(self) -> None:
        """Drop weak references to gradients where converting a model swaps tensors, which refuses
        those."""
        everywhere = torch.__future__.get_swap_module_params_on_conversion()
        for terms, pairs in self.view.all_buckets():
            if everywhere or not terms.plain:
                for _, entry in pairs:
                    entry.buffer = None


class StepInProgress:
    """One optimizer step that runs: the parts of all handles, and its depth among the steps that
    run."""

    __slots__ = ("__weakref__", "depth", "ended", "hooks", "optimizer", "parts")

    def __init__(self, optimizer: Optimizer, parts: list[Part], depth: int) -> None:
        self.optimizer = optimizer
        self.parts = parts
        self.depth = depth
        self.ended = False
        # On the optimizer: one after the step pre-hooks of others, one before their post-hooks.
        self.hooks: list[RemovableHandle] = []

    def drop(self) -> None:
        """The step has ended, or has raised."""
        while self.hooks:
            self.hooks.pop().remove()

    def part_of(self, engine: Engine) -> Part | None:
        """The part of one handle."""
        return next((part for part in self.parts if part.engine is engine), None)


def may_be_replayed(grad: Tensor) -> bool:
    """A CUDA graph may write a new gradient into the buffer, which leaves no trace in its
    version."""
    return grad.is_cuda
