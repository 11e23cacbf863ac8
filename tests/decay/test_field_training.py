"""Loops of real trainings in which the right answer can be known: one situation a function."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from field import DECAY, LR, chain, check, dyadic, everywhere, lines, pull, sgd, train_step
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_pre_hook

Situation = Callable[[Any, str, str], Iterator[nn.Module]]
SITUATIONS: dict[str, Situation] = {}


def situation(loop: Situation) -> Situation:
    """Play the loop in every mode and at both moments."""
    SITUATIONS[loop.__name__] = loop
    return loop


@everywhere
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_training_loop(mode: str, at: str, name: str) -> None:
    """Each loop equals the same loop with the decay by hand, after every step."""
    check(lambda decay: SITUATIONS[name](decay, mode, at))


# Gradients -------------------------------------------------------------------------------------


@situation
def a_process_wide_hook_clips(decay: Any, mode: str, at: str) -> Any:
    """A step pre-hook of the process, registered after wdhook's, clips every optimizer."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at="step", optimizer=optimizer)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_value_(model.parameters(), 1 / 8)

    hooks = [register_optimizer_step_pre_hook(hook) for hook in (clip, lambda *_: decay.now())]
    yield model
    for _ in range(2):
        optimizer.zero_grad()
        pull(model).backward()
        optimizer.step()
        yield model
    for hook in hooks:
        hook.remove()


@situation
def sharpness_aware_by_hand(decay: Any, mode: str, at: str) -> Any:
    """SAM without an optimizer of its own: up by the gradient, and back by `p.data = old`."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at="step", optimizer=optimizer)
    yield model
    for _ in range(2):
        optimizer.zero_grad()
        pull(model).backward()
        old = [p.data.clone() for p in model.parameters()]
        for p in model.parameters():
            p.data.add_(p.grad)
        optimizer.zero_grad(set_to_none=False)
        pull(model).backward()
        for p, before in zip(model.parameters(), old, strict=True):
            p.data = before
        decay.now()
        optimizer.step()
        yield model


@situation
def gradient_surgery(decay: Any, mode: str, at: str) -> Any:
    """PCGrad: gradients of two tasks by autograd.grad, combined and put into `p.grad`."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    params = list(model.parameters())
    yield model
    for _ in range(2):
        tasks = [torch.autograd.grad(pull(model), params) for _ in range(2)]
        for p, one, other in zip(params, *tasks, strict=True):
            p.grad = (one + other) / 2
        decay.now()
        optimizer.step()
        yield model


@situation
def discriminator_frozen_in_turn(decay: Any, mode: str, at: str) -> Any:
    """A GAN that freezes each part while the other one is stepped."""
    model = nn.ModuleDict({"critic": lines(1), "maker": lines(1)})
    optimizers = {name: sgd(part.parameters()) for name, part in model.items()}
    decay.attach(model, mode=mode, at=at, optimizer=list(optimizers.values()))
    yield model
    for _ in range(2):
        for name, other in (("critic", "maker"), ("maker", "critic")):
            model[other].requires_grad_(False)
            train_step(decay, model, optimizers[name], only=list(model[name].parameters()))
            model[other].requires_grad_(True)
            model[name].zero_grad()
        yield model


# Surgery ---------------------------------------------------------------------------------------


@situation
def an_exempt_layer_changes_places(decay: Any, mode: str, at: str) -> Any:
    """Two layers of one shape change places; the exempt one stays exempt."""
    model = lines(2)
    more = {} if decay.by_hand else {"overrides": {"0.weight": 0.0}}
    optimizer = sgd(model.parameters())
    weights = [model[1].weight]
    decay.attach(model, mode=mode, at=at, optimizer=optimizer, weights=weights, **more)
    yield model
    for k in range(3):
        if k == 1:
            model[0], model[1] = model[1], model[0]
            optimizer = sgd(model.parameters())
        train_step(decay, model, optimizer)
        yield model


@situation
def progressive_stacking(decay: Any, mode: str, at: str) -> Any:
    """The model is doubled by copies of its layers, as StackBERT grows; a new optimizer."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    yield model
    for k in range(3):
        if k == 1:
            model.extend(copy.deepcopy(model))
            optimizer = sgd(model.parameters())
            decay.weights = list(model.parameters())
        train_step(decay, model, optimizer)
        yield model


@situation
def tied_and_untied(decay: Any, mode: str, at: str) -> Any:
    """Two layers are tied for one step, and untied again by a copy."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    yield model
    for k in range(4):
        if k == 1:
            model[1].weight = model[0].weight
        if k == 2:
            model[1].weight = nn.Parameter(model[0].weight.detach().clone())
        if k in (1, 2):
            optimizer = sgd(model.parameters())
            decay.weights = list(model.parameters())
        train_step(decay, model, optimizer)
        yield model


@situation
def pruned_and_made_permanent(decay: Any, mode: str, at: str) -> Any:
    """`prune.identity` renames an exempt weight, and `prune.remove` makes a new one."""
    model = lines(2)
    more = {} if decay.by_hand else {"overrides": {"0.weight": 0.0}}
    optimizer = sgd(model.parameters())
    weights = [model[1].weight]
    decay.attach(model, mode=mode, at=at, optimizer=optimizer, weights=weights, **more)
    yield model
    for k in range(3):
        if k == 1:
            prune.identity(model[0], "weight")
        if k == 2:
            prune.remove(model[0], "weight")
        optimizer = sgd(model.parameters())
        train_step(decay, model, optimizer)
        yield nn.ParameterList(model.parameters())


