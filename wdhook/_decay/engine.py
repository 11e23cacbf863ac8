"""One attached model: composes the owners of facts, and has a beginning and an end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._plan.decision import Decision
from .._plan.names import plain_name
from .._plan.plan import Plan
from .config import Config
from .entry import Due, Entry, Progress
from .memory import Memo, Memory
from .model_ref import ModelRef
from .ownership import Optimizers, View
from .parameters import Parameters
from .passes import Hook, Passes
from .rate import Rate
from .rules.base import Facts, Moment, Rules
from .rules.table import RULES
from .stand_ins import engine_of
from .state import State
from .tally import Tallies


class Engine:
    """One attached model. Refers to it weakly; lives until `close` or the model's end.

    Attributes:
        state: the owners of facts.
        rules: what is checked, and what was warned of.
        passes: the backward passes.
        memory: what the formula remembers of each parameter.
        tallies: those that were saved of parameters that have not been met yet.
        watchers: snapshots that wait for what a step changes.
        closed: nothing is decayed any more.
        on_close: called once, when the engine closes.
    """

    def __init__(self, model: nn.Module, plan: Plan, config: Config) -> None:
        self.watchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.on_close: Callable[[], None] = lambda: None
        self.closed = False
        # Entries that were there when the last module died, by the ids of these references.
        self._outliving: dict[int, weakref.ref[Entry]] = {}
        self.memory = Memory()
        self.tallies = Tallies()
        model_ref = ModelRef(model, self._model_died)
        rate = Rate(plan.weight_decay, config.schedule, config.lr)
        self._unowned = rate.new_clock()
        parameters = Parameters(model_ref, plan, config.replan, self._new_entry)
        self.state = State(config, parameters, Optimizers(config, parameters, rate), rate)
        self.rules = Rules(RULES, self.state)
        self.passes = Passes(self.state, self.rules)

    # ---------------------------------------------------------------- life

    def open(self) -> None:
        """Register a hook on every decayed parameter; all of them or none."""
        try:
            if self._track():
                self.rules.tell("gradient-taken-by-engine", Facts(self.state))
            self.rules.check(Moment.PLAN, Facts(self.state))
            for optimizer in self.state.optimizers.given():
                view = self.view(optimizer)
                if not view.clock.announced:  # no step will come at which the rules could look
                    facts = Facts(self.state, optimizer, view)
                    self.rules.check(Moment.ATTACH, facts)
        except BaseException:
            self.close()
            raise

    def _track(self) -> bool:
        """Meet every parameter; tell whether an engine may take gradients of some away.

        A parameter may have another name in the plan, as with FSDP1: nothing is known of it then.
        """
        parameters, may_have_engine = self.state.parameters, False
        covered: list[tuple[str, Tensor]] = []
        for found in parameters.walk():
            param = found.param
            known = parameters.meet(found)
            entry = parameters.track(param, known)
            if entry is not None:
                self.passes.cover(param, entry)
                if engine_of(param) is not None:
                    may_have_engine = True
                if param.requires_grad and not is_lazy(param):
                    covered.append((entry.name, param))
            if known is None:
                may_have_engine = True
            elif entry is None or entry.handle is None:
                known.remember(param)
        if not self.state.config.in_backward:
            self._watch(covered)
        return may_have_engine

    def _watch(self, covered: list[tuple[str, Tensor]]) -> None:
        for name, param in {id(p): (n, p) for n, p in _some(covered)}.values():
            self.passes.watch(name, param)

    def close(self) -> None:
        """Remove every hook. Nothing of the engine stays on any parameter."""
        self.closed = True
        self.passes.dismiss()
        self.passes.forget()
        self.on_close()
        self.state.parameters.clear()
        self.state.optimizers.clear()

    def _model_died(self) -> None:
        if self.closed:
            return
        # Parameters may be trained on without a module: exported graphs and functional code share
        # them.
        entries = self.state.parameters.entries()
        refs = [weakref.ref(entry, self._entry_died) for entry in entries]
        self._outliving = {id(ref): ref for ref in refs}
        del entries
        self._entry_died(None)

    def _entry_died(self, ref: object) -> None:
        if ref is not None:
            self._outliving.pop(id(ref))
        if not self._outliving and not self.closed:
            self.close()

    def unstepped(self) -> list[weakref.ref[Any]]:
        """Gradients that were decayed and that no step has read."""
        entries = self.state.parameters.entries()
        return [e.buffer for e in entries if e.paid and e.buffer is not None]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No decay inside; may be nested."""
        self.state.pauses += 1
        try:
            yield
        finally:
            self.state.pauses -= 1

    def flush(self) -> None:
        """Write what the formula has collected and not written yet."""
        formula = self.state.config.formula
        with torch.no_grad():
            for param, memo in list(self._remembered()):
                if formula.begins and memo.product is not None:
                    formula.begin_(param, memo)  # a state may have been loaded before any step
                formula.flush_(param, memo)

    def _remembered(self) -> Iterator[tuple[Tensor, Memo]]:
        """Parameters of the model and of optimizers, with their memos. Nothing new is decided."""
        eligible = self.state.parameters.eligible
        for found, known in eligible() if self.state.config.formula.remembers else ():
            if known.progress is not None and known.progress.memo is not None:
                yield found.param, known.progress.memo
        for view in self.state.optimizers.views():
            for param, entry in view.pairs():
                if entry.memo is not None:
                    yield param, entry.memo

    def _new_entry(self, decision: Decision, progress: Progress | None) -> Entry:
        own = None if decision.follows else decision.weight_decay
        config = self.state.config
        if config.in_backward:
            entry: Entry = Hook(decision.name, own, self._unowned, self.passes)
        else:
            entry = Entry(decision.name, own, self._unowned)
        self.state.rate.recall_peak(entry)
        entry.progress.tally = self.tallies.recall(plain_name(entry.name))
        if progress is not None:
            entry.resume(progress)
        if config.formula.remembers and entry.memo is None:
            entry.progress.memo = self.memory.new_memo(decision)
        return entry

    # ---------------------------------------------------------------- facts

    @property
    def plan(self) -> Plan:
        """The decisions on the model as it is now, with the present λ."""
        return self.state.parameters.plan(self.state.rate.weight_decay)

    def last_plan(self) -> Plan:
        """The decisions that were made, with the present λ; nothing new is decided."""
        state = self.state
        return state.parameters.plan(state.rate.weight_decay, decide=False)

    def set_weight_decay(self, value: float) -> None:
        """Change λ."""
        self.rules.check(Moment.SETTER, Facts(self.state, value=value))
        self.state.rate.set(value)

    def view(self, optimizer: Any) -> View:
        """The view of an optimizer; what it owns is hooked."""
        known = self.state.optimizers.known_view(optimizer)
        changes = 0 if known is None else known.changes
        view = self.state.optimizers.meet(optimizer)
        if view.changes != changes:
            for param, entry in view.pairs():
                self.passes.cover(param, entry)
        return view

    def cover(self, dues: Iterable[Due]) -> None:
        """Hook what was decayed at a step and has no hook: it was unfrozen since, and its
        gradients are to be seen."""
        if self.state.config.in_backward:
            for due in dues:
                for param, _, entry in due:
                    if entry.handle is None:
                        self.passes.cover(param, entry)

    def note_step(self, view: View) -> None:
        """A step of an optimizer has ended: tell the snapshots that wait for it."""
        for watcher in list(self.watchers):
            watcher.note_step(view)


def _some(items: list[Any]) -> list[Any]:
    """The first, the middle and the last."""
    return [items[0], items[len(items) // 2], items[-1]] if items else []
