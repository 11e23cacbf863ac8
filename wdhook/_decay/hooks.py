"""Decay in the backward pass: the hook on each parameter."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, is_grad_enabled
from torch._compile import (
    _disable_dynamo,
)  # torch.compiler.disable, but torch._dynamo is imported by the first call
from torch.utils.hooks import RemovableHandle

from . import formulas as arithmetic
from .rules import decays_itself
from .tracked import Entry
from .window import Owner, local_version

if TYPE_CHECKING:
    from .engine import Engine

_F = TypeVar("_F", bound=Callable[..., Any])


def never_compiled(function: _F) -> _F:
    """`torch.compiler.disable`, but at no cost for each call, and without importing torch._dynamo.

    A backward pass inside a compiled function would compile the hook anew for each shape of parameter. Compiled
    autograd and a compiled step would inline what they call, with guards on windows and λ.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    try:
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(
            function.__code__, dynamo._FrameExecStrategy(skip, skip)
        )  # and all it calls
    except AttributeError:  # before torch 2.7
        return cast(_F, _disable_dynamo(function))
    vars(function)["_torchdynamo_disable"] = True
    vars(function)["_torchdynamo_disable_msg"] = (
        'wdhook decays in hooks, which run in Python; at="step" has none in the backward'
    )
    return function


