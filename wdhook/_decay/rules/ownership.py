"""Rules about owners: master weights, optimizers of other models, gradients taken away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..._base.problem import Problem
from ..living import living
from ..optimizers import owned_ids
from ..stand_ins import engine_of
from ..state import State
from .base import Facts

COUPLED_TRAVELS = 'Use mode="coupled" with at="backward", whose decay travels in the gradient'
OTHERWISE = (
    "give every optimizer, optimizer=[a, b]; or freeze what is not trained: "
    "parameter.requires_grad_(False); or let the optimizer decay: wdhook.param_groups(model, λ)"
)


# Master weights --------------------------------------------------------------------------------


def not_stepped_by_those_given(facts: Facts) -> Iterator[Problem]:
    """Find a parameter with a gradient outside of every given optimizer."""
    state = facts.state
    if not state.optimizers.was_given(facts.optimizer) or not facts.owned.unchecked:
        return
    owned = owned_ids(state.optimizers.given())
    for param, entry in state.parameters.pairs():
        if param.grad is not None and not entry.paid and id(param) not in owned:
            yield master_weights(entry.name, param, "none of those given as `optimizer`")


def master_weights(name: str, param: Tensor, optimizer: str, taken: bool = False) -> Problem:
    """The problem of a step beside a decayed parameter.

    Args:
        name: of the parameter.
        param: has a gradient, and is not stepped.
        optimizer: the class of the optimizer that steps.
        taken: the gradient was taken away in the backward pass.
    """
    advice = f"{COUPLED_TRAVELS}; or {OTHERWISE}"
    if taken:
        advice = (
            "Let the optimizer decay: give it wdhook.param_groups(model, λ), or groups of its "
            "copies"
        )
    return Problem(
        "A decayed parameter has a gradient, and the optimizer that steps does not own it. It may "
        "step master weights: copies of the parameters, which it writes back, so that decay of "
        "the parameter itself would be lost.",
        advice,
        {"parameter": f"{name} {tuple(param.shape)} {param.dtype}", "optimizer": optimizer},
        (name,),
    )


class StepsCopies:
    """Finds an optimizer of copies of decayed parameters: decay at the step would be lost.

    A given optimizer that owns nothing of the model needs no proof. Any other one is recognised by
    content: copies start with the values of the parameters.
    """

    def __init__(self) -> None:
        self._cleared: Any = WeakIdKeyDictionary()  # optimizers that were seen to step no copies

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Look at a foreign optimizer, while no optimizer of the model is known."""
        if not is_of_others(facts) or facts.state.optimizers.has_met():
            return
        given = facts.state.optimizers.was_given(facts.optimizer)
        if not given and (_travels(facts.state) or facts.optimizer in self._cleared):
            return
        if any(engine_of(param) is not None for _, param in decayed(facts)):
            return  # what an engine steps is followed, or refused by another rule
        yield from _given_beside(facts) if given else self._look_at_content(facts)

    def _look_at_content(self, facts: Facts) -> Iterator[Problem]:
        waiting = next(_waiting(facts), None)
        if waiting is None:
            return
        name, param = waiting
        if _copies(facts.optimizer, param) and not _is_owned_elsewhere(param):
            yield master_weights(name, param, facts.optimizer_name)
        else:
            self._cleared[facts.optimizer] = None


def _given_beside(facts: Facts) -> Iterator[Problem]:
    """The problem of a given optimizer without a parameter of the model."""
    taken = bool(facts.state.taken)
    first = next(_waiting(facts), None) or next(decayed(facts), None)
    if first is not None and (taken or not _travels(facts.state)):
        yield master_weights(*first, facts.optimizer_name, taken=taken)


def _travels(state: State) -> bool:
    """The decay travels in the gradients, to whatever is stepped."""
    return state.config.in_gradient and state.config.in_backward


def is_of_others(facts: Facts) -> bool:
    """No handle decays parameters of the optimizer, nor of an optimizer inside."""
    return not (facts.claimed or facts.owned.owns_any() or facts.owned.wraps)


def _waiting(facts: Facts) -> Iterator[tuple[str, Tensor]]:
    return ((name, param) for name, param in decayed(facts) if param.grad is not None)


