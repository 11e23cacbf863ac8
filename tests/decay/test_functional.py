"""torch.func, saved tensors that go elsewhere, and backward passes in threads: who gets a decay,
and who does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from phases import MODES, own, plain
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint_sequential
from twins import (
    LR,
    assert_bit_equal,
    assert_close,
    batches,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    weights,
    zero,
    λ,
)

import wdhook

SGD = torch.optim.SGD
AT = pytest.mark.parametrize("at", ["backward", "step"])


def functional_loss(params: dict[str, Tensor], model: nn.Module, batch: Tensor) -> Tensor:
    return (functional_call(model, params, (batch,)) - 1).square().mean()


@MODES
def test_functional_call_with_the_models_own_parameters(mode: str, at: str) -> None:
    """Gradients accumulate on the parameters of the model, so they are decayed as ever."""
    model, twin = twins(perceptron())
    optimizer = plain(mode)(model)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
        for batch in batches(model, 5):
            zero(model, to_none=True)
            functional_loss(dict(model.named_parameters()), model, batch).backward()
            optimizer.step()
    train(twin, own(mode)(twin), batches(twin, 5))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@MODES
def test_functional_call_with_other_tensors(mode: str, at: str) -> None:
    """Tensors that stand in for the parameters are not the model's: nothing of ours happens, to
    either."""
    model = perceptron()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    others = {name: p.clone().requires_grad_() for name, p in before.items()}
    twin = {name: p.clone().requires_grad_() for name, p in before.items()}
    optimizer = plain(mode)(model)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer) as handle:
        for params in (others, twin):
            if params is twin:
                handle.remove()
            own = SGD(params.values(), lr=LR)
            for batch in batches(
                model, 25
            ):  # more than the steps after which an optimizer of copies is a warning
                own.zero_grad()
                functional_loss(params, model, batch).backward()
                own.step()
                optimizer.step()
    assert_bit_equal(others, twin)
    assert_bit_equal(dict(model.named_parameters()), before)


@AT
def test_torch_func_grad_accumulates_nothing(at: str) -> None:
    """A transform gives gradients away: they hold no decay; assigned by hand, they are decayed at
    the step."""
    model, twin = twins(perceptron())
    optimizer = SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, at=at):
        for batch, other in zip(batches(model, 5), batches(twin, 5), strict=True):
            params = dict(model.named_parameters())
            grads = torch.func.grad(functional_loss)(params, model, batch)
            expected = torch.func.grad(functional_loss)(params, twin, other)
            assert_bit_equal(grads, expected)
            assert all(p.grad is None for p in model.parameters())
            for name, param in params.items():
                param.grad = grads[name].detach()
            optimizer.step()
            zero(model, to_none=True)
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 5))
    # The gradient of a transform may be summed in another order: five steps of some units in the
    # last place below 1.
    assert_close(model.state_dict(), twin.state_dict(), 1e-6)


def ensemble(models: list[nn.Module], batch: Tensor) -> dict[str, Tensor]:
    """Gradients of several models at once."""
    params, _ = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    return vmap(torch.func.grad(functional_loss), in_dims=(0, None, None))(params, models[0], batch)


def test_an_ensemble_under_vmap_is_left_alone() -> None:
    """Stacked copies are not the parameters: the gradients of an ensemble are those of models
    without wdhook."""
    models = [perceptron(seed=seed) for seed in range(3)]
    batch = batches(models[0], 1)[0]
    expected = ensemble(models, batch)
    for model in models:
        wdhook.attach(model, λ)
    assert_bit_equal(ensemble(models, batch), expected)
    assert all(p.grad is None for model in models for p in model.parameters())
    torch.autograd.functional.hessian(
        lambda w: functional_loss({"0.weight": w}, models[0], batch), models[0][0].weight
    )
    assert all(p.grad is None for model in models for p in model.parameters())


@AT
def test_the_inner_steps_of_maml_are_not_decayed_and_the_outer_one_is(at: str) -> None:
    """Fast weights are made from the parameters and are no parameters; the meta-gradient that
    reaches these is."""

    def meta_loss(model: nn.Module, batch: Tensor) -> Tensor:
        params = dict(model.named_parameters())
        grads = torch.autograd.grad(
            functional_loss(params, model, batch), list(params.values()), create_graph=True
        )
        fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return functional_loss(fast, model, batch)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in batches(model, 5):
            optimizer.zero_grad()
            meta_loss(model, batch).backward()
            optimizer.step()

    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, at=at):
        run(model, SGD(model.parameters(), lr=LR))
    run(twin, SGD(own_groups(twin), lr=LR))
    assert_bit_equal(model.state_dict(), twin.state_dict())


class Offloaded(nn.Module):
    """A model whose forward pass saves nothing on the device."""

    def __init__(self, inside: nn.Module, way: str) -> None:
        super().__init__()
        self.inside, self.way = inside, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "offloaded":
            with torch.autograd.graph.save_on_cpu():
                return self.inside(x)
        if self.way == "plain":
            return self.inside(x)
        return checkpoint_sequential(
            self.inside, 3, x.requires_grad_(), use_reentrant=self.way == "reentrant"
        )


OLD_CHECKPOINT = pytest.mark.filterwarnings(
    "ignore:.torch.cpu.amp.autocast:FutureWarning"
)  # of torch 2.4 itself
WAYS = ["offloaded", "reentrant", "not reentrant"]


@OLD_CHECKPOINT
@pytest.mark.parametrize("way", WAYS)
@MODES
def test_saved_tensors_that_go_elsewhere(mode: str, at: str, way: str) -> None:
    """`save_on_cpu`, and `checkpoint_sequential` of both kinds; also while the hook shrinks
    parameters."""
    model, twin = twins(Offloaded(perceptron(torch.float64), way))
    optimizer = plain(mode)(model)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
        train(model, optimizer, batches(model, 6))
    twin.way = "plain"
    train(twin, own(mode)(twin), batches(twin, 6))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@OLD_CHECKPOINT
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("to_none", [True, False])
def test_saved_tensors_that_go_elsewhere_accumulated(way: str, to_none: bool) -> None:
    """Two micro-batches a step hold one decay, with both kinds of zeroing."""
    model, twin = twins(Offloaded(perceptron(torch.float64), way))
    with wdhook.attach(model, λ):
        train(model, SGD(model.parameters(), lr=LR), batches(model, 6), micro=2, to_none=to_none)
    twin.way = "plain"
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 6), micro=2, to_none=to_none)
    # In float64: the hook adds its term between the two micro-batches, another order of the sum.
    assert_close(model.state_dict(), twin.state_dict(), 1e-13)


@OLD_CHECKPOINT
def test_a_layer_shared_by_reentrant_segments_is_loud_where_the_hook_shrinks_it() -> None:
    """The backward of one nested segment shrinks what the next one reads: decayed once, and a
    warning names at="step"."""
    shared = nn.Linear(4, 4)
    layers = [
        shared,
        nn.Tanh(),
        shared,
        nn.Tanh(),
        shared,
        nn.Tanh(),
    ]  # a Sequential would give its shared layer only once
    model = nn.Sequential(*layers)
    optimizer = SGD(model.parameters(), lr=LR)
    before = shared.weight.detach().clone()
    with wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer):
        x = batches(model, 1)[0].requires_grad_()
        loss = checkpoint_sequential(layers, 3, x, use_reentrant=True).sum()
        with pytest.warns(wdhook.WdhookWarning, match='second gradient[\\s\\S]*at="step"'):
            loss.backward()
    assert torch.equal(shared.weight, before * (1 - LR * λ))


@MODES
def test_backward_on_the_thread_that_called_it(mode: str, at: str) -> None:
    """`set_multithreading_enabled(False)` changes nothing."""
    model, twin = twins(perceptron())
    optimizer = plain(mode)(model)
    with (
        torch.autograd.set_multithreading_enabled(False),
        wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer),
    ):
        train(model, optimizer, batches(model, 5))
    train(twin, own(mode)(twin), batches(twin, 5))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def in_threads(jobs: list[Callable[[], Any]]) -> None:
    """Run all at once, and raise what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def guarded(job: Callable[[], Any]) -> None:
        try:
            start.wait(30)
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


