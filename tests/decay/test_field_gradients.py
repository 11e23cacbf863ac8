"""What loops do to gradients between the backward pass and the update: one situation a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from field import (
    AGAIN,
    LR,
    RIGHT,
    RIGHT_OR_REFUSED,
    RIGHT_OR_TOLD,
    all_modes,
    chain,
    check,
    everywhere,
    lines,
    pull,
    sgd,
)
from torch import nn

# Gradients that come or change in step pre-hooks, closures and steps -------------------------


@all_modes
@pytest.mark.parametrize("registered", ["before attach", "after attach"])
@pytest.mark.parametrize("what", ["clip", "average"])
def test_the_users_step_pre_hook_changes_the_gradients(
    mode: str, registered: str, what: str
) -> None:
    """The optimizer has a step pre-hook of the user, which clips the gradients, or divides their
    sum by the number of ranks.

    pytorch/pytorch#88446, #119300. At "step" the decay comes "just before the update, after
    accumulation, un-scaling and clipping, as the optimizer's own weight_decay would": so after this
    hook too, whenever it was registered.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())

        def hook(*_: Any) -> None:
            for p in model.parameters():
                p.grad.clamp_(-1 / 16, 1 / 16) if what == "clip" else p.grad.div_(8)

        if registered == "before attach":
            optimizer.register_step_pre_hook(hook)
        decay.attach(model, mode=mode, at="step", optimizer=optimizer)
        if registered == "after attach":
            optimizer.register_step_pre_hook(hook)
        optimizer.register_step_pre_hook(lambda *_: decay.now())
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            optimizer.step()
            yield model

    check(loop, RIGHT_OR_REFUSED)


@everywhere
def test_a_step_pre_hook_of_the_user_brings_the_gradients(mode: str, at: str) -> None:
    """Gradients are kept elsewhere (off-loaded, main-grad buffers) and put into `p.grad` by the
    user's step pre-hook.

    pytorch/pytorch#88446, NVIDIA/Megatron-LM#800. The parameter has a gradient when the update
    reads it, so it is decayed.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        held: list[torch.Tensor] = []

        def bring(*_: Any) -> None:
            for p, grad in zip(model.parameters(), held, strict=True):
                p.grad = grad
            decay.now()

        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        optimizer.register_step_pre_hook(bring)
        yield model
        for _ in range(3):
            held[:] = torch.autograd.grad(pull(model), list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            yield model

    check(loop, RIGHT_OR_REFUSED)


@everywhere
def test_a_step_pre_hook_of_the_user_brings_the_closure(mode: str, at: str) -> None:
    """A step pre-hook of the user returns new arguments for `step`, with a closure in them."""

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = pull(model)
            loss.backward()
            decay.now()
            return loss

        optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
        yield model
        for _ in range(2):
            optimizer.step()
            yield model

    check(loop, RIGHT)


class LineSearch(torch.optim.Optimizer):
    """As the stochastic line searches: the closure returns a loss, and `step` calls backward
    itself.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})
        self.before_update = lambda: None

    def step(self, closure: Any) -> None:  # type: ignore[override]
        self.zero_grad()
        closure().backward()
        self.before_update()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(LR * p.grad)


@everywhere
def test_a_step_that_calls_backward_itself(mode: str, at: str) -> None:
    """`optimizer.step(closure)` zeroes, evaluates the closure and calls backward on its result (the
    stochastic line searches).

    The parameters got a gradient and were stepped, so they are decayed once. Gradients that are
    born inside `step` are seen at its end at the latest: then at least it has to be said.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = LineSearch(model.parameters())
        optimizer.before_update = decay.now
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.step(lambda: pull(model))
            yield model

    check(loop, RIGHT_OR_TOLD)


class Options(torch.optim.Optimizer):
    """As PyTorch-LBFGS: the closure comes in a dictionary of options."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    def step(self, options: Any) -> None:  # type: ignore[override]
        options["closure"]()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(LR * p.grad)


