"""Rules about engines that take gradients away: DeepSpeed's ZeRO, Megatron-core, and others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from ..._base.problem import Problem
from ..optimizers import announces_steps, owned_ids
from ..stand_ins import engine_of, is_slice, stand_in_of
from .base import Facts
from .ownership import decayed, is_of_others, living_optimizers


def taken_by_engine(facts: Facts) -> Iterator[Problem]:
    """Find parameters of an engine that takes their gradients away, where decay would be lost."""
    for name, param in decayed(facts):
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
        names = state.taken | state.seen
        if not names or not is_of_others(facts):
            return
        held = [p for group in facts.optimizer.param_groups for p in group["params"]]
        gone = [f for f in state.parameters.walk() if f.name in names and f.param.grad is None]
        gone = [f for f in gone if not _is_stepped_elsewhere(f.param, held)]
        if not gone:
            return
        lost_in_pass = any(found.name in state.taken for found in gone)
        self._steps += 1
        if not lost_in_pass and self._steps < 2:
            return  # a trial pass, zeroed since
        announced_too = bool(state.steps) or not lost_in_pass
        if _will_step_it(facts, gone[0].param, announced_too):
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


def _is_stepped_elsewhere(param: Tensor, held: list[Tensor]) -> bool:
    """A known engine steps the parameter in another step or process: none of `held` is of it."""
    stand_in = stand_in_of(param)
    if stand_in is not None:
        return all(stand_in.stepped is not tensor for tensor in held)
    return engine_of(param) is not None and not any(is_slice(tensor, param) for tensor in held)


def _will_step_it(facts: Facts, param: Tensor, announced_too: bool) -> bool:
    """Some optimizer owns the parameter and may step it; one that torch announces, if asked."""
    known = facts.state.optimizers
    # Known ones first: the others are found by a walk through all objects of the process.
    for optimizer in chain(known.given(), known.met(), living_optimizers()):
        if id(param) in owned_ids([optimizer]) and (
            announced_too or not announces_steps(optimizer)
        ):
            return True
    return False
