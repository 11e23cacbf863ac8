"""What an attached handle does: one hook per parameter, and one pass before each optimizer step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import _arithmetic as arithmetic
from . import _guards as guards
from ._conventions import bare_name
from ._errors import WdhookWarning
from ._optimizers import (
    LearningRate,
    inner_optimizers,
    is_nested_step,
    learning_rate,
    peak_learning_rate,
)
from ._plan import Plan
from ._window import Owner, Window


@dataclass(frozen=True)
class Settings:
    """The arguments of `attach` that say how, not how much."""

    mode: str
    at: str
    optimizers: tuple[weakref.ref[Any], ...]
    lr: LearningRate | None
    scaler: Any | None
    foreach: bool | None
    replan: Callable[[nn.Module, float], Plan] = field(repr=False)


class Entry(Window):
    """One decayed parameter: its window, its λ and its hook. Owned by the hook, so it dies with the parameter.

    It does not refer to the parameter, not even weakly: `torch.utils.swap_tensors` refuses those.
    """

    __slots__ = ("alpha", "handle", "name", "place", "weight_decay")

    def __init__(self, name: str, weight_decay: float, owner: Owner) -> None:
        super().__init__(owner)
        self.name = name
        self.weight_decay = weight_decay
        self.alpha = weight_decay  # λ, negative where the optimizer maximizes
        self.handle: RemovableHandle | None = None
        self.place: tuple[weakref.ref[Any], int] | None = None  # optimizer, index of the param group


Pair = tuple[Tensor, Entry]


class View:
    """The param groups of one optimizer, as far as they concern us."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.params: list[list[Tensor]] = []  # as they were when the view was made
        self.buckets: list[list[list[Pair]]] = []  # per group: pairs that one foreach call can take
        self.peaks: dict[int, arithmetic.Number] = {}  # per group: the largest lr so far
        self.strays: list[Pair] = []  # tracked, and in no group of any optimizer given
        self.turned: str | None = None  # decayed before it was known that the optimizer maximizes
        self.checked = False

    def is_current(self, optimizer: Any) -> bool:
        """Whether the optimizer still holds just the parameters that it held when the view was made."""
        groups = optimizer.param_groups
        return len(groups) == len(self.params) and all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(groups, self.params, strict=False)
        )

    def has_entries(self) -> bool:
        """Whether the optimizer owns any decayed parameter."""
        return any(self.buckets)