def decayed(facts: Facts) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters that the handle decays."""
    governed = facts.state.parameters.governed()
    for found in facts.state.parameters.walk():
        if id(found.param) in governed:
            yield found.name, found.param


def _copies(optimizer: Any, param: Tensor) -> bool:
    """Tell an optimizer of a copy of a parameter, outside of any module."""
    for group in optimizer.param_groups:
        for stepped in group["params"]:
            if is_copy(stepped, param) and not _is_of_a_module(stepped):
                return True
    return False


def is_copy(stepped: Tensor, param: Tensor) -> bool:
    """Tell a copy of a parameter, or a flat buffer with a copy at its beginning. Synchronises."""
    flat = stepped.ndim == 1 and stepped.numel() >= param.numel()
    if not (flat or stepped.shape == param.shape) or stepped.numel() <= 1:
        return False
    if stepped is param or hasattr(param, "to_local") or hasattr(stepped, "to_local"):
        return False
    head, values = stepped.detach().flatten()[: param.numel()], param.detach().flatten()
    # Not to the last bit: decay in the backward has shrunk the parameter already, by much less
    # than a quarter.
    same = torch.isclose(head.to(values.device, values.dtype), values, rtol=0.25, atol=0.0).all()
    return bool(same & values.any())  # zeros are equal by chance


def _is_of_a_module(param: Tensor) -> bool:
    """Some module of the process owns the parameter: a twin of ours, and no master copy.

    Looks through all objects of the process; asked once for an optimizer of a likely copy.
    """
    for module in living(torch.nn.Module):
        params = module.__dict__.get("_parameters", {})
        if any(param is p for p in params.values()):
            return True
    return False


def _is_owned_elsewhere(param: Tensor) -> bool:
    """Some optimizer of the process owns the parameter (MAML): copies are no master weights."""
    return any(id(param) in owned_ids([optimizer]) for optimizer in living_optimizers())


def living_optimizers() -> Iterator[Any]:
    """Every complete optimizer of the process."""
    return (o for o in living(Optimizer) if hasattr(o, "param_groups"))


# Who steps -------------------------------------------------------------------------------------


class NeverSteps:
    """Finds a handle on an untrained model: a copy is trained, or another model."""

    def __init__(self) -> None:
        self._foreign = 0
        self._next = _PATIENCE

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Count the steps of foreign optimizers until the first step of the model."""
        if facts.state.steps or not is_of_others(facts):
            return
        self._foreign += 1
        if self._foreign < self._next:
            return
        self._next *= 50
        first = next(_waiting(facts), None) or next(decayed(facts), None)
        if first is None or _will_step(facts):
            return
        name, param = first
        yield Problem(
            f"{self._foreign} optimizer steps were taken, and none of the optimizers owns a "
            "decayed parameter of this handle: nothing of its model is decayed at a step. A copy "
            "of the model (deepcopy, pickle, another process) has no hooks.",
            "Attach to the model that is trained; remove() this handle if its model is not",
            {
                "parameter": facts.state.describe(name, param),
                "last optimizer": facts.optimizer_name,
            },
            (name,),
        )


_PATIENCE = 20  # steps; the critic of a GAN takes five or so before the generator's first


def _will_step(facts: Facts) -> bool:
    """Some optimizer of the process owns a decayed parameter, for a later step."""
    governed = facts.state.parameters.governed().keys()
    return any(not governed.isdisjoint(owned_ids([o])) for o in living_optimizers())


class TwoStep:
    """Finds parameters stepped in turn by a given optimizer and another. Each step decays."""

    def __init__(self) -> None:
        self._given_has_stepped = False
        self._last = ""  # class of the last optimizer that was not given
        self._last_owned: set[int] = set()  # ids of its entries

    def __call__(self, facts: Facts) -> Iterator[Problem]:
        """Remember each stepping optimizer, and compare a given one with the last foreign one."""
        optimizers = facts.state.optimizers
        if not optimizers.given():
            return
        if not optimizers.was_given(facts.optimizer):
            if self._given_has_stepped:
                self._last = facts.optimizer_name
                self._last_owned = {id(entry) for _, entry in facts.owned.pairs()}
            return
        self._given_has_stepped = True
        shared = next((e for _, e in facts.owned.pairs() if id(e) in self._last_owned), None)
        if shared is not None:
            yield Problem(
                "Two optimizers step a decayed parameter in turn, and `attach` was given one of "
                "them: the steps of the other decay too.",
                "Pause the decay while the other one steps: with decay.paused(): outer.step(); "
                "or give both",
                {
                    "parameter": shared.name,
                    "given": facts.optimizer_name,
                    "steps too": self._last,
                },
                (shared.name,),
            )
