"""Engines that take gradients away and step tensors of their own: whatever they are called, no
decay is lost in silence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import assert_close, batches, loss_of, own_groups, perceptron

import wdhook
from wdhook._decay.optimizers import innermost, keeps_two_sequences

λ, LR = 0.1, 0.05


class Engine:
    """An invented engine: its hooks move gradients to a flat buffer, and its optimizer steps a
    flat copy."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.flat = torch.cat([p.detach().flatten() for p in self.params])
        self.buffer = torch.zeros_like(self.flat)
        self.optimizer = torch.optim.SGD([self.flat], lr=LR)
        for param, part in zip(self.params, self.parts(self.buffer), strict=True):
            param.register_post_accumulate_grad_hook(self.taker(part))

    def parts(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split([p.numel() for p in self.params]))

    def taker(self, part: Tensor) -> Any:
        def take(param: Tensor) -> None:
            assert param.grad is not None
            part.add_(param.grad.flatten())
            param.grad = None

        return take

    def step(self) -> None:
        """Step the flat copy, and write it back."""
        self.flat.grad = self.buffer.clone()
        self.buffer.zero_()
        self.optimizer.step()
        with torch.no_grad():
            for param, part in zip(self.params, self.parts(self.flat), strict=True):
                param.copy_(part.view_as(param))


class SlowEngine(Engine):
    """Takes the gradients not in the backward pass, but at its step."""

    def taker(self, part: Tensor) -> Any:
        return lambda param: None

    def step(self) -> None:
        for param, part in zip(self.params, self.parts(self.buffer), strict=True):
            assert param.grad is not None
            part.add_(param.grad.flatten())
            param.grad = None
        super().step()


def train(model: nn.Module, engine: Engine, micro: int, steps: int = 4) -> None:
    data = iter(batches(model, steps * micro))
    for _ in range(steps):
        for _ in range(micro):
            loss_of(model, next(data)).backward()
        engine.step()


def ways() -> Iterator[tuple[str, str, bool, bool, int]]:
    """mode, at, attached before the engine is made, given the optimizer that the engine replaces,
    micro-batches."""
    for mode, at in product(("coupled", "decoupled", "independent"), ("backward", "step")):
        for before, given, micro in product((False, True), (False, True), (1, 3)):
            if at == "backward" and mode != "coupled" and not given:
                continue  # has no learning rate to go by
            if (mode, at, micro) != ("coupled", "backward", 1):  # that is right: tested below
                yield mode, at, before, given, micro


@pytest.mark.filterwarnings("ignore:Parameters change between:wdhook.WdhookWarning")
@pytest.mark.parametrize(("mode", "at", "before", "given", "micro"), list(ways()))
def test_an_invented_engine_is_refused(
    mode: Any, at: Any, before: bool, given: bool, micro: int
) -> None:
    """At its first step, before anything is changed, with advice that works."""
    model = perceptron()
    start = copy.deepcopy(model.state_dict())
    replaced = torch.optim.SGD(model.parameters(), lr=LR)
    engine = None if before else Engine(model)
    arguments: Any = {"optimizer": replaced} if given else {}
    with wdhook.attach(model, λ, mode=mode, at=at, **arguments):
        engine = engine or Engine(model)
        flat = engine.flat.clone()
        with pytest.raises(wdhook.MasterWeightsError, match=r"wdhook.param_groups") as error:
            train(model, engine, micro)
    assert error.value.rule == "gradient-taken"
    assert 'at="backward"' not in str(error.value)
    assert torch.equal(engine.flat, flat)
    if at == "step" or mode == "coupled":
        assert all(torch.equal(model.state_dict()[name], start[name]) for name in start)


@pytest.mark.filterwarnings("ignore:Parameters change between:wdhook.WdhookWarning")
@pytest.mark.parametrize("before", [False, True])
def test_coupled_decay_travels_with_one_micro_batch(before: bool) -> None:
    """The engine takes the gradient with its decay in it, once for each step."""
    model = perceptron()
    twin = copy.deepcopy(model)
    engine = None if before else Engine(model)
    with wdhook.attach(model, λ):
        train(model, engine or Engine(model), micro=1)
    optimizer = torch.optim.SGD(own_groups(twin, λ), lr=LR)
    for batch in batches(twin, 4):
        loss_of(twin, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    # The flat optimizer adds -lr·(g + λp) as the other does: the same roundings, in another order
    # of addition.
    assert_close(model.state_dict(), twin.state_dict(), 1e-6)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_an_engine_that_takes_gradients_at_its_step_is_refused(mode: Any) -> None:
    """No pass was seen to lose a gradient, but it is gone at each step: the second is refused."""
    model = perceptron()
    handle = wdhook.attach(model, λ, mode=mode, at="step")
    with handle, pytest.raises(wdhook.MasterWeightsError) as error:
        train(model, SlowEngine(model), micro=2)
    assert error.value.rule == "gradient-taken"


def test_an_engine_that_takes_a_given_optimizer_apart_is_told() -> None:
    """The given optimizer owns the flat copy only."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with wdhook.attach(model, λ, mode="decoupled", at="step", optimizer=optimizer):
        engine = SlowEngine(model)
        optimizer.param_groups[0]["params"] = [engine.flat]
        engine.optimizer = optimizer
        with pytest.raises(wdhook.MasterWeightsError, match="steps does not own it"):
            train(model, engine, micro=1)


def test_optimizers_of_others_are_no_engines() -> None:
    """A critic is stepped while the generator's gradients are gone: the generator has an optimizer
    of its own."""
    generator, critic = perceptron(), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(generator.parameters(), lr=LR)
    other = torch.optim.SGD(critic.parameters(), lr=LR)
    with wdhook.attach(generator, λ, at="step") as decay:
        for _ in range(3):
            for batch in batches(generator, 5):
                critic(generator(batch)).square().mean().backward()
                optimizer.zero_grad()
                other.step()
                other.zero_grad()
            loss_of(generator, batches(generator, 1)[0]).backward()
            optimizer.step()
        assert "steps=3" in repr(decay)


class Listed:
    """The state of an optimizer that is no mapping, as that of Megatron's chained optimizers."""

    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def __iter__(self) -> Iterator[Any]:
        return iter(self.states)


class Wrapper:
    """An optimizer that is none of torch's, with `train` and `eval` for any optimizer inside:
    accelerate's is alike."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return Listed([self.optimizer.state])

    def step(self) -> None:
        self.optimizer.step()

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_wrappers_of_any_class_are_looked_into() -> None:
    """Neither `train` and `eval` of a wrapper, nor a state that is no mapping, are taken for
    ScheduleFree's."""
    model = perceptron()
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    wrapper = Wrapper(Wrapper(inner))
    assert list(innermost(wrapper)) == [inner]
    with wdhook.attach(model, λ, mode="decoupled", at="step", optimizer=wrapper) as decay:  # type: ignore[arg-type]
        loss_of(model, batches(model, 1)[0]).backward()
        wrapper.step()
        assert "steps=1" in repr(decay)


def test_a_state_that_is_no_mapping() -> None:
    """An optimizer without one inside, whose state torch's is not: it ends in no AttributeError."""

    class Alone:
        def __init__(self) -> None:
            self.param_groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": LR}]
            self.state = Listed([])

    class Switching(Alone):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    assert not keeps_two_sequences(Alone())
    assert keeps_two_sequences(Switching())  # the twin: the methods are its own
