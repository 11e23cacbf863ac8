"""One attached model: which parameters it decays, by which optimizers they are stepped, and its life."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from . import _arithmetic as arithmetic
from ._backward import CoupledHook, DecoupledHook, Hook, Witness, register_first
from ._conventions import bare_name
from ._decisions import Decision, Plan
from ._errors import WdhookWarning
from ._guards import check_own_decay
from ._members import Members
from ._optimizers import (
    inner_optimizers,
    learning_rate,
    maximizes,
    owned_ids,
    peak_learning_rate,
    zeroes_by_foreach,
)
from ._state import Entry, Pair, Settings, View
from ._window import Owner


class Engine:
    """One attached model. Refers to it weakly; lives until `close` or the model's end."""

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings) -> None:
        self.settings = settings
        self.scaler = settings.scaler  # asked for by every hook
        self.pauses = 0
        self.closed = False
        self.steps = 0
        self.foreign_steps = 0  # while one of ours waited with a gradient, and nobody owned any
        self.was_owned = False  # some optimizer that stepped or was given owns a decayed parameter
        self.running: list[int] = []  # the optimizers whose steps have begun and not ended
        self.outside: tuple[Tensor, Tensor] | None = None  # a parameter, and a copy as the step of a wrapper began
        self.replicas: list[weakref.ref[Any]] | None = None  # DistributedDataParallel modules, once looked for
        self.captured = False  # a step has gone into a CUDA graph, or a backward pass seems to have
        self.witness = Witness()
        self.on_close: Callable[[], None] = lambda: None
        self._plan = plan
        self._weight_decay = plan.weight_decay
        self._members = Members(model, self._members_died)
        self._entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()
        self._views: Any = WeakIdKeyDictionary()
        self._unowned = Owner()
        self._outliving: list[weakref.ref[Entry]] = []  # entries that were there when the last module died
        self._warned: set[str] = set()
        self._peaks: list[dict[str, arithmetic.Number]] = []  # loaded, for optimizers still to come

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
        if self.captured and value != self._weight_decay:
            self.warn_once(
                "captured",
                "λ was changed, and a CUDA graph holds the old one as a constant: a step was captured, or, it seems, "
                "a backward pass.\n"
                f"  weight_decay: {self._weight_decay:g}, now {value:g}\n"
                '  Capture the graph again; or leave the step out of it, with attach(..., at="step")',
            )
        self._weight_decay = value
        for entry in self._entries.values():
            if entry.follows:
                entry.set(value)

    def factor(self, view: View, index: int, group: Mapping[str, Any], weight_decay: float) -> arithmetic.Number:
        """What decoupled or independent decay multiplies the parameters of a param group with now."""
        lr = learning_rate(group, self.settings.lr)
        if self.settings.mode == "decoupled":
            return arithmetic.factor(lr, weight_decay)
        peak = view.peaks[index] = peak_learning_rate(group, view.peaks.get(index), lr)
        return arithmetic.factor(lr, weight_decay, peak)

    def lr_peaks(self) -> tuple[dict[str, arithmetic.Number], ...]:
        """For each optimizer: name of each parameter that it decays → largest lr of its param group.

        A tuple, which torch.distributed.checkpoint saves as one object: it looks into lists and mappings, and then
        loads no more than the keys that are there already.
        """
        met = [known for view in self._views.values() if (known := view.peaks_by_name())]
        return *met, *self._peaks

    def set_lr_peaks(self, peaks: Sequence[Mapping[str, arithmetic.Number]]) -> None:
        """Undo of `lr_peaks`; optimizers that have not been seen yet get theirs when they are."""
        self._peaks = [dict(known) for known in peaks]
        for view in self._views.values():
            self._recall(view)

    def _recall(self, view: View) -> None:
        """Give a view the first loaded peaks that name a parameter of its own. The order of optimizers may differ."""
        for index, known in enumerate(self._peaks):
            if view.set_peaks(known):
                del self._peaks[index]
                return

    def restart(self) -> None:
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

    def pairs(self) -> Iterator[Pair]:
        """Every known parameter with its entry.

        In a backward pass FSDP2 shows the model whole parameters; only the optimizers still have the sharded ones.
        """
        owned = (pair for view in self._views.values() for pair in chain.from_iterable(chain(*view.buckets)))
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
        if isinstance(entry, Hook) and entry.handle is None and param.requires_grad and not is_lazy(param):
            entry.handle = register_first(param, entry)  # others are decayed at their first step, then hooked
        return entry

    def _new_entry(self, decision: Decision) -> Entry:
        λ = self._weight_decay if decision.follows else decision.weight_decay
        if self.settings.at == "step":
            return Entry(decision.name, λ, decision.follows, self._unowned)
        kind = CoupledHook if self.settings.mode == "coupled" else DecoupledHook
        return kind(self, decision.name, λ, decision.follows, self._unowned)

    def _eligible(self, name: str) -> bool:
        decision = self._plan.get(name)
        return decision is not None and decision.eligible

    def governed(self) -> dict[int, str]:
        """id → name of every parameter that this engine decays or would decay once it is trained."""
        return {key: name for key, name in self._named().items() if self._eligible(name)}

    def _named(self) -> dict[int, str]:
        """id → name in the plan, for the model as it is now; modules added since are decided now."""
        found = {}
        model = self._members.model()
        for name, param in model.named_parameters():
            bare = bare_name(name)
            known = name if name in self._plan else bare if bare in self._plan else None
            if known is None:
                newer = self.settings.replan(model, self._plan.weight_decay).values()
                self._plan = self._plan.extended(d for d in newer if bare_name(d.name) not in self._plan)
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
        self._fill(view, optimizer)
        return view

    def sees_one_optimizer(self) -> bool:
        """Whether no more than one optimizer that owns a decayed parameter is known."""
        return sum(1 for view in self._views.values() if view.has_entries()) < 2

    def known_view(self, optimizer: Any) -> View | None:
        """The view of an optimizer that was met before, as it was then."""
        view: View | None = self._views.get(optimizer)
        return view

    def _fill(self, view: View, optimizer: Any) -> None:
        names = self._named() | {key: entry.name for key, entry in self._entries.items()}
        # A wrapper (SAM, Lookahead) lets the optimizer inside step: that one's step is the real one.
        inner = owned_ids(inner_optimizers(optimizer))
        view.params = [list(group["params"]) for group in optimizer.param_groups]
        view.wraps = any(key in names for key in inner)
        wrapped = (p for params in view.params for p in params if id(p) in inner)
        decayed = (p for p in wrapped if self._eligible(names.get(id(p), "")))
        view.sample = min(decayed, key=Tensor.numel, default=None)
        view.buckets = [
            self._buckets(
                view, optimizer, index, {names[id(p)]: p for p in params if id(p) in names and id(p) not in inner}
            )
            for index, params in enumerate(view.params)
        ]
        for index, params in enumerate(view.params) if self.was_given(optimizer) else ():
            # The schedule is the wrapper's: ZeroRedundancyOptimizer hands it on at the step, after the backward pass.
            for param in params:
                entry = self.track(names[id(param)], param) if id(param) in inner and id(param) in names else None
                if entry is not None:
                    entry.place = weakref.ref(optimizer), index
        view.strays = list(self._strays()) if self.was_given(optimizer) else []
        view.checked = False
        self.was_owned |= view.has_entries()
        view.dtypes = [bucket[0][0].dtype for buckets in view.buckets for bucket in buckets]
        if not view.peaks:
            self._recall(view)

    def _buckets(self, view: View, optimizer: Any, index: int, named: Mapping[str, Tensor]) -> list[list[Pair]]:
        """The decayed parameters of one param group, by what one foreach call can take."""
        sign = -1.0 if maximizes(optimizer, optimizer.param_groups[index]) else 1.0
        foreach = zeroes_by_foreach(optimizer)
        buckets: dict[Any, list[Pair]] = {}
        for name, param in named.items():
            entry = self.track(name, param)
            if entry is None:
                continue
            if entry.place is None or entry.place[0]() is None or self.was_given(optimizer):
                entry.place = weakref.ref(optimizer), index
            if entry.decayed and entry.sign != sign:
                view.turned = name
            entry.sign = sign
            entry.blind = foreach and hasattr(param, "to_local")
            entry.set(entry.weight_decay)
            entry.move(view.owner)
            kind = (entry.weight_decay, entry.follows, param.device, param.dtype, arithmetic.is_plain(param))
            buckets.setdefault(kind, []).append((param, entry))
        return list(buckets.values())

    def _strays(self) -> Iterator[Pair]:
        owned = self.owned_ids()
        for _, param in self.parameters():
            entry = self.entry(param)
            if entry is not None and id(param) not in owned:
                yield param, entry