@situation
def materialised_by_to_empty(decay: Any, mode: str, at: str) -> Any:
    """Attached on the meta device, then `to_empty` and filled."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False, device="meta"))
    moment = at if mode == "coupled" else "step"
    decay.attach(model, mode=mode, at=moment)
    dyadic(model.to_empty(device="cpu"))
    decay.weights = list(model.parameters())
    optimizer = sgd(model.parameters())
    yield model
    for _ in range(3):
        train_step(decay, model, optimizer)
        yield model


# State -----------------------------------------------------------------------------------------


@situation
def params_change_groups(decay: Any, mode: str, at: str) -> Any:
    """Two param groups swap their parameters, and then the list of groups is replaced."""
    model = lines(2)
    one, two = model.parameters()
    optimizer = sgd([{"params": [one]}, {"params": [two]}])
    decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    yield model
    for k in range(3):
        first, second = optimizer.param_groups
        if k == 1:
            first["params"], second["params"] = [two], [one]
        if k == 2:
            optimizer.param_groups = [{**second}, {**first}]
        train_step(decay, model, optimizer)
        yield model


@situation
def back_to_the_last_snapshot(decay: Any, mode: str, at: str) -> Any:
    """After a spike of the loss model, optimizer and handle go back; λ is a schedule."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, lambda k: (k + 1) / 8, mode=mode, at=at, optimizer=optimizer)
    parts = [model, optimizer] + ([] if decay.by_hand else [decay.handle])
    saved: list[Any] = []
    yield model
    for k in (0, 1, 2, 1, 2):
        if k == 1 and saved:
            for part, state in zip(parts, saved, strict=True):
                part.load_state_dict(copy.deepcopy(state))
        elif k == 1:
            saved = [copy.deepcopy(part.state_dict()) for part in parts]
        train_step(decay, model, optimizer, weight_decay=(k + 1) / 8)
        yield model


@situation
def saved_between_backward_and_step(decay: Any, mode: str, at: str) -> Any:
    """Model and handle are pickled in mid-step: the copies are bare, the original goes on."""
    model = lines(2)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    yield model
    for _ in range(2):
        optimizer.zero_grad()
        pull(model).backward()
        pickle.loads(pickle.dumps((model, decay.handle)))
        decay.now()
        optimizer.step()
        yield model


# Who steps -------------------------------------------------------------------------------------


@situation
def two_models_in_two_threads(decay: Any, mode: str, at: str) -> Any:
    """Each thread trains its own model, with its own handle."""
    models = nn.ModuleList([lines(2), lines(2)])
    optimizers = [sgd(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    decay.weights = list(models.parameters())
    yield models

    def train(model: nn.Module, optimizer: Any) -> None:
        for _ in range(4):
            train_step(decay, model, optimizer, only=list(model.parameters()))

    pairs = zip(models, optimizers, strict=True)
    threads = [threading.Thread(target=train, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield models


@situation
def many_inner_steps_before_an_outer_one(decay: Any, mode: str, at: str) -> Any:
    """Thirty inner steps on copies (MAML, implicit gradients), and one outer step."""
    model = lines(2)
    outer = sgd(model.parameters())
    decay.attach(model, mode=mode, at=at, optimizer=outer)
    yield model
    for _ in range(2):
        outer.zero_grad()
        fast = [p.detach().clone().requires_grad_() for p in model.parameters()]
        inner = sgd(fast, lr=1 / 4)
        for _ in range(30):
            inner.zero_grad()
            sum((p * 0.125).sum() for p in fast).backward()  # type: ignore[union-attr]
            inner.step()
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        decay.now()
        outer.step()
        yield model


@situation
def experts_that_are_not_routed_to(decay: Any, mode: str, at: str) -> Any:
    """Each step reaches one of three experts: only this one is decayed."""
    model = lines(3)
    optimizer = sgd(model.parameters())
    decay.attach(model, mode=mode, at=at, optimizer=optimizer)
    yield model
    for k in range(4):
        optimizer.zero_grad()
        pull(model[k % 3]).backward()
        decay.now()
        optimizer.step()
        yield model


@situation
def looks_between_backward_and_step(decay: Any, mode: str, at: str) -> Any:
    """Evaluation, `autograd.grad` and a saliency map between the backward pass and the step."""
    model = chain(nn.Linear(2, 2, bias=False))
    optimizer = sgd(model.parameters())
    decay.attach(model, DECAY, mode=mode, at=at, optimizer=optimizer)
    yield model
    for _ in range(2):
        optimizer.zero_grad()
        pull(model).backward()
        with torch.inference_mode():
            model(torch.ones(1, 2))
        torch.autograd.grad(pull(model), list(model.parameters()))
        x = torch.ones(1, 2, requires_grad=True)
        model(x).sum().backward(inputs=[x])
        decay.now(LR)
        optimizer.step()
        yield model
