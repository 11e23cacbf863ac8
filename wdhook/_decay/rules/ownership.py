"""Rules about who steps: master weights, optimizers that own nothing of the model, gradients that were taken away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..._base.problem import Problem
from ..entry import Entry
from ..living import living
from ..optimizers import announces_steps, owned_ids
from ..stand_ins import engine_of, is_slice, stand_in_of
from .base import Facts

COUPLED_TRAVELS = 'Use mode="coupled" with at="backward", whose decay travels in the gradient'
OTHERWISE = (
    "give every optimizer, optimizer=[a, b]; or freeze what is not trained: "
    "parameter.requires_grad_(False); or let the optimizer decay: wdhook.param_groups(model, λ)"
)


def not_stepped_by_those_given(facts: Facts) -> Iterator[Problem]:
    """Find a parameter with a gradient that none of the given optimizers owns."""
    state = facts.state
    given = state.optimizers.given()
    if not state.optimizers.was_given(facts.optimizer) or not facts.owned.unchecked:
        return
    owned = owned_ids(given)
    for param, entry in state.parameters.pairs():
        if param.grad is not None and not entry.paid and id(param) not in owned:
            yield master_weights(entry.name, param, "none of those given as `optimizer`")


def master_weights(name: str, param: Tensor, optimizer: str, taken: bool = False) -> Problem:
    """The problem of an optimizer that steps something else than a decayed parameter."""
    advice = f"{COUPLED_TRAVELS}; or {OTHERWISE}"
    if taken:
        advice = "Let the optimizer decay: give it wdhook.param_groups(model, λ), or groups of its copies"
    return Problem(
        "A decayed parameter has a gradient, and the optimizer that steps does not own it. It may step master "
        "weights: copies of the parameters, which it writes back, so that decay of the parameter itself would be "
        "lost.",
        advice,
        {"parameter": f"{name} {tuple(param.shape)} {param.dtype}", "optimizer": optimizer},
        (name,),
    )


class StepsCopies:
    """Finds an optimizer that steps copies of decayed parameters, so that decay at the step would be lost.

    A given optimizer that owns nothing of the model needs no proof. Any other one is recognised by content: copies
    start with the values of the parameters.
    """

    def __init__(self) -> None:
        self._cleared: set[int] = set()  # ids of optimizers that were seen to step no copies

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Look at an optimizer that owns nothing of the model, while none that does is known."""
        state = facts.state
        if facts.claimed or facts.owned.wraps or state.optimizers.met():
            return
        if any(engine_of(param) is not None for _, param in _decayed(facts)):
            return  # what an engine steps is followed, or refused by another rule
        waiting = next(_waiting(facts), None)
        if state.optimizers.was_given(facts.optimizer):
            first = waiting or next(_decayed(facts), None)
            if first is not None and (
                not state.config.in_backward or not state.config.in_gradient or state.taken
            ):
                yield master_weights(*first, facts.optimizer_name, taken=bool(state.taken))
            return
        travels = state.config.in_gradient and state.config.in_backward
        if waiting is None or travels or id(facts.optimizer) in self._cleared:
            return
        name, param = waiting
        if _copies(facts.optimizer, param) and not _is_owned_elsewhere(param):
            yield master_weights(name, param, facts.optimizer_name)
        else:
            self._cleared.add(id(facts.optimizer))


def _waiting(facts: Facts) -> Iterator[tuple[str, Tensor]]:
    return ((name, param) for name, param in _decayed(facts) if param.grad is not None)


def _decayed(facts: Facts) -> Iterator[tuple[str, Tensor]]:
    governed = facts.state.parameters.governed()
    for found in facts.state.parameters.walk():
        if id(found.param) in governed:
            yield found.name, found.param


def _copies(optimizer: Any, param: Tensor) -> bool:
    """Tell an optimizer that steps a copy of a parameter, which is no parameter of another module."""
    for group in optimizer.param_groups:
        for stepped in group["params"]:
            if is_copy(stepped, param) and not _is_of_a_module(stepped):
                return True
    return False


def is_copy(stepped: Tensor, param: Tensor) -> bool:
    """Tell a copy of a parameter, or a flat buffer that begins with one. Synchronises."""
    flat = stepped.ndim == 1 and stepped.numel() >= param.numel()
    if not (flat or stepped.shape == param.shape) or stepped.numel() <= 1:
        return False
    if stepped is param or hasattr(param, "to_local") or hasattr(stepped, "to_local"):
        return False
    head, values = stepped.detach().flatten()[: param.numel()], param.detach().flatten()
    # Not to the last bit: decay in the backward has shrunk the parameter already, by much less than a quarter.
    same = torch.isclose(head.to(values.device, values.dtype), values, rtol=0.25, atol=0.0).all()
    return bool(same & values.any())  # zeros are equal by chance


def _is_of_a_module(param: Tensor) -> bool:
    """Some module of the process owns the parameter: then it is a twin of ours, and no master copy.

    Looks through all objects of the process; asked once for an optimizer that steps what looks like a copy.
    """
    modules = living(torch.nn.Module)
    return any(
        param is p for module in modules for p in module.__dict__.get("_parameters", {}).values()
    )


def _is_owned_elsewhere(param: Tensor) -> bool:
    """Some optimizer of the process owns the parameter (MAML): then copies are no master weights."""
    return any(id(param) in owned_ids([optimizer]) for optimizer in living_optimizers())


def _is_stepped_elsewhere(param: Tensor, held: list[Tensor]) -> bool:
    """A known engine steps the parameter in another step or process: none of `held` is of it."""
    stand_in = stand_in_of(param)
    if stand_in is not None:
        return all(stand_in.stepped is not tensor for tensor in held)
    return engine_of(param) is not None and not any(is_slice(tensor, param) for tensor in held)


