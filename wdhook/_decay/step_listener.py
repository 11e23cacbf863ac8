"""The one process-wide listener: torch calls it for every optimizer step. It goes when the last
handle goes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from .._base.torch_private import (
    never_compiled,
    process_step_post_hooks,
    process_step_pre_hooks,
    register_first_step_post_hook,
    step_post_hooks,
    step_pre_hooks,
)
from . import call_stack
from .engine import Engine
from .rules.base import Facts
from .steps import Part, StepInProgress

_engines: dict[int, Engine] = {}
_registered: list[RemovableHandle] = []
_left: list[weakref.ref[Tensor]] = []
"""Gradients that a removed handle has decayed, and that no step has read."""
_lock = threading.RLock()  # handles come and go in any thread
_running = threading.local()  # `stack`: the steps that run in this thread, the outermost first
_hooked: weakref.WeakSet[StepInProgress] = weakref.WeakSet()  # steps with a hook on their optimizer


def listen(engine: Engine) -> None:
    """Tell `engine` of every optimizer step until it is closed."""
    with _lock:
        if not _registered:
            _registered.append(register_optimizer_step_pre_hook(_before_step))
            _registered.append(register_optimizer_step_post_hook(_after_step))
        _engines[id(engine)] = engine
        _recall(engine)
        engine.on_close = lambda: _forget(engine)


def attached() -> list[Engine]:
    """Every engine that is attached now, the oldest first."""
    return list(_engines.values())


def _forget(engine: Engine) -> None:
    with _lock:
        _left[:] = [*_living(_left), *_living(engine.unstepped())]
        _engines.pop(id(engine), None)
        if _engines:
            return
        while _registered:
            _registered.pop().remove()
        if not call_stack.look().steps:  # else torch may walk through these hooks now
            for step in list(_hooked):  # it has raised
                step.drop()


def _recall(engine: Engine) -> None:
    """Let a new handle know of gradients that one before has decayed, and that no step has read."""
    known = {id(ref()) for ref in _living(_left)}
    for param, entry in engine.state.parameters.pairs() if known else ():
        if param.grad is not None and id(param.grad) in known:
            entry.pay(param.grad)
    _left.clear()


def _living(refs: list[weakref.ref[Tensor]]) -> list[weakref.ref[Tensor]]:
    return [ref for ref in refs if ref() is not None]


def _stack() -> list[StepInProgress]:
    if not hasattr(_running, "stack"):
        _running.stack = []
    stack: list[StepInProgress] = _running.stack
    return stack


# A step ----------------------------------------------------------------------------------------


@never_compiled
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check, then decay: after each run of a closure, or as the last thing before the update."""
    running = call_stack.look()
    if running.makes_state:
        return None
    parts = [Part(engine, optimizer) for engine in attached()]
    claimed = any(part.view.owns_any() for part in parts)
    for part in parts:  # nothing is changed for any handle before all have agreed
        part.check(running, claimed)
    step = StepInProgress(optimizer, parts, max(running.steps, 1))
    _push(step)
    for part in parts:
        part.begin()
    if not _comes_first_after(optimizer):
        _end_first(step)
    if _comes_last(optimizer):
        return _decay_before_update(step, args, kwargs)
    _decay_last(step)
    return None


def _push(step: StepInProgress) -> None:
    """Note a step that begins. A step at the same depth or deeper has raised, so its end was never
    announced."""
    stack = _stack()
    while stack and stack[-1].depth >= step.depth:
        stack.pop().drop()
    stack.append(step)


def _comes_last(optimizer: Optimizer) -> bool:
    """No other step pre-hook comes after this one, which could change gradients."""
    hooks = list(process_step_pre_hooks().values())
    return hooks[-1:] in ([], [_before_step]) and not step_pre_hooks(optimizer)


def _decay_last(step: StepInProgress) -> None:
    """Decay after all step pre-hooks of the optimizer: torch reads those after the ones of the
    process."""

    def last(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if step in _stack():
            return _decay_before_update(step, args, kwargs)
        step.drop()  # it has raised, in another thread than the one of this step
        return None

    step.hooks.append(step.optimizer.register_step_pre_hook(last))
    _hooked.add(step)


def _comes_first_after(optimizer: Optimizer) -> bool:
    """No other step post-hook comes before this one, which could raise or take gradients away."""
    return next(iter(process_step_post_hooks().values())) is _after_step and not step_post_hooks(
        optimizer
    )


def _end_first(step: StepInProgress) -> None:
    """End the step before all other step post-hooks, which may raise: the update has been made."""

    def first(*_: Any) -> None:
        if step in _stack():
            _end(step)

    step.hooks.append(register_first_step_post_hook(step.optimizer, first))
    _hooked.add(step)


def _decay_before_update(
    step: StepInProgress, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Decay now; or, where the step is given a closure, return arguments whose closure decays."""
    wrapped = _with_decay_in_closures(step, args, kwargs)
    if wrapped is None:
        _decay(step, evaluated=False)
    return wrapped


@never_compiled
def _decay(step: StepInProgress, evaluated: bool) -> None:
    stack = _stack()
    outer = stack[: stack.index(step)] if step in stack else []
    outer = [other for other in outer if not other.ended]
    for part in step.parts:
        parts = [p for other in outer if (p := other.part_of(part.engine)) is not None]
        if evaluated and any(p.was_moved() for p in parts):
            facts = Facts(part.engine.state, step.optimizer, part.view)
            part.engine.rules.tell("moved-in-the-closure", facts)
        part.decay(nested=any(p.is_active for p in parts), evaluated=evaluated)


@never_compiled
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stack = _stack()
    if not any(step.optimizer is optimizer for step in stack):
        # It made a state for torch.distributed.checkpoint, or had begun before any handle was made.
        return
    while stack[-1].optimizer is not optimizer:
        stack.pop().drop()
    _end(stack[-1])
    stack.pop().drop()


def _end(step: StepInProgress) -> None:
    """The update has been made."""
    if step.ended:
        return
    step.ended = True
    stack = _stack()
    around = [other for other in stack[: stack.index(step)] if not other.ended]
    for part in step.parts:
        outer = [o for o in around if (p := o.part_of(part.engine)) is not None and p.is_active]
        part.end(nested=bool(outer), again=any(o.optimizer is step.optimizer for o in outer))


# Closures --------------------------------------------------------------------------------------


def _with_decay_in_closures(
    step: StepInProgress, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the step with closures that decay after their own work, where gradients
    come into being.

    None where there is no closure. `args[0]` is the optimizer itself.
    """
    if not any(part.is_active for part in step.parts):
        return None
    new_args = (args[0], *(_wrapped(value, step) for value in args[1:]))
    new_kwargs = {name: _wrapped(value, step) for name, value in kwargs.items()}
    old, new = (*args, *kwargs.values()), (*new_args, *new_kwargs.values())
    return None if all(map(is_, old, new)) else (new_args, new_kwargs)


def _wrapped(value: Any, step: StepInProgress) -> Any:
    if isinstance(value, dict) and _is_closure(value.get("closure")):
        return {**value, "closure": _decaying(value["closure"], step)}
    return _decaying(value, step) if _is_closure(value) else value


def _is_closure(value: object) -> bool:
    """Tell a function from other objects that can be called, such as a model that an optimizer is
    given."""
    return callable(value) and not isinstance(value, (nn.Module, type, Optimizer))


def _decaying(closure: Callable[..., Any], step: StepInProgress) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        _decay(step, evaluated=True)
        return loss

    with suppress(AttributeError):
        wrapped.__name__ = closure.__name__
    return wrapped
