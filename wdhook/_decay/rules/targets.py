"""Rules about the values to which decay draws parameters, and their rows of the table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..._base.errors import TargetError, WdhookWarning
from ..._base.problem import Problem
from ..._base.torch_private import is_part_of_flat_parameter, storage_of
from ..._base.validate import is_number
from ..._plan.anchor import Anchor
from ..formulas import shares_memory
from .base import Facts, Moment, Rule
from .conditions import aimed

_OF_ADAPTER = re.compile(r"(?:^|[._])lora_")


def target_is_missing(facts: Facts) -> Iterator[Problem]:
    """Find parameters for which the source of an anchor has no values."""
    names = [
        known.decision.name
        for _, known in facts.state.parameters.eligible()
        if isinstance(anchor := known.decision.toward, Anchor)
        and not anchor.is_init
        and known.decision.given is None
    ]
    if names:
        yield Problem(
            "The source of an anchor has no values of the same name and shape for decayed "
            "parameters: these are drawn to 0. (A new head has no values to go back to.)",
            'Say so: toward={"*": wdhook.Anchor(source), "head.*": 0.0}',
            {"parameters": _some(names)},
            tuple(names),
        )


def target_is_the_parameter(facts: Facts) -> Iterator[Problem]:
    """Find a target in the memory of its parameter."""
    for found, known in facts.state.parameters.eligible():
        target, memory = known.decision.given, storage_of(found.param)
        if target is not None and memory is not None and storage_of(target) == memory:
            yield shares_memory(found.name, (found.name,))
            return


def adapter_goes_back_to_noise(facts: Facts) -> Iterator[Problem]:
    """Find factors of an adapter that are drawn to their first values."""
    names = [
        found.name
        for found, known in facts.state.parameters.eligible()
        if isinstance(known.decision.toward, Anchor)
        and known.decision.toward.is_init
        and _OF_ADAPTER.search(found.name)
    ]
    if names:
        yield Problem(
            "The factors of an adapter (LoRA) are drawn to the values that they start with, noise "
            "and zeros. The model is not drawn to the pretrained one by that.",
            "Let them decay to 0, at which the model is the pretrained one: leave `toward` out, or "
            'toward={"*": "init", "*lora_*": 0.0}',
            {"parameters": _some(names)},
            tuple(names),
        )


def target_in_pieces(facts: Facts) -> Iterator[Problem]:
    """Find a parameter that is stepped in pieces, or as a copy, and is drawn to values."""
    for param, entry in facts.owned.pairs():
        if entry.memo is None or not isinstance(entry.memo.toward, Anchor):
            continue
        whole = facts.state.parameters.known(param) is not None
        if not whole or is_part_of_flat_parameter(param):
            yield Problem(
                "An engine steps a piece or a copy of the parameter, of which the target has no "
                "like: a checkpoint of one process would not hold the targets of the others.",
                "Use a number as `toward`; or DistributedDataParallel or fully_shard, whose "
                "parameters are whole or know their place in the whole",
                {"parameter": entry.name, "optimizer": facts.optimizer_name},
                (entry.name,),
            )
            return


def target_of_a_resumed_run(facts: Facts) -> Iterator[Problem]:
    """Find first values that are taken at a step of an optimizer that has stepped before."""
    if facts.owned.clock.steps:
        return
    for _, entry in facts.owned.pairs():
        memo, tally = entry.memo, entry.progress.tally
        if memo is None or not memo.is_of_init or memo.is_loaded:
            continue
        if (tally is None or tally.is_empty) and _has_stepped(facts.optimizer):
            yield Problem(
                'toward="init" takes the values of now as target, and the optimizer has stepped '
                "before: if this run goes on from a checkpoint, these are not the first values.",
                "Load the handle's state too: decay.load_state_dict(checkpoint[...]); or give the "
                "first values: toward=wdhook.Anchor(state_dict)",
                {"parameter": entry.name, "optimizer": facts.optimizer_name},
                (entry.name,),
            )
        return  # one speaks for all


def target_of_a_new_parameter(facts: Facts) -> Iterator[Problem]:
    """Find a parameter that has come into the model during training, and for which nothing says
    what it is drawn to."""
    for param, entry in facts.owned.pairs():
        known = facts.state.parameters.known(param)
        if known is None or not known.is_new or entry.memo is None:
            continue
        if entry.memo.waits or known.is_unaimed:
            to = "the values that it has now" if entry.memo.waits else "0"
            yield Problem(
                f"A new parameter has come into the model, and is drawn to {to}.",
                'Say what it is drawn to, for example toward={"*": "init", "head.*": 0.0}',
                {"parameter": entry.name},
                (entry.name,),
            )
            return


def _has_stepped(optimizer: Any) -> bool:
    """The optimizer has made a step, as far as its groups and its state tell."""
    groups = getattr(optimizer, "param_groups", ())
    if any(is_number(n) and n > 0 for g in groups for n in (g.get("step"), g.get("k"))):
        return True
    states = list(getattr(optimizer, "state", {}).values())[:_LOOKED_AT]
    return any(_is_of_a_step(state) for state in states if isinstance(state, Mapping))


def _is_of_a_step(state: Mapping[str, Any]) -> bool:
    """Tell a state from one of zeros, which some optimizers make when they are constructed."""
    if "step" in state:
        return bool(state["step"] > 0)
    values = [value for value in state.values() if isinstance(value, Tensor)]
    return bool(state.get("n_iter")) or any(bool(value.any()) for value in values)


_LOOKED_AT = 3  # states: they are alike


def _some(names: list[str]) -> str:
    return f"{len(names)}, first {', '.join(names[:3])}"


RULES = (
    Rule(
        "target-is-the-parameter",
        TargetError,
        Moment.PLAN,
        target_is_the_parameter,
        situation="`toward=Anchor(source)`, and the source shares memory with the model",
        answer='names `toward="init"` and `copy.deepcopy`',
        applies=aimed,
    ),
    Rule(
        "target-is-missing",
        WdhookWarning,
        Moment.PLAN,
        target_is_missing,
        situation=(
            "`toward=Anchor(source)`, and the source has no values for a decayed parameter (a new "
            "head)"
        ),
        answer="drawn to 0",
        applies=aimed,
    ),
    Rule(
        "adapter-goes-back-to-noise",
        WdhookWarning,
        Moment.PLAN,
        adapter_goes_back_to_noise,
        situation='`toward="init"`, and the factors of LoRA, which start at noise and zeros',
        answer="names a target of 0",
        applies=aimed,
    ),
    Rule(
        "target-in-pieces",
        TargetError,
        Moment.STEP,
        target_in_pieces,
        situation=(
            '`toward="init"` or an `Anchor`, and an engine that steps pieces or copies of the '
            "parameters (DeepSpeed, Megatron, FSDP1)"
        ),
        answer="names a number, DDP and `fully_shard`",
        applies=aimed,
        on_change=True,
    ),
    Rule(
        "target-of-a-resumed-run",
        WdhookWarning,
        Moment.STEP,
        target_of_a_resumed_run,
        situation=(
            '`toward="init"`, and an optimizer that has stepped before steps for the first time, '
            "without a state of the handle"
        ),
        answer="the values of now are the target",
        applies=aimed,
        first_steps=True,
    ),
    Rule(
        "target-of-a-new-parameter",
        WdhookWarning,
        Moment.STEP,
        target_of_a_new_parameter,
        situation=(
            '`toward="init"` or an `Anchor`, and a parameter that has come into the model since'
        ),
        answer="drawn to its first values, or to 0",
        applies=aimed,
        on_change=True,
    ),
)