def _will_step_it(param: Tensor, announced_too: bool) -> bool:
    """Some optimizer owns the parameter and may step it; one that torch announces, if asked."""
    for optimizer in living_optimizers():
        if id(param) in owned_ids([optimizer]) and (
            announced_too or not announces_steps(optimizer)
        ):
            return True
    return False


def living_optimizers() -> Iterator[Any]:
    """Every optimizer of the process that is complete."""
    return (o for o in living(Optimizer) if hasattr(o, "param_groups"))


class NeverSteps:
    """Finds a handle none of whose parameters any optimizer steps: a copy of the model is trained, or another one."""

    def __init__(self) -> None:
        self._foreign = 0
        self._next = _PATIENCE

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Count steps of others until one is ours."""
        if facts.state.steps or facts.owned.owns_any() or facts.owned.wraps or facts.claimed:
            return
        self._foreign += 1
        if self._foreign < self._next:
            return
        self._next *= 50
        first = next(_waiting(facts), None) or next(_decayed(facts), None)
        if first is None or _will_step(facts):
            return
        name, param = first
        yield Problem(
            f"{self._foreign} optimizer steps were taken, and none of the optimizers owns a decayed parameter of this "
            "handle: nothing of its model is decayed at a step. A copy of the model (deepcopy, pickle, another "
            "process) has no hooks.",
            "Attach to the model that is trained; remove() this handle if its model is not",
            {
                "parameter": facts.state.describe(name, param),
                "last optimizer": facts.optimizer_name,
            },
            (name,),
        )


_PATIENCE = 20  # steps; the critic of a GAN takes five or so before the generator's first


def _will_step(facts: Facts) -> bool:
    """Some optimizer of the process owns a decayed parameter, and may step it later."""
    governed = facts.state.parameters.governed().keys()
    return any(not governed.isdisjoint(owned_ids([o])) for o in living_optimizers())


class TwoStep:
    """Finds parameters that a given optimizer and another one step in turn: each step of each decays."""

    def __init__(self) -> None:
        self._last: Any = None  # id of the last optimizer that stepped, and was not given
        self._given_has_stepped = False

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Remember who has stepped."""
        optimizers = facts.state.optimizers
        if not optimizers.given():
            return
        if not optimizers.was_given(facts.optimizer):
            self._last = facts.optimizer_name if self._given_has_stepped else None
            self._mine = {id(entry) for _, entry in facts.owned.pairs()}
            return
        self._given_has_stepped = True
        if self._last is None:
            return
        shared = next((e for _, e in facts.owned.pairs() if id(e) in self._mine), None)
        if shared is not None:
            yield Problem(
                "Two optimizers step a decayed parameter in turn, and `attach` was given one of them: the steps of "
                "the other decay too.",
                "Pause the decay while the other one steps: with decay.paused(): outer.step(); or give both",
                {
                    "parameter": shared.name,
                    "given": facts.optimizer_name,
                    "steps too": str(self._last),
                },
                (shared.name,),
            )


def taken_by_engine(facts: Facts) -> Iterator[Problem]:
    """Find parameters of an engine that takes their gradients away, where decay would be lost."""
    for name, param in _decayed(facts):
        engine = engine_of(param)
        if engine is None:
            continue
        known = {"parameter": facts.state.describe(name, param), "engine": engine.name}
        if engine.refusal:
            yield Problem(
                "The engine takes gradients away in the backward pass, and with this feature of it "
                "wdhook does not know what is stepped: decay would be lost.",
                f"Let the engine decay: {engine.advice}",
                {**known, "feature": engine.refusal},
                (name,),
            )
        elif facts.state.config.in_backward:
            yield Problem(
                "The engine takes gradients away in the backward pass, each micro-batch alone, so "
                'decay at "backward" would be lost or done several times.',
                f'Use attach(..., at="step"); or let the engine decay: {engine.advice}',
                {**known, "at": "backward"},
                (name,),
            )
        return


class GradientsVanish:
    """Finds parameters whose gradient is gone when an optimizer steps that does not own them.

    An engine has taken the gradient, whatever engine that is, and steps tensors of its own.
    """

    def __init__(self) -> None:
        self._steps = 0  # at which a gradient was gone that no pass was seen to lose

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Look at parameters that got a gradient since the last step."""
        state = facts.state
        if facts.owned.owns_any() or facts.owned.wraps or facts.claimed:
            return
        names = state.taken | state.seen
        held = [p for group in facts.optimizer.param_groups for p in group["params"]]
        gone = [f for f in state.parameters.walk() if f.name in names and f.param.grad is None]
        gone = [f for f in gone if not _is_stepped_elsewhere(f.param, held)]
        if not gone:
            return
        lost_in_pass = any(found.name in state.taken for found in gone)
        self._steps += 1
        if not lost_in_pass and self._steps < 2:
            return  # a trial pass, zeroed since
        if _will_step_it(gone[0].param, announced_too=bool(state.steps) or not lost_in_pass):
            return  # an optimizer that comes in its turn, or has stepped inside the backward pass
        yield Problem(
            "A decayed parameter got gradients in the backward pass and lost them (an engine keeps "
            "them in buffers of its own), and the optimizer that steps does not own the parameter: "
            "no decay reaches it.",
            "Let the optimizer or the engine decay: give it wdhook.param_groups(model, λ)",
            {
                "parameter": state.describe(gone[0].name, gone[0].param),
                "optimizer": facts.optimizer_name,
            },
            (gone[0].name,),
        )


def entry_names(entries: list[Entry]) -> tuple[str, ...]:
    """Names of several parameters."""
    return tuple(entry.name for entry in entries)