@everywhere
def test_the_closure_is_an_entry_of_a_dictionary(mode: str, at: str) -> None:
    """`optimizer.step({"closure": closure, ...})`, as PyTorch-LBFGS has it: one decay per step all
    the same.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = Options(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)

        def closure() -> None:
            optimizer.zero_grad()
            pull(model).backward()
            decay.now()

        yield model
        for _ in range(2):
            optimizer.step({"closure": closure, "line_search": "none"})
            yield model

    check(loop, RIGHT_OR_TOLD)


# Gradients moved, replaced and scaled between micro-batches ----------------------------------


def accepted(mode: str, at: str) -> str:
    """Coupled decay at "backward" travels in the gradient, and what the loop does to it may be
    anything.
    """
    return RIGHT_OR_TOLD if (mode, at) == ("coupled", "backward") else RIGHT


@everywhere
def test_micro_batches_are_moved_into_a_buffer_of_the_users(mode: str, at: str) -> None:
    """After each of three micro-batches the gradient is added to an own buffer and `p.grad = None`;
    the sum is stepped.

    NVIDIA/Megatron-LM#800, pytorch/pytorch#158709. One step, one decay. At "backward" each
    micro-batch looks like the first after a skipped step; but that the sum is "not decayed again"
    would not be true of it.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for _ in range(3):
                pull(model).backward()
                for p, total in zip(model.parameters(), sums, strict=True):
                    total.add_(p.grad)
                    p.grad = None
            for p, total in zip(model.parameters(), sums, strict=True):
                p.grad = total
            decay.now()
            optimizer.step()
            optimizer.zero_grad()
            yield model

    check(loop, accepted(mode, at), untrue=AGAIN)


@everywhere
@pytest.mark.parametrize("how", ["detach", "times one"])
def test_the_gradient_is_replaced_between_micro_batches(mode: str, at: str, how: str) -> None:
    """`p.grad = p.grad.detach()`, or `p.grad = p.grad * 1.0`, after each of three of four
    micro-batches.

    Docs: a replaced gradient is "taken as derived, not decayed again; WdhookWarning, once". One
    decay, or a true word.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            for micro in range(4):
                pull(model).backward()
                if micro < 3:
                    for p in model.parameters():
                        p.grad = p.grad.detach() if how == "detach" else p.grad * 1.0
            decay.now()
            optimizer.step()
            optimizer.zero_grad()
            yield model

    check(loop, accepted(mode, at), untrue=AGAIN)


@everywhere
def test_a_saved_gradient_is_put_back_and_accumulated_onto(mode: str, at: str) -> None:
    """PGD, adversarial training: the clean gradient is cloned, attacks zero and go backward, the
    clone is put back, and the last attack accumulates onto it. PaddlePaddle/PaddleNLP#723. One
    step, one decay.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            backup = [p.grad.clone() for p in model.parameters()]
            for attack in range(3):
                if attack < 2:
                    optimizer.zero_grad()
                else:
                    for p, grad in zip(model.parameters(), backup, strict=True):
                        p.grad = grad
                pull(model, 0.125).backward()
            decay.now()
            optimizer.step()
            yield model

    check(loop, accepted(mode, at), untrue=AGAIN)


@everywhere
def test_the_gradient_is_replaced_by_a_view_before_the_step(mode: str, at: str) -> None:
    """`p.grad = flat[...].view_as(p)`, made of per-sample gradients, as in Opacus' optimizer
    (pytorch/opacus#203).

    Docs: a gradient that is replaced between its decay and the step is warned of. It holds no
    decay.
    """

    def loop(decay: Any) -> Any:
        model = lines(2)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            pull(model).backward()
            flat = torch.full((8,), 0.5)
            for p, part in zip(model.parameters(), flat.split(4), strict=True):
                p.grad = part.view_as(p)
            decay.now()
            optimizer.step()
            yield model

    check(loop, accepted(mode, at))


@everywhere
def test_a_running_mean_of_the_gradients(mode: str, at: str) -> None:
    """Before each micro-batch `p.grad.mul_(seen / new)`, so that the sum is a mean over tokens
    (ml-explore/mlx-lm#1413).

    The decay of a step is λ·p, not what the running mean leaves of it.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for _ in range(2):
            optimizer.zero_grad()
            for micro in range(3):
                if micro:
                    for p in model.parameters():
                        p.grad.mul_(0.5)
                pull(model).backward()
            decay.now()
            optimizer.step()
            yield model

    check(loop, accepted(mode, at), untrue=AGAIN)
