"""Who steps what: several optimizers and handles, steps without notice. One situation a test."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from field import (
    AGAIN,
    DECAY,
    LR,
    RIGHT_OR_REFUSED,
    RIGHT_OR_TOLD,
    all_modes,
    check,
    everywhere,
    lines,
    pull,
    sgd,
    train_step,
)
from torch import nn

import wdhook

# Several optimizers, several handles ---------------------------------------------------------


@all_modes
def test_a_parameter_of_two_optimizers_and_a_schedule(mode: str) -> None:
    """p0 is stepped by A (with p1) and by B (with p2); λ is a schedule. "Each optimizer counts its
    own steps."

    p1 belongs to A alone: A's k-th step uses λ(k) for it, whatever B has done to p0 in between.
    """

    def loop(decay: Any) -> Any:
        model = lines(3)
        p = list(model.parameters())
        a, b = sgd(p[:2]), sgd([p[0], p[2]])
        decay.attach(model, lambda step: (step + 1) / 8, mode=mode, at="step")
        yield model[1]
        done = 0
        for optimizer in (a, a, b, a, a):
            model.zero_grad()
            pull(model).backward()
            if optimizer is a:
                done += 1
                decay.now(weight_decay=done / 8, only=[p[1]])
            optimizer.step()
            yield model[1]

    check(loop, RIGHT_OR_REFUSED)


def test_a_parameter_moves_to_another_optimizer() -> None:
    """p1 moves from A to B (both given); A steps at every micro-batch, B at every second. Coupled
    at "backward".

    From then on A's steps are no steps of p1: after two micro-batches B's step finds one decay in
    its gradient.
    """

    def loop(decay: Any) -> Any:
        model = lines(3)
        p = list(model.parameters())
        a, b = sgd(p[:2]), sgd(p[2:])
        decay.attach(model, optimizer=[a, b])
        yield model
        pull(model).backward()
        decay.now()
        a.step(), b.step()
        model.zero_grad()
        yield model
        a.param_groups[0]["params"] = [p[0]]
        b.add_param_group({"params": [p[1]]})
        for _ in range(2):
            a.zero_grad()
            pull(model).backward()
            decay.now(only=[p[0]])
            a.step()
        decay.now(only=p[1:])
        b.step()
        yield model

    check(loop, RIGHT_OR_REFUSED)


@everywhere
def test_an_outer_optimizer_steps_the_same_parameters(mode: str, at: str) -> None:
    """DiLoCo, Reptile: an inner optimizer trains, and an outer SGD steps the same parameters with a
    pseudo-gradient.

    pytorch/torchft#230, pytorch/torchtitan#1407. The handle was given the inner one: the outer has
    no decay, as none of its kind has with torch.optim. If any optimizer decays, who names one has
    to be told that another does too.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        inner, outer = sgd(model.parameters()), sgd(model.parameters(), lr=1 / 4)
        decay.attach(model, mode=mode, at=at, optimizer=inner)
        yield model
        for _ in range(2):
            before = [p.detach().clone() for p in model.parameters()]
            for _ in range(2):
                model.zero_grad()
                pull(model).backward()
                decay.now()
                inner.step()
            with torch.no_grad():
                for p, old in zip(model.parameters(), before, strict=True):
                    p.grad = old - p
                    p.copy_(old)
            outer.step()
            yield model

    check(loop, RIGHT_OR_TOLD, moved=True)


def test_one_optimizer_of_two_models_is_adopted_for_one() -> None:
    """`adopt(a, optimizer)` where the optimizer steps another model b too: b's decay must not be
    switched off in silence.

    Either b is decayed as before, or the call is refused, and "the optimizer is left as it was".
    """
    a, b = lines(1), lines(1)
    optimizer = sgd([*a.parameters(), *b.parameters()], weight_decay=DECAY)
    try:
        wdhook.adopt(a, optimizer)
    except wdhook.WdhookError:
        assert optimizer.param_groups[0]["weight_decay"] == DECAY
        return
    want = a[0].weight.detach() * (1 - LR * DECAY)
    (pull(a, 0.0) + pull(b, 0.0)).backward()
    optimizer.step()
    assert torch.equal(a[0].weight, want)
    assert torch.equal(b[0].weight, want), "b is no longer decayed"


def test_apply_weight_decay_and_an_optimizer_that_decays_too() -> None:
    """`apply_weight_decay(model, ..., optimizer=optimizer)` with an optimizer whose own
    weight_decay is not 0.

    `attach` calls that DoubleDecayError. Refused, and nothing changed, or one decay.
    """
    model = lines(1)
    optimizer = sgd(model.parameters(), weight_decay=DECAY)
    before = model[0].weight.detach().clone()
    pull(model, 0.0).backward()
    try:
        wdhook.apply_weight_decay(model, weight_decay=DECAY, optimizer=optimizer)
    except wdhook.WdhookError:
        assert not model[0].weight.grad.any()
        assert torch.equal(model[0].weight, before)
        return
    optimizer.step()
    assert torch.equal(model[0].weight, before * (1 - LR * DECAY))


