"""A training step of the user: what ``make()`` returned, and who got a gradient and who stepped when it ran."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
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
from torch.utils.hooks import RemovableHandle

from .._audit.sandbox import tensors_in
from .._decay.handle import WeightDecay
from .._decay.optimizers import announces_steps, inner_optimizers, innermost
from .inputs import parse_inputs
from .shared import UsageError

CONTRACT = """\
make() returns a tuple of these, in any order:
  the model                    one torch.nn.Module
  the optimizer                or several, or a list of them
  step                         a function without arguments that runs the forward pass and returns the loss; or
                               one that trains by itself, with backward() and optimizer.step() in it: it is
                               called until each optimizer has stepped, at most 20 times
  a GradScaler                 where step() returns the loss of a model in float16
A handle of wdhook.attach is found by itself. Without step give --input: the loss is then a random
projection of all that the model returns.
"""

_CALLS = 20  # a GradScaler that starts at 65536 has skipped at most 16 steps; loops may accumulate


@dataclass
class Training:
    """What ``make()`` returned."""

    model: nn.Module
    optimizers: list[Any]
    step: Callable[[], Any]
    scaler: Any | None


class Seen:
    """What happened in a training step, by the ids of parameters and optimizers."""

    def __init__(self) -> None:
        self.with_gradient: set[int] = set()
        self.steps: dict[int, int] = {}  # of every optimizer that was heard
        self.events = 0

    def gradient(self, param: Tensor) -> None:
        self.with_gradient.add(id(param))
        self.events += 1

    def before_step(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            self.with_gradient.update(id(p) for p in group["params"] if p.grad is not None)

    def after_step(self, optimizer: Any, *_: Any) -> None:
        self.before_step(optimizer)  # a closure has made them in the step
        self.steps[id(optimizer)] = self.steps.get(id(optimizer), 0) + 1
        self.events += 1

    def heard(self, optimizer: Any) -> bool:
        """Whether the optimizer, or one inside it, has stepped."""
        return any(id(o) in self.steps for o in (optimizer, *innermost(optimizer)))


def training_of(made: Any, target: str, inputs: Sequence[str]) -> Training:
    """Tell what ``make()`` returned apart, by type.

    Raises:
        UsageError: something is missing, too much or unknown.
    """
    models, optimizers, steps, scalers = [], [], [], []
    for part in _flat(made):
        if isinstance(part, nn.Module):
            models.append(part)
        elif hasattr(part, "param_groups"):
            optimizers.append(part)
        elif callable(getattr(part, "scale", None)) and callable(getattr(part, "is_enabled", None)):
            scalers.append(part)
        elif callable(part):
            steps.append(part)
        elif not isinstance(part, WeightDecay):
            raise _not_a_training(f"a {type(part).__name__} that is none of them", target)
    if len(models) != 1:
        raise _not_a_training(
            f"{len(models)} models (several make one in an nn.ModuleList)", target
        )
    if not optimizers:
        raise _not_a_training("no optimizer", target)
    if len(steps) > 1 or len(scalers) > 1:
        raise _not_a_training(f"{len(steps)} functions and {len(scalers)} scalers", target)
    if not steps and not inputs:
        raise _not_a_training("no step, and there is no --input", target)
    step = steps[0] if steps else lambda: projection(models[0], inputs)
    return Training(models[0], optimizers, step, scalers[0] if scalers else None)


def _flat(made: Any) -> Iterator[Any]:
    if isinstance(made, (tuple, list)):
        for part in made:
            yield from _flat(part)
    else:
        yield made


def _not_a_training(got: str, target: str) -> UsageError:
    return UsageError(
        f"`target` does not make a training step.\n  target: {target}\n  returned: {got}\n{CONTRACT}"
    )


def projection(model: nn.Module, inputs: Sequence[str]) -> Tensor:
    """A loss that depends on every floating output: ⟨output, r⟩ for random r, over the number of elements."""
    args, kwargs = parse_inputs(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    named = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    outputs = [
        t for t in tensors_in(model(*moved, **named)) if t.is_floating_point() and t.requires_grad
    ]
    if not outputs:
        raise UsageError(
            "The model returns no floating-point tensor that depends on its parameters.\n"
            "  Let make() return a function `step` that returns the loss"
        )
    generator = torch.Generator().manual_seed(0)
    products = [
        (t.float() * torch.randn(t.shape, generator=generator).to(t.device)).mean() for t in outputs
    ]
    return torch.stack(products).sum()


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """See what gets a gradient and who steps."""
    seen = Seen()
    trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf and not is_lazy(p)]
    handles: list[RemovableHandle] = [
        p.register_post_accumulate_grad_hook(seen.gradient)  # type: ignore[no-untyped-call]
        for p in trained
    ]
    handles.append(register_optimizer_step_pre_hook(seen.before_step))
    handles.append(register_optimizer_step_post_hook(seen.after_step))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_step(training: Training, seen: Seen) -> None:
    """Train until each optimizer whose steps can be heard has stepped.

    Raises:
        UsageError: the function of the user neither trains nor returns a loss.
    """
    awaited = [
        o for o in training.optimizers if any(announces_steps(inner) for inner in innermost(o))
    ]
    for _ in range(_CALLS):
        before = seen.events
        result = training.step()
        if seen.events == before:
            _finish(training, result)
        if all(seen.heard(o) for o in awaited):
            return


def _finish(training: Training, loss: Any) -> None:
    """Zero, backward and step, for a function that ran the forward pass only."""
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
    """The optimizers that no other one holds: a wrapper steps those inside."""
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
        got = (
            f"a tensor {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise UsageError(
            "`step` must return the loss, or train by itself.\n"
            f"  returned: {got}, and no gradient and no step was heard\n"
            "  Return the loss, a scalar that depends on the parameters, or call backward() and optimizer.step() in it"
        )
    scaled = loss if training.scaler is None else training.scaler.scale(loss)
    scaled.backward()


def _needs_closure(optimizer: Any) -> bool:
    parameter = inspect.signature(optimizer.step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
