"""A training step of the user: the objects of ``make()``, and the events while the step runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from .._audit.sandbox import tensors_in
from .._decay.handle import WeightDecay
from .._decay.optimizers import announces_steps, inner_optimizers, innermost
from .inputs import parse_inputs
from .shared import UsageError, with_article

CONTRACT = """\
make() returns these, in any order, as a tuple, a list or the values of a dict:
  the model                    one torch.nn.Module
  the optimizer                or several
  step                         a function without arguments that runs the
                               forward pass and returns the loss; or one that
                               trains by itself, with backward() and
                               optimizer.step() in it: called until each
                               optimizer has stepped, at most 20 times
  a GradScaler                 where step() returns the loss of a model in
                               float16
Data loaders are ignored, and learning rate schedulers are read by --steps
alone. A handle of wdhook.attach is found by itself. Without step give --input:
the loss is then a random projection of all outputs of the model.
"""

_EXPECTED = "(model, optimizer, step)"
_CALLS = 20  # a GradScaler that starts at 65536 has skipped at most 16 steps; loops may accumulate


@dataclass
class Training:
    """The objects returned by ``make()``, by role."""

    model: nn.Module
    optimizers: list[Any]
    step: Callable[[], Any]
    scaler: Any | None
    schedulers: list[Any]


class Seen:
    """The events of a training step, by the ids of parameters and optimizers."""

    def __init__(self) -> None:
        self.with_gradient: set[int] = set()
        self.steps: dict[int, int] = {}  # of every optimizer that announced one
        self.events = 0

    def gradient(self, param: Tensor) -> None:
        self.with_gradient.add(id(param))
        self.events += 1

    def before_step(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.with_gradient.add(id(param))

    def after_step(self, optimizer: Any, *_: Any) -> None:
        self.before_step(optimizer)  # a closure makes its gradients within the step
        self.steps[id(optimizer)] = self.steps.get(id(optimizer), 0) + 1
        self.events += 1

    def heard(self, optimizer: Any) -> bool:
        """The optimizer, or an inner optimizer, has announced a step."""
        return any(id(o) in self.steps for o in (optimizer, *innermost(optimizer)))


def training_of(made: Any, target: str, inputs: Sequence[str]) -> Training:
    """Sort the objects returned by ``make()`` by type.

    Raises:
        UsageError: one is missing, there are too many, or one is unknown.
    """
    found: dict[str, list[Any]] = {}
    for role in ("model", "optimizer", "step", "scaler", "scheduler", "ignored"):
        found[role] = []
    for part in _parts(made):
        kind = _kind_of(part)
        if kind is None:
            raise _not_a_training(_described(part, made), target)
        found[kind].append(part)
    _check_numbers(found, target, bool(inputs))
    model = found["model"][0]
    step = found["step"][0] if found["step"] else lambda: projection(model, inputs)
    scaler = found["scaler"][0] if found["scaler"] else None
    return Training(model, found["optimizer"], step, scaler, found["scheduler"])


def _check_numbers(found: dict[str, list[Any]], target: str, inputs: bool) -> None:
    models = len(found["model"])
    if models == 0:
        raise _not_a_training("no model", target)
    if models > 1:
        raise _not_a_training(f"{models} models (put several into one nn.ModuleList)", target)
    if not found["optimizer"]:
        raise _not_a_training("no optimizer", target)
    if len(found["step"]) > 1:
        raise _not_a_training(f"{len(found['step'])} functions; `step` is one", target)
    if len(found["scaler"]) > 1:
        raise _not_a_training(f"{len(found['scaler'])} scalers", target)
    if not found["step"] and not inputs:
        raise _not_a_training("no step, and there is no --input", target)


def _parts(made: Any) -> Iterator[Any]:
    """The objects in nested tuples, lists and dicts."""
    if isinstance(made, Mapping):
        for part in made.values():
            yield from _parts(part)
    elif isinstance(made, (tuple, list)):
        for part in made:
            yield from _parts(part)
    else:
        yield made


def _kind_of(part: Any) -> str | None:
    """Name the role of an object in a training, or return None."""
    if isinstance(part, nn.Module):
        return "model"
    if hasattr(part, "param_groups"):
        return "optimizer"
    if _has_methods(part, "scale", "is_enabled"):
        return "scaler"
    if isinstance(part, (WeightDecay, DataLoader)):
        return "ignored"
    if _has_methods(part, "get_last_lr", "step"):
        return "scheduler"
    if callable(part):
        return "step"
    return None


def _has_methods(part: Any, *names: str) -> bool:
    return all(callable(getattr(part, name, None)) for name in names)


def _described(part: Any, made: Any) -> str:
    if part is None:
        return "None" if made is None else "a tuple with None in it"
    return f"{with_article(type(part).__name__)}, which has no place in a training step"


def _not_a_training(got: str, target: str) -> UsageError:
    return UsageError(
        f"`target` does not make a training step.\n  target: {target}\n  returned: {got}\n"
        f"  expected: {_EXPECTED}\n{CONTRACT}"
    )


def projection(model: nn.Module, inputs: Sequence[str]) -> Tensor:
    """Compute a loss of all floating outputs: the mean of ⟨output, r⟩ for random r.

    Raises:
        UsageError: an input is not understood, or no output depends on a parameter.
    """
    args, kwargs = parse_inputs(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = [_on(device, value) for value in args]
    named = {name: _on(device, value) for name, value in kwargs.items()}
    generator = torch.Generator().manual_seed(0)
    products = []
    for output in tensors_in(model(*moved, **named)):
        if not output.is_floating_point() or not output.requires_grad:
            continue
        directions = torch.randn(output.shape, generator=generator).to(output.device)
        products.append((output.float() * directions).mean())
    if not products:
        raise UsageError(
            "The model returns no floating-point tensor that depends on its parameters.\n"
            "  Let make() return a function `step` that returns the loss"
        )
    return torch.stack(products).sum()


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """Record the parameters with a gradient, and the optimizers that step."""
    seen = Seen()
    handles: list[RemovableHandle] = []
    for param in model.parameters():
        if not param.requires_grad or not param.is_leaf or is_lazy(param):
            continue
        handles.append(
            param.register_post_accumulate_grad_hook(seen.gradient)  # type: ignore[no-untyped-call]
        )
    handles.append(register_optimizer_step_pre_hook(seen.before_step))
    handles.append(register_optimizer_step_post_hook(seen.after_step))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_step(training: Training, seen: Seen) -> None:
    """Train until each optimizer that announces its steps has stepped.

    Raises:
        UsageError: the function of the user neither trains nor returns a loss.
    """
    awaited = []
    for optimizer in training.optimizers:
        if any(announces_steps(inner) for inner in innermost(optimizer)):
            awaited.append(optimizer)
    for _ in range(_CALLS):
        before = seen.events
        result = training.step()
        if seen.events == before:
            _finish(training, result)
        if all(seen.heard(o) for o in awaited):
            return


def _finish(training: Training, loss: Any) -> None:
    """Run `zero_grad`, the backward pass and the steps, after a function that returned a loss."""
    for optimizer in training.optimizers:
        optimizer.zero_grad()
    _backward(training, loss)
    for optimizer in _outermost(training.optimizers):
        if training.scaler is not None:
            training.scaler.step(optimizer)
        elif _needs_closure(optimizer):
            optimizer.step(lambda optimizer=optimizer: _evaluated(training, optimizer))
        else:
            optimizer.step()
    if training.scaler is not None:
        training.scaler.update()


def _outermost(optimizers: Sequence[Any]) -> list[Any]:
    """The optimizers outside of any wrapper: a wrapper steps those inside."""
    inside: set[int] = set()
    for optimizer in optimizers:
        inside.update(map(id, inner_optimizers(optimizer)))
    return [optimizer for optimizer in optimizers if id(optimizer) not in inside]


def _evaluated(training: Training, optimizer: Any) -> Any:
    optimizer.zero_grad()
    loss = training.step()
    _backward(training, loss)
    return loss


def _backward(training: Training, loss: Any) -> None:
    if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
        raise UsageError(
            "`step` must return the loss, or train by itself.\n"
            f"  returned: {_loss(loss)}, and neither a gradient nor a step came\n"
            "  Return the loss, a scalar that depends on the parameters, or call backward() and "
            "optimizer.step() in it"
        )
    scaled = loss if training.scaler is None else training.scaler.scale(loss)
    scaled.backward()


def _loss(loss: Any) -> str:
    if isinstance(loss, Tensor):
        return f"a tensor {tuple(loss.shape)}"
    return "None" if loss is None else with_article(type(loss).__name__)


def _needs_closure(optimizer: Any) -> bool:
    parameter = inspect.signature(optimizer.step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
