"""The parameters of one attached model: what was decided for each tensor, and the entries of the
decayed ones.

A decision belongs to a tensor, whatever the tensor is called later. A tensor is recognised

1. by itself: the same object, in the same place or with the same memory;
2. by its place: another tensor of the same shape under the same local name of the same module
   (``load_state_dict(assign=True)``, sharding, conversion, materialisation);
3. by its name: the tensor that had the name is gone from the model, and owner type and shape are
   the same (a module that was replaced by a copy).

Any other tensor is decided when it is met, by what it is then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from .._base.torch_private import has_hook, is_storage_of, storage_of
from .._plan.anchor import Anchor
from .._plan.decision import Decision
from .._plan.names import former_name, plain_name, plain_names
from .._plan.plan import Plan
from .._plan.renames import inherited
from .._roles.marks import bare_name, is_flattened
from .._roles.places import walk
from .entry import Entry, Progress, Terms
from .memory import Memo
from .model_ref import ModelRef

_FLATTENED = "_fsdp_wrapped_module."  # FSDP1 shows parts of its flat parameter, of any shape


class Known:
    """A tensor that was decided: the decision, and the marks by which it is recognised.

    Attributes:
        memory: None where the hook of the tensor tells, or the tensor has no memory.
        progress: of the tensor's entry, which it outlives; before that, of the tensor that this one
            has replaced.
        is_new: the tensor has come after `attach`, in no other one's place.
        is_unaimed: an `Anchor` was to say its target, whose names mean other tensors.
    """

    __slots__ = (
        "decision",
        "is_new",
        "is_unaimed",
        "key",
        "kind",
        "local",
        "memory",
        "module",
        "progress",
        "shape",
    )

    def __init__(
        self,
        decision: Decision,
        found: Found,
        progress: Progress | None = None,
        is_new: bool = False,
    ) -> None:
        self.decision = decision
        self.progress = progress
        self.key = id(found.param)
        self.memory: StorageWeakRef | None = None
        anchor = decision.toward
        self.is_new = is_new
        self.is_unaimed = is_new and isinstance(anchor, Anchor) and not anchor.is_init
        if self.is_unaimed:
            self.decision = replace(decision, toward=0.0)
        self.settle(found)

    def settle(self, found: Found) -> None:
        """Note where the tensor is now."""
        self.module = weakref.ref(found.module)
        self.local = found.local
        self.kind = type(found.module).__qualname__
        self.shape = self.decision.shape or _shape(found.param)

    def remember(self, param: Tensor) -> None:
        """Note the memory of the tensor."""
        self.memory = storage_of(param)

    def is_tensor(self, found: Found) -> bool:
        """Tell the very tensor. An id alone may have been given to another one since."""
        if self.key != id(found.param):
            return False
        return self.is_place(found) or is_storage_of(self.memory, found.param)

    def is_place(self, found: Found) -> bool:
        """Tell the place: the same local name of the same module."""
        return self.local == found.local and self.module() is found.module

    def fits(self, found: Found) -> bool:
        """Tell a tensor that may have replaced this one: owner type and global shape are the
        same."""
        kinds = {
            kind.__qualname__ for kind in type(found.module).__mro__
        }  # FSDP2 makes sub-classes
        if self.kind not in kinds:
            return False
        if _FLATTENED in found.name or is_flattened(found.param) or not self.shape:
            return True
        return self.shape == _shape(found.param)


class Found:
    """A parameter of the model as it is now."""

    __slots__ = ("local", "module", "name", "param")

    def __init__(self, name: str, module: nn.Module, local: str, param: nn.Parameter) -> None:
        self.name = name
        self.module = module
        self.local = local
        self.param = param


class Parameters:
    """What was decided for each tensor of a model, and the entry of each decayed one."""

    def __init__(
        self,
        model_ref: ModelRef,
        plan: Plan,
        replan: Callable[[nn.Module, float], Plan],
        new_entry: Callable[[Decision, Progress | None], Entry],
    ) -> None:
        self._model_ref = model_ref
        self._plan = plan
        self._replan = replan
        self._new_entry = new_entry
        self._known: dict[int, Known] = {}
        self._entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()
        self._unowned_terms: dict[Any, Terms] = {}

    # ---------------------------------------------------------------- the model

    def walk(self) -> Iterator[Found]:
        """Every parameter of the model as it is now, once, in the order of `named_parameters`."""
        seen: set[int] = set()
        for path, module, repeated in walk(self._model_ref.model()):
            if repeated:
                continue
            for local, param in module._parameters.items():
                if param is not None and id(param) not in seen:
                    seen.add(id(param))
                    yield Found(f"{path}.{local}" if path else local, module, local, param)

    def decided(self) -> dict[int, Known]:
        """id → what was decided, for every parameter of the model now; new tensors are decided by
        this call."""
        found = list(self.walk())
        result: dict[int, Known] = {}
        renamed: dict[str, Known] = {}  # by the names before
        strangers = []
        for one in found:
            known = self._known.get(id(one.param))
            if known is not None and (known.is_tensor(one) or self._is_hooked(one.param)):
                if not known.is_place(one):
                    known.settle(one)
                    known.remember(one.param)
                result[id(one.param)] = known
                if former_name(one.name) != one.name:
                    renamed[former_name(one.name)] = known
            else:
                strangers.append(one)
        if strangers:
            for one in strangers:
                self._entries.pop(id(one.param), None)  # of a tensor that had this id before
            decided = self._decide(strangers, set(map(id, result.values())), renamed)
            for one in strangers:
                decided[id(one.param)].remember(one.param)
            result |= decided
            self._known |= result
        return result

    def meet(self, found: Found) -> Known | None:
        """Take over what the plan says of a parameter; None where it says nothing."""
        decision = self._plan.get(found.name)
        if decision is None:
            return None
        known = Known(decision, found)
        self._known[known.key] = known
        return known

    def known(self, param: Tensor) -> Known | None:
        """What was decided for a tensor when the handle was made."""
        return self._known.get(id(param))

    def _is_hooked(self, param: Tensor) -> bool:
        """One of our hooks is on the parameter, and so it is the one that was hooked."""
        entry = self._entries.get(id(param))
        return entry is not None and entry.handle is not None and has_hook(param, entry.handle)

    def _decide(
        self, strangers: list[Found], taken: set[int], renamed: dict[str, Known]
    ) -> dict[int, Known]:
        """Decisions on tensors that were not recognised by themselves.

        Args:
            strangers: those tensors.
            taken: ids of what is known of the tensors that were recognised.
            renamed: what is known of those with another name now, by the former one. Beside them
                may be a copy, as peft makes one of a module that is to be saved.
        """
        model = self._model_ref.model()
        paths = {path: module for path, module, _ in walk(model)}
        gone = [known for known in self._known.values() if id(known) not in taken]
        places = {(id(module), k.local): k for k in gone if (module := k.module()) is not None}
        names = {known.decision.name: known for known in gone}
        # Of several tensors with one former name, the one that carries the weight.
        carriers = sorted(names.values(), key=lambda known: known.decision.eligible)
        undone = renamed | {former_name(known.decision.name): known for known in carriers}
        newer: Plan | None = None
        # Ids of progress that a tensor has, or has inherited.
        heirs = {id(known.progress) for known in renamed.values()}
        result: dict[int, Known] = {}
        for one in strangers:
            before = places.get((id(one.module), one.local)) or names.get(one.name)
            if before is not None and before.fits(one):
                result[id(one.param)] = Known(before.decision, one, before.progress)
                continue
            if newer is None:
                newer = self._replan(model, self._plan.weight_decay)
            original = former_name(one.name)
            above, _, local = original.rpartition(".")
            old = places.get((id(paths.get(above)), local)) or undone.get(original)
            if old is None or old.decision.name == one.name:
                result[id(one.param)] = Known(newer[one.name], one, is_new=True)
                continue
            decision = inherited(newer[one.name], old.decision)
            progress = old.progress if decision.eligible else None
            if progress is not None and id(progress) in heirs:
                progress = progress.copy()  # weight_norm makes two tensors of one
            heirs.add(id(progress))
            result[id(one.param)] = Known(decision, one, progress)
        return result

    # ---------------------------------------------------------------- decisions

    def plan(self, weight_decay: float, decide: bool = True) -> Plan:
        """The decisions on the model as it is now, by the names that parameters have now.

        Args:
            weight_decay: λ now.
            decide: new tensors are decided; else they are left out.
        """
        if not self._model_ref.is_alive():
            return self._plan.scaled_to(weight_decay)
        known = self.decided() if decide else self._known
        renamed: dict[str, Decision] = {}
        for one in self.walk():
            if id(one.param) not in known:
                continue
            decision = known[id(one.param)].decision
            wrapped = bare_name(one.name) == bare_name(decision.name)
            renamed[decision.name if wrapped else one.name] = decision
        plan = self._plan
        if list(renamed.items()) != list(plan.items()):
            plan = plan.renamed(renamed)
        return plan if plan.weight_decay == weight_decay else plan.scaled_to(weight_decay)

    def eligible(self) -> Iterator[tuple[Found, Known]]:
        """Parameters that are decayed, or would be once they are trained. Nothing new is
        decided."""
        for found in self.walk():
            known = self._known.get(id(found.param))
            if known is not None and known.decision.eligible:
                yield found, known

    def trained(self) -> Iterator[tuple[Tensor, Memo | None]]:
        """Decayed parameters that require a gradient and have values, with their memos."""
        for found, known in self.eligible():
            if known.progress is not None and found.param.requires_grad and has_values(found.param):
                yield found.param, known.progress.memo

    def names(self) -> dict[int, str]:
        """id → name in checkpoints, of every parameter of the model: the plain name of now."""
        found = list(self.walk())
        plain = plain_names(one.name for one in found)
        return {id(one.param): plain[one.name] for one in found}

    def governed(self) -> dict[int, str]:
        """id → name of every parameter that is decayed, or would be once it is trained."""
        result = {key: k.decision.name for key, k in self.decided().items() if k.decision.eligible}
        for key, entry in list(self._entries.items()):
            result.setdefault(key, entry.name)
        return result

    # ---------------------------------------------------------------- entries

    def entry(self, param: Tensor) -> Entry | None:
        """The entry of a parameter that is hooked or has been stepped."""
        return self._entries.get(id(param))

    def entries(self) -> list[Entry]:
        """Every entry."""
        return list(self._entries.values())

    def track(self, param: Tensor, known: Known | None) -> Entry | None:
        """The entry of a parameter, made if there is none yet; None for an exempt parameter."""
        entry = self._entries.get(id(param))
        if entry is not None and entry.handle is not None and not has_hook(param, entry.handle):
            entry = None  # of a parameter that is gone, and whose id this one has
        if entry is None and known is not None and known.decision.eligible:
            entry = self._entries[known.key] = self._new_entry(known.decision, known.progress)
            known.progress = entry.progress
        if entry is not None and not hasattr(entry, "terms"):
            entry.terms = self.unowned_terms(entry, param)
        return entry

    def unowned_terms(self, entry: Entry, param: Tensor) -> Terms:
        """The terms of a parameter of which no optimizer is known."""
        key = (id(entry.clock), *Terms.key(None, entry, param))
        terms = self._unowned_terms.get(key)
        if terms is None:
            terms = self._unowned_terms[key] = Terms(entry.clock, None, entry, param)
        return terms

    def aliases(self) -> dict[str, str]:
        """Any plain name of a parameter → its name in checkpoints."""
        names = self.names()
        present = {name: name for name in names.values()}
        for key, name in names.items():
            known = self._known.get(key)
            for alias in () if known is None else known.decision.aliases:
                present.setdefault(plain_name(alias), name)
        return present

    def progress(self) -> dict[str, Progress]:
        """How far each decayed parameter has come, by its name in checkpoints."""
        names = self.names()
        known = self.decided()
        found = {names[key]: k.progress for key, k in known.items() if k.progress is not None}
        for key, entry in list(self._entries.items()):
            found.setdefault(names.get(key, entry.name), entry.progress)
        return found

    def track_all(self) -> list[tuple[str, Tensor | None, Entry]]:
        """Every decayed parameter: its name in checkpoints, itself where it is in the model, and
        its entry, made if there is none."""
        names, known = self.names(), self.decided()
        tracked: list[tuple[str, Tensor | None, Entry]] = []
        for found in self.walk():
            entry = self.track(found.param, known.get(id(found.param)))
            if entry is not None:
                tracked.append((names[id(found.param)], found.param, entry))
        inside = {id(entry) for *_, entry in tracked}
        others = [entry for entry in self.entries() if id(entry) not in inside]
        return tracked + [(entry.name, None, entry) for entry in others]

    def forget_progress(self) -> None:
        """Forget how far parameters without an entry have come: training goes back."""
        living = {id(entry.progress) for entry in self.entries()}
        for known in self._known.values():
            if id(known.progress) not in living:
                known.progress = None

    def pairs(self) -> Iterator[tuple[Tensor, Entry]]:
        """Every parameter of the model that has an entry, with the entry."""
        for one in self.walk():
            entry = self._entries.get(id(one.param))
            if entry is not None:
                yield one.param, entry

    def clear(self) -> None:
        """Remove every hook, and forget every entry and what was remembered."""
        for entry in self.entries():
            if entry.handle is not None:
                entry.handle.remove()
        self._entries.clear()
        self._unowned_terms.clear()
        self.forget_progress()


def has_values(param: Tensor) -> bool:
    """Not on the meta device, not lazy, not taken away by an engine."""
    return not is_lazy(param) and not param.is_meta and param.numel() > 0


def _shape(param: Tensor) -> tuple[int, ...]:
    """Global shape; () for an uninitialized parameter. ZeRO-3 keeps the true shape in
    `ds_shape`."""
    if is_lazy(param):
        return ()
    shape = getattr(param, "ds_shape", None)
    return tuple(param.shape if shape is None else shape)