class Engine:
    """One attached model. Refers to it weakly; lives until `close` or the model's end."""

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings) -> None:
        self.plan = plan
        self.settings = settings
        self.pauses = 0
        self.closed = False
        self.steps = 0
        self.was_owned = False  # some optimizer that stepped or was given owns a decayed parameter
        self.on_close: Callable[[], None] = lambda: None
        self._root = weakref.ref(model)
        # A container made only for `attach` may die while its members train on: know the members too.
        self._modules = {path: weakref.ref(m, self._module_died) for path, m in model.named_modules()}
        self._entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()
        self._views: Any = WeakIdKeyDictionary()
        self._unowned = Owner()
        self._running: list[int] = []  # the optimizers whose steps have begun and not ended
        self._warned: set[str] = set()
        self._task: int | None = None
        self._zeroed: bool | None = None
        self._peaks: list[Mapping[int, arithmetic.Number]] = []  # loaded, for optimizers still to come
        self._ones: dict[torch.device, Tensor] = {}

    # ---------------------------------------------------------------- life cycle

    def open(self) -> None:
        """Register a hook on every decayed parameter; all of them or none."""
        try:
            for name, param in self.parameters():
                self._track(name, param)
            for optimizer in self.optimizers():
                self.view(optimizer)
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

    def _module_died(self, _: object) -> None:
        if not self.closed and all(module() is None for module in self._modules.values()):
            self.close()

    def optimizers(self) -> list[Any]:
        """The optimizers given to `attach` that still exist."""
        return [o for ref in self.settings.optimizers if (o := ref()) is not None]

    def owned_ids(self) -> set[int]:
        """ids of the parameters that the given optimizers hold."""
        return {id(p) for o in self.optimizers() for group in o.param_groups for p in group["params"]}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the model as it is now."""
        model = self._root()
        if model is not None:
            yield from model.named_parameters()
            return
        for path, ref in self._modules.items():
            module = ref()
            for local, param in module._parameters.items() if module is not None else ():
                if param is not None:
                    yield f"{path}.{local}" if path else local, param

    def governed(self) -> dict[int, str]:
        """id → name of every parameter that this engine decays or would decay once it is trained."""
        return {key: name for key, name in self._named().items() if self._eligible(name)}

    def set_weight_decay(self, plan: Plan) -> None:
        """Take λ from `plan`, which is the present plan for another λ."""
        self.plan = plan
        for entry in self._entries.values():
            sign = -1.0 if entry.alpha < 0 else 1.0
            entry.weight_decay = plan[entry.name].weight_decay
            entry.alpha = sign * entry.weight_decay
        for view in self._views.values():
            view.params = []  # λ decides what one foreach call can take: look again at the next step

    def lr_peaks(self) -> list[dict[int, arithmetic.Number]]:
        """For each optimizer in the order of its first appearance: param group index → largest lr."""
        return [dict(view.peaks) for view in self._views.values() if view.has_entries()]

    def set_lr_peaks(self, peaks: Sequence[Mapping[int, arithmetic.Number]]) -> None:
        """Undo of `lr_peaks`; optimizers that have not been seen yet get theirs when they are."""
        views = [view for view in self._views.values() if view.has_entries()]
        for view, known in zip(views, peaks, strict=False):
            view.peaks.update(known)
        self._peaks = list(peaks)[len(views) :]

    # ---------------------------------------------------------------- which parameters

    def _eligible(self, name: str) -> bool:
        decision = self.plan.get(name)
        return decision is not None and decision.eligible

    def _track(self, name: str, param: Tensor) -> Entry | None:
        """The entry of a parameter, made and hooked if there is none yet; None if it is exempt."""
        entry = self._entries.get(id(param))
        if entry is None:
            if not self._eligible(name):
                return None
            entry = Entry(name, self.plan[name].weight_decay, self._unowned)
            self._entries[id(param)] = entry
        if self.settings.at == "backward" and entry.handle is None and param.requires_grad:
            make = _coupled_hook if self.settings.mode == "coupled" else _decoupled_hook
            entry.handle = _register_first(param, make(self, entry))
        return entry

    def _named(self) -> dict[int, str]:
        """id → name in the plan, for the model as it is now; modules added since are decided now."""
        found = {}
        model = self._root()
        for name, param in self.parameters():
            bare = bare_name(name)
            known = name if name in self.plan else bare if bare in self.plan else None
            if known is None and model is not None:
                newer = self.settings.replan(model, self.plan.weight_decay)
                self.plan = self.plan.extended(d for d in newer.values() if bare_name(d.name) not in self.plan)
                known = name
            if known is not None:
                found[id(param)] = known
        return found

    def view(self, optimizer: Any) -> View:
        """The cached view of an optimizer, remade when its parameters changed."""
        view: View | None = self._views.get(optimizer)
        if view is None:
            view = self._views[optimizer] = View(Owner())
        elif view.is_current(optimizer):
            return view
        self._fill(view, optimizer)
        return view

    def _fill(self, view: View, optimizer: Any) -> None:
        ours = self._named()
        # A wrapper (SAM, Lookahead) lets the optimizer inside step: that one's step is the real one.
        inner = {id(p) for o in inner_optimizers(optimizer) for g in o.param_groups for p in g["params"]}
        view.params, view.buckets = [], []
        for index, group in enumerate(optimizer.param_groups):
            view.params.append(list(group["params"]))
            buckets: dict[Any, list[Pair]] = {}
            for param in group["params"]:
                name = None if id(param) in inner else ours.get(id(param))
                entry = None if name is None else self._track(name, param)
                if entry is not None:
                    entry.place = weakref.ref(optimizer), index
                    alpha = -entry.weight_decay if group.get("maximize") else entry.weight_decay
                    if entry.decayed and alpha != entry.alpha:
                        view.turned = name
                    entry.alpha = alpha
                    entry.move(view.owner)
                    kind = (entry.alpha, param.device, param.dtype, arithmetic.is_plain(param))
                    buckets.setdefault(kind, []).append((param, entry))
            view.buckets.append(list(buckets.values()))
        view.strays = list(self._strays()) if any(optimizer is o for o in self.optimizers()) else []
        view.checked = False
        self.was_owned |= view.has_entries()
        if self._peaks and view.has_entries() and not view.peaks:
            view.peaks.update(self._peaks.pop(0))

    def _strays(self) -> Iterator[Pair]:
        owned = self.owned_ids()
        for _, param in self.parameters():
            entry = self._entries.get(id(param))
            if entry is not None and id(param) not in owned:
                yield param, entry

    # ---------------------------------------------------------------- at backward

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """The factor of the loss, a 0-dim tensor on `device`, or None where there is none."""
        scaler = self.settings.scaler
        if scaler is None or not scaler.is_enabled():
            return None
        one = self._ones.get(device)
        if one is None:
            one = self._ones[device] = torch.ones((), device=device)
        return scaler.scale(one)  # type: ignore[no-any-return]

    def add_decay(self, param: Tensor, grad: Tensor, entry: Entry) -> None:
        """Coupled decay in the hook, where it is not the plain case."""
        scale = self.loss_scale(grad.device)
        with torch.no_grad():
            if grad.is_sparse:
                rows = entry.rows if entry.decayed else None
                entry.rows = arithmetic.add_rows_(grad, param, arithmetic.scaled(entry.alpha, scale), rows)
            else:
                arithmetic.add_(grad, param, entry.alpha, scale)

    def shrink_factor(self, entry: Entry) -> arithmetic.Number | None:
        """What decoupled decay multiplies with now; None where the step's own check will complain."""
        lr = self.settings.lr
        if entry.place is None:
            if lr is None or callable(lr) or self.settings.mode == "independent":
                return None
            return arithmetic.factor(lr, entry.weight_decay)
        optimizer, index = entry.place[0](), entry.place[1]
        if optimizer is None or index >= len(optimizer.param_groups):
            return None
        group = optimizer.param_groups[index]
        if guards.decays_itself(group):
            return None
        return self._factor(self._views[optimizer], index, group, entry.weight_decay)

    def _factor(self, view: View, index: int, group: Any, weight_decay: float) -> arithmetic.Number:
        lr = learning_rate(group, self.settings.lr)
        if self.settings.mode == "decoupled":
            return arithmetic.factor(lr, weight_decay)
        peak = view.peaks[index] = peak_learning_rate(group, view.peaks.get(index), lr)
        return arithmetic.factor(lr, weight_decay, peak)

    def was_zeroed(self, entry: Entry, grad: Tensor) -> bool:
        """Whether a gradient that changed in place between two backward passes had been zeroed.

        Asked once per backward pass, and answered by the content of the gradients that this pass has not
        reached yet: they hold a decay, so only zeroing leaves nothing in them. This costs a
        synchronisation, but only in loops that do such a thing.
        """
        task = torch._C._current_graph_task_id()  # the only name that autograd has for "this backward pass"
        if task != self._task or task < 0:
            self._task = task
            touched = list(self._touched(entry))
            if touched:
                self._zeroed = not any(arithmetic.has_content(g) for g in touched)
        if self._zeroed is not None:
            return self._zeroed
        self.warn_once(
            "zeroed",
            "A gradient was changed in place between two backward passes without a step, and no other gradient "
            "tells whether it was zeroed (then its decay is gone) or scaled (then it is not).\n"
            f"  parameter: {entry.name}\n"
            '  Use zero_grad(set_to_none=True), or attach(..., at="step")',
        )
        return not grad._is_view()  # a slice of a bucket is most often an all-reduce's work

    def _touched(self, asking: Entry) -> Iterator[Tensor]:
        for _, param in self.parameters():
            entry = self._entries.get(id(param))
            if entry is not None and entry is not asking and param.grad is not None:
                if entry.was_touched(param.grad):
                    yield param.grad

    def warn_once(self, key: str, message: str) -> None:
        """Warn, the first time that `key` is given."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, WdhookWarning, stacklevel=3)

    # ---------------------------------------------------------------- at step

    def check(self, optimizer: Optimizer, view: View, claimed: bool) -> bool:
        """Raise what is wrong with a step, before anything is changed; False where there is nothing to do."""
        if self.pauses:
            return False
        guards.check_step(self, optimizer, view, claimed)
        return view.has_entries()

    def begin(self, optimizer: Optimizer) -> None:
        """A step begins."""
        if self._running and not is_nested_step():
            self._running.clear()  # an earlier one raised, so its end was never heard
        self._running.append(id(optimizer))

    def end(self, optimizer: Optimizer) -> None:
        """A step has ended: so have the windows of the parameters that this optimizer owns."""
        if self._running and self._running[-1] == id(optimizer):
            self._running.pop()
        view: View | None = self._views.get(optimizer)
        if view is not None and view.has_entries():
            view.owner.steps += 1
            self.steps += 1

    def decay(self, optimizer: Optimizer, view: View, evaluated: bool) -> None:
        """Decay what has a gradient and was not decayed in this window.

        Args:
            evaluated: the closure of the step has just run; it may run again before the step ends.
        """
        if self.pauses:
            return
        with torch.no_grad():
            for index, (group, buckets) in enumerate(zip(optimizer.param_groups, view.buckets, strict=False)):
                for bucket in buckets:
                    if not bucket[0][1].alpha:
                        continue
                    due = self._due(view.owner, bucket, evaluated)
                    if not due:
                        continue
                    if self.settings.mode == "coupled":
                        self._add(optimizer, due)
                    else:
                        self._multiply(optimizer, due, self._factor(view, index, group, due[0][2].weight_decay))
                    for _, grad, entry in due:
                        entry.mark(grad)

    def _due(self, owner: Owner, bucket: Iterable[Pair], evaluated: bool) -> list[tuple[Tensor, Tensor, Entry]]:
        due = []
        for param, entry in bucket:
            grad = param.grad
            if grad is None:
                continue
            if entry.owner is not owner:
                entry.move(owner)
            if entry.stamp == owner.steps:
                if self._is_done(grad, entry, evaluated):
                    continue
                entry.reopen()
            if entry.handle is None:
                self._track(entry.name, param)  # unfrozen since: from now on in its backward
            due.append((param, grad, entry))
        return due

    def _is_done(self, grad: Tensor, entry: Entry, evaluated: bool) -> bool:
        """Whether the decay that this window has seen is in the gradient that the step will read."""
        if self.settings.mode != "coupled":
            return True
        same = entry.buffer() is grad
        if self.settings.at == "step":
            # What a step does to its gradients before it calls another one is that optimizer's business; but a
            # closure that ran again, or a step after one that raised, brings new gradients.
            nested = len(self._running) > 1 and not evaluated
            return nested or (same and entry.version == grad._version)
        if not same and not grad._is_view():
            self.warn_once(
                "replaced",
                "A gradient was replaced between its decay and the optimizer step. It is taken to be derived from "
                "the one that was decayed, so it is not decayed again.\n"
                f"  parameter: {entry.name}\n"
                '  If it is a new one, use attach(..., at="step")',
            )
        return True

    def _add(self, optimizer: Optimizer, due: list[tuple[Tensor, Tensor, Entry]]) -> None:
        # A fused optimizer under a GradScaler un-scales inside its kernel: its gradients are scaled still.
        scale = getattr(optimizer, "grad_scale", None)
        alpha = due[0][2].alpha
        dense = [(p, g) for p, g, _ in due if not g.is_sparse]
        arithmetic.add_all_([g for _, g in dense], [p for p, _ in dense], alpha, scale, self._foreach(dense))
        for param, grad, entry in due:
            if grad.is_sparse:
                rows = entry.rows if entry.decayed else None
                entry.rows = arithmetic.add_rows_(grad, param, arithmetic.scaled(alpha, scale), rows)

    def _multiply(
        self, optimizer: Optimizer, due: list[tuple[Tensor, Tensor, Entry]], by: arithmetic.Number
    ) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            by = arithmetic.unless(found_inf, by)
        dense = [(p, g) for p, g, _ in due if not g.is_sparse]
        arithmetic.mul_all_([p for p, _ in dense], by, self._foreach(dense))
        for param, grad, _ in due:
            if grad.is_sparse:
                arithmetic.mul_rows_(grad, param, by, None)

    def _foreach(self, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        if self.settings.foreach is not None:
            return self.settings.foreach
        return len(pairs) > 1 and arithmetic.is_plain(pairs[0][0])


def _coupled_hook(engine: Engine, entry: Entry) -> Callable[[Tensor], None]:
    """The hook on one parameter: flat, because its cost is paid for each tensor in each backward."""
    is_grad_enabled = torch.is_grad_enabled
    ref = weakref.ref
    scaler = engine.settings.scaler

    def hook(param: Tensor) -> None:
        grad = param.grad
        if grad is None or engine.pauses:
            return
        if entry.stamp == entry.owner.steps:
            held = entry.holds(grad)
            if held is None:
                held = not engine.was_zeroed(entry, grad)
            if not held:
                entry.reopen()
            elif not grad.is_sparse:
                return
        if not entry.alpha:
            return
        # Grad mode is on under backward(create_graph=True) alone; a context costs as much as the addition.
        if scaler is not None or grad.is_sparse or is_grad_enabled():
            engine.add_decay(param, grad, entry)
        else:
            grad.add_(param, alpha=entry.alpha)
        entry.stamp = entry.owner.steps
        entry.buffer = ref(grad)
        entry.version = grad._version

    return hook


def _decoupled_hook(engine: Engine, entry: Entry) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        grad = param.grad
        if grad is None or engine.pauses or not entry.weight_decay:
            return
        if entry.decayed:
            engine.warn_once(
                "again",
                "A parameter got a second gradient before the optimizer stepped: decoupled decay in the backward has "
                "already changed it, so the micro-batches of this step see different parameters.\n"
                f"  parameter: {entry.name}\n"
                '  Use attach(..., at="step") with gradient accumulation',
            )
            if not grad.is_sparse:
                return
        by = engine.shrink_factor(entry)
        if by is None:
            return
        with torch.no_grad():
            if grad.is_sparse:
                entry.rows = arithmetic.mul_rows_(grad, param, by, entry.rows if entry.decayed else None)
            else:
                param.mul_(by)
        entry.mark(grad)

    return hook


def _register_first(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a post-accumulate-grad hook that runs before those which are there already.

    An optimizer that steps inside the backward does so in such a hook, and decay comes before the step.
    """
    handle = param.register_post_accumulate_grad_hook(hook)
    hooks: Any = param._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    if len(hooks) > 1:
        # autograd walks the dict as it was filled; it has no public way to be first.
        *others, ours = list(hooks.items())
        hooks.clear()
        hooks.update([ours, *others])
    return handle
