"""One attached model: which parameters it decays, by which optimizers they are stepped, and its life."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from .._base.errors import WdhookWarning
from .._plan.decision import Decision
from .._plan.plan import Plan
from .._roles.marks import bare_name
from . import formulas as arithmetic
from .hooks import CoupledHook, DecoupledHook, Hook, Witness, register_first
from .model_ref import Members
from .optimizers import learning_rate, owned_ids, peak_learning_rate
from .ownership import fill
from .resume import Progress
from .rules import check_own_decay
from .tracked import Entry, Pair, Settings, View
from .window import Owner


class Engine:
    """One attached model. Refers to it weakly; lives until `close` or the model's end."""

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings) -> None:
        self.settings = settings
        self.scaler = settings.scaler  # asked for by every hook
        self.pauses = 0
        self.closed = False
        self.steps = 0
        self.foreign_steps = 0  # while one of ours waited with a gradient, and nobody owned any
        self.unheard = 0  # gradients that came before any optimizer had stepped, where that matters
        self.was_owned = False  # some optimizer that stepped or was given owns a decayed parameter
        self.running: list[int] = []  # the optimizers whose steps have begun and not ended
        self.outside: tuple[Tensor, Tensor] | None = (
            None  # a parameter, and a copy as the step of a wrapper began
        )
        self.replicas: list[weakref.ref[Any]] | None = (
            None  # DistributedDataParallel modules, once looked for
        )
        self.captured = False  # a step has gone into a CUDA graph, or a backward pass seems to have
        self.witness = Witness()
        self.watchers: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # snapshots that wait for what a step changes
        self.on_close: Callable[[], None] = lambda: None
        self._plan = plan
        self._weight_decay = plan.weight_decay
        self._members = Members(model, self._members_died)
        self._entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()
        self._views: Any = WeakIdKeyDictionary()
        self._unowned = Owner()
        self._outliving: list[
            weakref.ref[Entry]
        ] = []  # entries that were there when the last module died
        self._warned: set[str] = set()
        self._progress = Progress(settings.schedule)

    # ---------------------------------------------------------------- life cycle

    def open(self) -> None:
        """Register a hook on every decayed parameter; all of them or none."""
        try:
            for name, param in self.parameters():
                self.track(name, param)
            for optimizer in self.optimizers():
                view = self.view(optimizer)
                if not view.owner.heard:  # no step will come at which it could be checked
                    check_own_decay(optimizer, view)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove every hook. Nothing of the engine stays on any parameter."""
        self.closed = True
        for entry in list(self._entries.values()):
            if entry.handle is not None:
                entry.handle.remove()
        self._entries.clear()
        self._views.clear()
        self.on_close()

    def _members_died(self) -> None:
        if self.closed:
            return
        # Parameters may be trained on without a module: exported graphs and functional code share them.
        self._outliving = [weakref.ref(entry, self._entry_died) for entry in self._entries.values()]
        self._entry_died(None)

    def _entry_died(self, ref: object) -> None:
        if ref is not None:
            self._outliving.pop()  # it counts; which is which does not matter
        if not self._outliving and not self.closed:
            self.close()

    def warn_once(self, key: str, message: str) -> None:
        """Warn, the first time that `key` is given."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, WdhookWarning, stacklevel=3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No decay inside; may be nested."""
        self.pauses += 1
        try:
            yield
        finally:
            self.pauses -= 1

    # ---------------------------------------------------------------- λ

    @property
    def plan(self) -> Plan:
        """The decisions with the present λ. Made when asked for: a schedule sets λ at each step."""
        if self._plan.weight_decay != self._weight_decay:
            self._plan = self._plan.scaled_to(self._weight_decay)
        return self._plan

    @property
    def weight_decay(self) -> float:
        """λ of every parameter whose own is not absolute."""
        return self._weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._set_weight_decay(value, self._entries.values())

    def _set_weight_decay(self, value: float, entries: Iterable[Entry]) -> None:
        if self.captured and value != self._weight_decay:
            self.warn_once(
                "captured",
                "λ was changed, and a CUDA graph holds the old one as a constant: a step was captured, or, it seems, "
                "a backward pass.\n"
                f"  weight_decay: {self._weight_decay:g}, now {value:g}\n"
                '  Capture the graph again; or leave the step out of it, with attach(..., at="step")',
            )
        self._weight_decay = value
        for entry in entries:
            if entry.follows:
                entry.set(value)

    def factor(
        self, view: View, index: int, group: Mapping[str, Any], weight_decay: float
    ) -> arithmetic.Number:
        """What decoupled or independent decay multiplies the parameters of a param group with now."""
        lr = learning_rate(group, self.settings.lr)
        if self.settings.mode == "decoupled":
            return arithmetic.factor(lr, weight_decay)
        peak = view.peaks[index] = peak_learning_rate(group, view.peaks.get(index), lr)
        return arithmetic.factor(lr, weight_decay, peak)

    def advance(self, optimizer: Any, view: View) -> None:
        """A step of an optimizer has ended: its parameters go on to the next λ of a schedule, if there is one."""
        if self.settings.schedule is None or getattr(optimizer, "found_inf", None):
            return  # a fused one that skips the step, under a GradScaler: reading that costs a synchronisation
        view.owner.finished += 1
        self._follow_schedule(view)

    def _follow_schedule(self, view: View) -> None:
        if self.settings.schedule is not None and view.has_entries():
            self._set_weight_decay(self._progress.weight_decay(view.owner.finished), view.entries())

    def progress(self) -> dict[str, Any]:
        """What a saved handle holds besides λ."""
        return self._progress.save(self._views.values())

    def set_progress(self, state: Mapping[str, Any]) -> None:
        """Undo of `progress`, and of the λ that a schedule has given since."""
        self._progress.load(state, self._views.values())
        if self.settings.schedule is not None:
            for entry in self._entries.values():
                if entry.follows:
                    entry.set(self._progress.weight_decay(self._progress.finished(entry.name)))
        self._restart()

    def _restart(self) -> None:
        """Training goes on from another point: what was shrunk in the backward since the last step is gone."""
        if self.settings.mode != "coupled":
            for entry in self._entries.values():
                entry.reopen()

    # ---------------------------------------------------------------- parameters

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the model as it is now."""
        return self._members.model().named_parameters()

    def entry(self, param: Tensor) -> Entry | None:
        """The entry of a parameter that is hooked or has been stepped."""
        return self._entries.get(id(param))

    def count(self) -> int:
        """How many parameters are known."""
        return len(self._entries)

    def pairs(self) -> Iterator[Pair]:
        """Every known parameter with its entry.

        In a backward pass FSDP2 shows the model whole parameters; only the optimizers still have the sharded ones.
        """
        owned = (
            pair
            for view in self._views.values()
            for pair in chain.from_iterable(chain(*view.buckets))
        )
        found = {id(param): (param, entry) for param, entry in owned}
        for _, param in self.parameters():
            entry = self.entry(param)
            if entry is not None:
                found[id(param)] = param, entry
        yield from found.values()

    def track(self, name: str, param: Tensor) -> Entry | None:
        """The entry of a parameter, made and hooked if there is none yet; None if it is exempt."""
        entry = self.entry(param)
        if entry is None:
            decision = self._plan.get(name)
            if decision is None or not decision.eligible:
                return None
            entry = self._entries[id(param)] = self._new_entry(decision)
        if (
            isinstance(entry, Hook)
            and entry.handle is None
            and param.requires_grad
            and not is_lazy(param)
        ):
            entry.handle = register_first(
                param, entry
            )  # others are decayed at their first step, then hooked
        return entry

    def _new_entry(self, decision: Decision) -> Entry:
        λ = self._weight_decay if decision.follows else decision.weight_decay
        if self.settings.at == "step":
            return Entry(decision.name, λ, decision.follows, self._unowned)
        kind = CoupledHook if self.settings.mode == "coupled" else DecoupledHook
        return kind(self, decision.name, λ, decision.follows, self._unowned)

    def is_eligible(self, name: str) -> bool:
        """Whether the parameter of that name is decayed."""
        decision = self._plan.get(name)
        return decision is not None and decision.eligible

    def governed(self) -> dict[int, str]:
        """id → name of every parameter that this engine decays or would decay once it is trained."""
        return {key: name for key, name in self._named().items() if self.is_eligible(name)}

    def names(self) -> dict[int, str]:
        """id → name in the plan of every parameter that the model has or that is known."""
        return self._named() | {key: entry.name for key, entry in self._entries.items()}

    def _named(self) -> dict[int, str]:
        """id → name in the plan, for the model as it is now; modules added since are decided now."""
        found = {}
        model = self._members.model()
        for name, param in model.named_parameters():
            bare = bare_name(name)
            known = name if name in self._plan else bare if bare in self._plan else None
            if known is None:
                newer = self.settings.replan(model, self._plan.weight_decay).values()
                self._plan = self._plan.extended(
                    d for d in newer if bare_name(d.name) not in self._plan
                )
                known = name
            if known is not None:
                found[id(param)] = known
        return found

    # ---------------------------------------------------------------- optimizers

    def optimizers(self) -> list[Any]:
        """The optimizers given to `attach` that still exist."""
        return [o for ref in self.settings.optimizers if (o := ref()) is not None]

    def was_given(self, optimizer: Any) -> bool:
        """Whether the optimizer was given to `attach`."""
        return any(optimizer is o for o in self.optimizers())

    def owned_ids(self) -> set[int]:
        """ids of the parameters that the given optimizers hold."""
        return owned_ids(self.optimizers())

    def view(self, optimizer: Any) -> View:
        """The cached view of an optimizer, remade when its parameters changed."""
        view: View | None = self._views.get(optimizer)
        if view is None:
            view = self._views[optimizer] = View(optimizer)
        elif view.is_current(optimizer):
            return view
        fill(self, view, optimizer)
        self.was_owned |= view.has_entries()
        self._progress.meet(view)
        self._follow_schedule(view)
        return view

    def sees_one_optimizer(self) -> bool:
        """Whether no more than one optimizer that owns a decayed parameter is known."""
        return sum(1 for view in self._views.values() if view.has_entries()) < 2

    def known_view(self, optimizer: Any) -> View | None:
        """The view of an optimizer that was met before, as it was then."""
        view: View | None = self._views.get(optimizer)
        return view
