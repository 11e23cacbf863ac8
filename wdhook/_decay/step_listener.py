"""The one process-wide listener: it hears every optimizer step, and goes when the last handle goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from . import step as step
from .engine import Engine
from .hooks import never_compiled
from .tracked import View

_engines: dict[int, Engine] = {}
_registered: list[RemovableHandle] = []


def listen(engine: Engine) -> None:
    """Let `engine` hear every optimizer step until it is closed."""
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before_step))
        _registered.append(register_optimizer_step_post_hook(_after_step))
    _engines[id(engine)] = engine
    engine.on_close = lambda: _forget(id(engine))


def attached() -> list[Engine]:
    """Every engine that is attached now, the oldest first."""
    return list(_engines.values())


def _forget(key: int) -> None:
    _engines.pop(key, None)
    while not _engines and _registered:
        _registered.pop().remove()


@never_compiled
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check, then decay what is due; for a step with a closure, after each of the closure's runs."""
    # Nothing is changed for anybody before everybody has agreed.
    views = [(engine, engine.view(optimizer)) for engine in attached()]
    claimed = any(view.has_entries() for _, view in views)
    for engine, view in views:
        if view.wraps:
            step.enter(engine, view)
    ours = [
        (engine, view) for engine, view in views if step.check(engine, optimizer, view, claimed)
    ]
    if not ours:
        return None
    for engine, _ in ours:
        step.begin(engine, optimizer)
    # args[0] is the optimizer itself.
    if len(args) > 1 and callable(args[1]):
        return (args[0], _decaying(args[1], optimizer, ours), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _decaying(kwargs["closure"], optimizer, ours)}
    _decay(optimizer, ours, evaluated=False)
    return None


def _decaying(
    closure: Callable[..., Any], optimizer: Optimizer, ours: list[tuple[Engine, View]]
) -> Callable[..., Any]:
    """The closure, with the decay of what is due after its own work: that is where gradients come into being."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        _decay(optimizer, ours, evaluated=True)
        return loss

    return wrapped


@never_compiled
def _decay(optimizer: Optimizer, ours: list[tuple[Engine, View]], evaluated: bool) -> None:
    for engine, view in ours:
        step.decay(engine, optimizer, view, evaluated)


@never_compiled
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for engine in attached():
        step.end(engine, optimizer)