@MODES
def test_two_models_trained_in_two_threads(mode: str, at: str) -> None:
    """Each with a handle of its own: attached, trained and removed at the same time."""

    def job(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            optimizer = plain(mode)(model)
            with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
                train(model, optimizer, batches(model, 30))

        return run

    pairs = [twins(perceptron(seed=seed)) for seed in range(2)]
    in_threads([job(model) for model, _ in pairs])
    for model, twin in pairs:
        train(twin, own(mode)(twin), batches(twin, 30))
        assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["step", "backward, one at a time"])
def test_two_threads_on_one_model(at: str) -> None:
    """Micro-batches in threads: at "step" there is one decay for them all; at "backward" they have
    to take turns."""
    model, twin = twins(perceptron(torch.float64))
    optimizer, own = SGD(model.parameters(), lr=LR), SGD(own_groups(twin), lr=LR)
    turn = threading.Lock()

    def job(batch: Tensor) -> Callable[[], None]:
        def run() -> None:
            loss = loss_of(model, batch)
            if at == "step":
                loss.backward()
            else:
                with turn:
                    loss.backward()

        return run

    with wdhook.attach(model, λ, at="step" if at == "step" else "backward"):
        for i in range(5):
            zero(model, to_none=True)
            in_threads([job(batch) for batch in batches(model, 4, seed=i)])
            optimizer.step()
    for i in range(5):
        zero(twin, to_none=True)
        for batch in batches(twin, 4, seed=i):
            loss_of(twin, batch).backward()
        own.step()
    assert_close(
        model.state_dict(), twin.state_dict(), 1e-13
    )  # the threads sum in any order, in float64


@MODES
def test_a_model_made_under_inference_mode(mode: str, at: str) -> None:
    """torch gives such weights no gradient, and refuses to step: nothing is decayed, and they stay
    as they were."""
    with torch.inference_mode():
        model = nn.Linear(4, 2)
        before = model.weight.clone()
    optimizer = plain(mode)(model)
    with wdhook.attach(model, λ, mode=mode, at=at, optimizer=optimizer):
        model(torch.ones(1, 4)).sum().backward()
        assert model.weight.grad is None
        with pytest.raises(RuntimeError, match="outside InferenceMode is not allowed"):
            optimizer.step()
    assert torch.equal(model.weight, before)


def test_attached_under_inference_mode() -> None:
    """A handle made under inference_mode, for a model made outside, works as any other."""
    model = perceptron()
    with torch.inference_mode():
        handle = wdhook.attach(model, λ)
    twin = perceptron()
    train(model, SGD(model.parameters(), lr=LR), batches(model, 3))
    handle.remove()
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_the_comparisons_can_fail() -> None:
    """Without decay, parameters end far outside every tolerance above."""
    model, twin = twins(perceptron())
    train(model, SGD(model.parameters(), lr=LR), batches(model, 5))
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 5))
    assert not all(map(torch.equal, weights(model), weights(twin)))
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(model.state_dict(), twin.state_dict(), 1e-3)