def register_first(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a post-accumulate-grad hook that runs before those which are there already.

    An optimizer that steps inside the backward does so in such a hook, and decay comes before the step.
    """
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    hooks: Any = param._post_accumulate_grad_hooks
    if len(hooks) > 1:
        # autograd walks the dict in the order of insertion; it has no public way to be first.
        *others, ours = list(hooks.items())
        hooks.clear()
        hooks.update([ours, *others])
    return handle


class Hook(Entry):
    """An entry that is itself the hook of its parameter, which owns it. Keeps the engine alive."""

    __slots__ = ("engine",)

    def __init__(
        self, engine: Engine, name: str, weight_decay: float, follows: bool, owner: Owner
    ) -> None:
        super().__init__(name, weight_decay, follows, owner)
        self.engine = engine

    def __call__(self, param: Tensor) -> None:
        """Decay `param`, into whose gradient autograd has just accumulated."""
        raise NotImplementedError


class CoupledHook(Hook):
    """Adds λ·p to the gradient."""

    __slots__ = ()

    @never_compiled
    def __call__(self, param: Tensor) -> None:
        """Flat, because its cost is paid for each tensor in each backward."""
        grad = param.grad
        if grad is None:
            return
        owner, engine = self.owner, self.engine
        if not engine.was_owned and engine.settings.schedule is not None:
            _count_unheard(engine)
        if self.stamp == owner.steps and self._stays(
            grad
        ):  # in a pause too: what it adds is no work of others
            return
        alpha = self.alpha
        if engine.pauses or not alpha:
            return
        # Grad mode is on under backward(create_graph=True) alone; a context costs as much as the addition.
        if engine.scaler is not None or grad.is_sparse or is_grad_enabled():
            _add(param, grad, self, engine.scaler)
        else:
            grad.add_(param, alpha=alpha)
        self.stamp = owner.steps
        self.buffer = ref(grad)
        self.version = grad._version
        if type(grad) is not Tensor:
            self.local = local_version(grad)

    def _stays(self, grad: Tensor) -> bool:
        """Whether the decay of this window is in `grad` already, all of it."""
        held = self.holds(grad)
        if held is None:
            held = not self.engine.witness.says_zeroed(self.engine, self, grad)
        if held:
            return not grad.is_sparse  # it may name new rows
        if self.rows is not None and not grad.is_sparse:
            _warn_of_mixture(self.engine, self)
        self.reopen()
        return False


def _add(param: Tensor, grad: Tensor, entry: Entry, scaler: Any | None) -> None:
    """Coupled decay in the hook, where it is not the plain case."""
    scale = arithmetic.loss_scale(scaler, grad.device)
    with torch.no_grad():
        if grad.is_sparse:
            rows = entry.rows if entry.decayed else None
            entry.rows = arithmetic.add_rows_(
                grad, param, arithmetic.scaled(entry.alpha, scale), rows
            )
        else:
            arithmetic.add_(grad, param, entry.alpha, scale)


def _count_unheard(engine: Engine) -> None:
    """Nobody has stepped since the start, so the schedule of λ does not go on."""
    engine.unheard += 1
    if engine.unheard > _PATIENCE * engine.count():
        engine.warn_once(
            "schedule",
            f"{_PATIENCE} backward passes were heard, and no step of an optimizer that owns a decayed parameter: the "
            "schedule of λ stays at its beginning.\n"
            f"  weight_decay: {engine.weight_decay:g}\n"
            "  If the optimizer is no torch.optim.Optimizer, attach with a number, and set "
            "handle.weight_decay = schedule(step) yourself",
        )


_PATIENCE = 1000  # passes: more than anybody accumulates, or looks at before training


def _warn_of_mixture(engine: Engine, entry: Entry) -> None:
    engine.warn_once(
        "mixture",
        "A parameter got a sparse gradient and then a dense one before the optimizer stepped: rows of the first are "
        "decayed twice, unless it was zeroed in between.\n"
        f"  parameter: {entry.name}\n"
        '  Use attach(..., at="step")',
    )


class DecoupledHook(Hook):
    """Shrinks the parameter."""

    __slots__ = ()

    @never_compiled
    def __call__(self, param: Tensor) -> None:
        """Once in a window, and then for rows of a sparse gradient that are new."""
        grad, engine = param.grad, self.engine
        if grad is None or engine.pauses or not self.weight_decay:
            return
        if self.decayed and not self.owner.heard:
            # Nobody tells of this optimizer's steps: a fresh gradient does, or one that was zeroed.
            held = self.holds(grad)
            if held is False or (held is None and engine.witness.says_zeroed(engine, self, grad)):
                self.reopen()
        if self.decayed:
            engine.warn_once(
                "again",
                "A parameter got a second gradient before the optimizer stepped: decoupled decay in the backward has "
                "already changed it, so the micro-batches of this step see different parameters.\n"
                f"  parameter: {self.name}\n"
                '  Use attach(..., at="step") with gradient accumulation. If the optimizer is no '
                "torch.optim.Optimizer, give it as `optimizer=`",
            )
            if not grad.is_sparse:
                return
        by = _factor(engine, self)
        if by is None:
            return
        with torch.no_grad():
            if grad.is_sparse:
                self.rows = arithmetic.mul_rows_(
                    grad, param, by, self.rows if self.decayed else None
                )
            else:
                param.mul_(by)
        self.mark(grad)


def _factor(engine: Engine, entry: Entry) -> arithmetic.Number | None:
    """What decoupled decay multiplies with now; None where the check of the step will complain."""
    lr = engine.settings.lr
    if entry.place is None:
        if lr is None or callable(lr) or engine.settings.mode == "independent":
            return None
        return arithmetic.factor(lr, entry.weight_decay)
    optimizer, index = entry.place[0](), entry.place[1]
    view = None if optimizer is None else engine.known_view(optimizer)
    if optimizer is None or view is None or index >= len(optimizer.param_groups):
        return None
    # Looked up each time: `load_state_dict` of an optimizer replaces its param groups.
    group = optimizer.param_groups[index]
    return None if decays_itself(group) else engine.factor(view, index, group, entry.weight_decay)


class Witness:
    """Tells whether a gradient that changed in place between two backward passes had been zeroed.

    Asked once per backward pass, and answered by the content of the gradients that this pass has not reached
    yet: they hold a decay, so only zeroing leaves nothing in them. This reads them and costs a
    synchronisation, but only in loops that do such a thing.
    """

    def __init__(self) -> None:
        self._task: int | None = None
        self._zeroed: weakref.WeakKeyDictionary[Entry, bool] = (
            weakref.WeakKeyDictionary()
        )  # in this backward pass

    def says_zeroed(self, engine: Engine, entry: Entry, grad: Tensor) -> bool:
        """Whether `grad`, the gradient of `entry`'s parameter, was zeroed before this pass added to it."""
        task = (
            torch._C._current_graph_task_id()
        )  # the only name that autograd has for "this backward pass"
        if task != self._task or task < 0:
            self._task = task
            self._look(engine, entry)
        if entry in self._zeroed:
            return self._zeroed[entry]
        if (
            self._zeroed
        ):  # what is zeroed together is named alike: the nearest neighbour speaks for this one
            nearest = max(self._zeroed, key=lambda other: _kinship(entry, other))
            return self._zeroed[nearest]
        engine.warn_once(
            "zeroed",
            "A gradient was changed in place between two backward passes without a step, and no other gradient "
            "tells whether it was zeroed (then its decay is gone) or scaled (then it is not).\n"
            f"  parameter: {entry.name}\n"
            '  Use zero_grad(set_to_none=True), or attach(..., at="step")',
        )
        # In a distributed run it is most often the work of an all-reduce.
        return not (
            grad._is_view()
            or (torch.distributed.is_available() and torch.distributed.is_initialized())
        )

    def _look(self, engine: Engine, asking: Entry) -> None:
        self._zeroed.clear()
        others = [(entry, grad) for entry, grad in _changed(engine) if entry is not asking]
        contents = [
            arithmetic.content(grad) for _, grad in others
        ]  # all before the first is waited for
        for (entry, grad), content in zip(others, contents, strict=True):
            if content is None:
                continue  # an empty shard tells nothing
            self._zeroed[entry] = not bool(content)
            entry.version = grad._version
            if self._zeroed[entry]:
                entry.reopen()  # also where this pass will not reach it
        if not self._zeroed and _in_compiled_autograd():
            # What a backend compiles may change a gradient more than once. None was zeroed where one is unchanged.
            pairs = [
                (param, entry)
                for param, entry in engine.pairs()
                if entry is not asking and entry.decayed
            ]
            self._zeroed.update(
                {entry: False for param, entry in pairs if entry.buffer() is param.grad is not None}
            )


def _in_compiled_autograd() -> bool:
    return getattr(
        sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False
    )


def _changed(engine: Engine) -> Iterator[tuple[Entry, Tensor]]:
    """Entries whose marked gradient is still there, and was changed since by something else than a hook's pass.

    Without a hook (frozen when it was decayed) nobody knows whether this pass has reached one.
    """
    for param, entry in engine.pairs():
        if param.grad is not None and entry.handle is not None and entry.was_touched(param.grad):
            yield entry, param.grad


def _kinship(one: Entry, other: Entry) -> tuple[bool, int]:
    parts = zip(one.name.split("."), other.name.split("."))  # noqa: B905 - as far as the shorter one goes
    return one.owner is other.owner, sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts)
    )