@everywhere
def test_remove_and_attach_between_backward_and_step(mode: str, at: str) -> None:
    """The handle is removed and another attached (other overrides, say) between a backward pass and
    its step.

    At "backward" the decay has happened; it is not done again at the step. A new handle may not
    know what an old one did; then that has to be said.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for step in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            if step == 0 and decay.handle is not None:
                decay.handle.remove()
                decay.attach(model, mode=mode, at=at, optimizer=optimizer)
            decay.now()
            optimizer.step()
            yield model

    check(loop, RIGHT_OR_TOLD)


# Steps that are not announced, copies --------------------------------------------------------


@everywhere
def test_step_is_replaced_on_the_instance(mode: str, at: str) -> None:
    """`optimizer.step = my_step.__get__(optimizer)`, as sd-scripts#1319 patches Adafactor; the
    optimizer is given.

    torch's hooks are in the step of the class, so nobody hears this one; that can be seen when it
    is given. 24 steps are taken. Tolerance: 24 steps of a few float32 roundings (6e-8 each) of
    numbers below 16.
    """

    @torch.no_grad()
    def my_step(self: Any, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(LR * p.grad)

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        optimizer.step = my_step.__get__(optimizer)
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(24):
            train_step(decay, model, optimizer)
            yield model

    check(loop, RIGHT_OR_REFUSED, tolerance=1e-5)


@everywhere
def test_a_fused_backward_pass_never_calls_step(mode: str, at: str) -> None:
    """A hook calls `optimizer.step_param(p, group)` in the backward pass and sets `p.grad = None`;
    `step()` is never called.

    sd-scripts#1319 (--fused_backward_pass). The optimizer was given, so "give it" is no advice.
    Right, or told within 24 passes. Tolerance: as above.
    """

    class Fused(torch.optim.SGD):
        @torch.no_grad()
        def step_param(self, p: Any, group: Any) -> None:
            p.sub_(group["lr"] * p.grad)

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = Fused(model.parameters(), lr=LR)
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)

        def hook(p: Any) -> None:
            decay.now(only=[p])
            optimizer.step_param(p, optimizer.param_groups[0])
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        yield model
        for _ in range(24):
            pull(model).backward()
            yield model

    check(loop, RIGHT_OR_TOLD, untrue=("give it as `optimizer=`",), tolerance=1e-5)


@everywhere
def test_master_weights_with_main_grad(mode: str, at: str) -> None:
    """Gradients are moved into `p.main_grad` by a hook, `p.grad = None`, and float32 masters are
    stepped by the optimizer given.

    NVIDIA/Megatron-LM#1335, #4028. The masters are decayed once per step, or it is said that they
    are not: the optimizer that was given owns nothing of the model. Tolerance: 24 steps of float32
    roundings of numbers below 32.
    """

    def loop(decay: Any) -> Any:
        model = lines(1)
        param = model[0].weight
        masters = nn.ParameterList([param.detach().clone()])
        optimizer = sgd(masters.parameters())
        main_grad = torch.zeros_like(param)

        def move(*_: Any) -> None:
            main_grad.add_(param.grad)
            param.grad = None

        node = param.expand_as(param).grad_fn.next_functions[0][0]
        node.register_hook(move)
        decay.attach(model, mode=mode, at=at, optimizer=optimizer, weights=masters.parameters())
        yield masters
        for _ in range(24):
            main_grad.zero_()
            for _ in range(2):
                pull(model, 0.125).backward()
            masters[0].grad = main_grad
            decay.now()
            optimizer.step()
            with torch.no_grad():
                param.copy_(masters[0])
            yield masters

    check(loop, RIGHT_OR_TOLD, untrue=AGAIN, tolerance=1e-4, moved=True)


@everywhere
def test_a_deep_copy_is_trained_in_place_of_the_model(mode: str, at: str) -> None:
    """`copy.deepcopy(model)` after `attach`, as for folds of a cross-validation, and the copy is
    trained.

    Hooks are not copied. The copy may be bare, but not for ever in silence: the handle hears 24
    steps and does nothing.
    """

    def loop(decay: Any) -> Any:
        original = lines(2)
        decay.attach(original, mode=mode, at=at, optimizer=sgd(original.parameters()))
        model = copy.deepcopy(original)
        decay.weights = list(model.parameters())
        optimizer = sgd(model.parameters())
        yield model
        for _ in range(24):
            train_step(decay, model, optimizer)
            yield model

    check(loop, RIGHT_OR_TOLD, tolerance=1e-5)


@pytest.mark.parametrize(
    ("mode", "at"), [("coupled", "backward"), ("coupled", "step"), ("decoupled", "step")]
)
def test_the_model_gets_gradients_and_is_not_trained(mode: str, at: str) -> None:
    """The handle is on a model that gets gradients and is in no optimizer: the wrong one of two.

    Docs: "20 optimizer steps while a decayed parameter had a gradient, none by an optimizer that
    owns one: WdhookWarning".
    """
    model, other = lines(1), lines(1)
    handle = wdhook.attach(model, DECAY, mode=mode, at=at)
    optimizer = sgd(other.parameters(), lr=1 / 1024)
    with torch.no_grad():
        other[0].weight.neg_()  # so that it is no copy of the model's
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for _ in range(30):
                model.zero_grad(), optimizer.zero_grad()
                (pull(model) + pull(other)).backward()
                optimizer.step()
        except wdhook.WdhookError:
            return
    assert any(issubclass(w.category, wdhook.WdhookWarning) for w in caught), (
        f"30 steps in silence: {handle!r}"
    )
