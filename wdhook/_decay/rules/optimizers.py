"""Rules about the optimizer of the step: its own decay, its learning rate, its kind of update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..._base.errors import LearningRateError
from ..._base.problem import Problem
from ..._base.torch_private import micro_batches, pipeline_schedules, stages
from ..._base.validate import is_number
from ..entry import Entry, Terms
from ..living import living
from ..optimizers import (
    decays_itself,
    innermost,
    keeps_two_sequences,
    learning_rate,
    maximizes,
    only_accumulates,
    two_sequences,
    would_decouple,
)
from ..ownership import Bucket, View
from ..rate import check_lr
from ..tensors import is_not_zero
from .base import Facts

# Own decay -------------------------------------------------------------------------------------


def own_decay(facts: Facts) -> Iterator[Problem]:
    """Find param groups with decayed parameters and a decay of the optimizer's own."""
    for index, buckets in enumerate(facts.owned.buckets):
        active = first_active(buckets)
        if active is None:
            continue
        group = facts.optimizer.param_groups[index]
        for where, own in _own_decays(facts.optimizer, facts.owned, index, group):
            yield _double(facts, f"{where} = {own}", active, _names(buckets))


def _names(buckets: list[Bucket]) -> tuple[str, ...]:
    """Names of the decayed parameters, without those of λ = 0."""
    names: list[str] = []
    for terms, pairs in buckets:
        if terms.weight_decay:
            names.extend(entry.name for _, entry in pairs)
    return tuple(names)


def _own_decays(
    optimizer: Any, view: View, index: int, group: dict[str, Any]
) -> Iterator[tuple[str, object]]:
    if decays_itself(group):
        yield f"param_groups[{index}]['weight_decay']", group["weight_decay"]
        return
    if view.clock.announced:
        return
    # No announced step will show it, so other names count too: fastai's, and LOMO's attribute.
    places = (f"param_groups[{index}]['wd']", "optimizer.weight_decay")
    values = (group.get("wd"), getattr(optimizer, "weight_decay", None))
    for place, value in zip(places, values, strict=True):
        if is_number(value) and value:
            yield place, value


_ONE_DECAYS = """\
Construct the optimizer with weight_decay=0.
Or let wdhook take over the optimizer's decay, in place of attach:
    wdhook.adopt(model, optimizer)
Or switch the optimizer's decay off, again after loading a checkpoint of it:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0"""


def _double(
    facts: Facts, where: str, active: tuple[Terms, Any, Entry], names: tuple[str, ...]
) -> Problem:
    terms, param, entry = active
    return Problem(
        "The optimizer decays a parameter that wdhook decays too.",
        _ONE_DECAYS,
        {
            "parameter": facts.state.describe(entry.name, param),
            "optimizer": f"{facts.optimizer_name}, {where}",
            "wdhook": f"weight_decay = {terms.weight_decay:g}",
        },
        names,
    )


def first_active(buckets: list[Bucket]) -> tuple[Terms, Any, Entry] | None:
    """The first decayed parameter of a param group with λ > 0."""
    for terms, pairs in buckets:
        if terms.weight_decay:
            return terms, *pairs[0]
    return None


def decay_would_be_decoupled(facts: Facts) -> Iterator[Problem]:
    """Find an optimizer with decoupled decay of its own, under a handle without a named mode."""
    if would_decouple(facts.optimizer):
        yield Problem(
            "The optimizer's own weight decay would be decoupled, and wdhook's default is coupled "
            "(L2): the same λ means something else.",
            'Say which is meant: attach(..., mode="decoupled", at="step") for the decay of AdamW, '
            'or attach(..., mode="coupled") for L2',
            {"optimizer": facts.optimizer_name, "mode": "not given, so coupled"},
        )


# Learning rates --------------------------------------------------------------------------------


def lr_is_known(facts: Facts) -> Iterator[Problem]:
    """Find param groups with decayed parameters, and without a learning rate to decay by."""
    lr = facts.state.config.lr
    for index, buckets in enumerate(facts.owned.buckets):
        if first_active(buckets) is None:
            continue
        group = facts.optimizer.param_groups[index]
        try:
            check_lr(learning_rate(group, lr), group)
        except LearningRateError as error:
            if error.problem is None:
                raise
            yield error.problem


def lr_is_of_another(facts: Facts) -> Iterator[Problem]:
    """Find decay in the backward by the learning rate of another optimizer than steps now."""
    if is_number(facts.state.config.lr) or len(facts.state.optimizers.met()) < 2:
        return
    for index, buckets in enumerate(facts.owned.buckets):
        group = facts.optimizer.param_groups[index]
        for _, pairs in buckets:
            for param, entry in pairs:
                yield from _other_rate(facts, group, param, entry)


def _other_rate(
    facts: Facts, group: dict[str, Any], param: Tensor, entry: Entry
) -> Iterator[Problem]:
    known = entry.terms.group()
    if not entry.paid or known is None or known[0] is facts.optimizer:
        return
    given = facts.state.config.lr
    read, own = learning_rate(known[1], given), learning_rate(group, given)
    if read == own:
        return
    yield Problem(
        "Decay in the backward has read the learning rate of another optimizer than the one that "
        "steps.",
        'Use attach(..., at="step"), or attach again with optimizer= the one that steps',
        {
            "parameter": facts.state.describe(entry.name, param),
            "read from": f"{type(known[0]).__name__}, lr {float(read):g}",
            "steps": f"{facts.optimizer_name}, lr {float(own):g}",
        },
        (entry.name,),
    )


# Kinds of update -------------------------------------------------------------------------------


def takes_micro_batches(facts: Facts) -> Iterator[Problem]:
    """Find an optimizer with gradient accumulation in its state."""
    if only_accumulates(facts.optimizer):
        yield Problem(
            "The optimizer takes the gradients of several backward passes into its state before "
            "it steps (`optimizer_accumulation`): a decay in each of them is several decays.",
            'Use attach(..., at="step")',
            {"optimizer": facts.optimizer_name},
        )


def has_two_sequences(facts: Facts) -> Iterator[Problem]:
    """Find an optimizer with two sequences of weights."""
    for inner in innermost(facts.optimizer):
        if keeps_two_sequences(inner):
            yield two_sequences(inner)


def differentiates_gradients(facts: Facts) -> Iterator[Problem]:
    """Find gradients with a graph, through which the optimizer may differentiate."""
    for _, pairs in facts.owned.all_buckets():
        param, entry = pairs[0]
        if param.grad is None or not param.grad.requires_grad:
            continue
        yield Problem(
            "The gradients hold their graph (backward(create_graph=True)), and the optimizer may "
            "differentiate them in its step (AdaHessian, SophiaH): decay before that changes what "
            "they depend on.",
            'Use mode="coupled"',
            {"parameter": entry.name, "optimizer": facts.optimizer_name},
            (entry.name,),
        )


def sign_has_turned(facts: Facts) -> Iterator[Problem]:
    """Find gradients decayed for the opposite value of `maximize`."""
    for index, buckets in enumerate(facts.owned.buckets):
        group = facts.optimizer.param_groups[index]
        sign = -1.0 if maximizes(facts.optimizer, group) else 1.0
        for _, pairs in buckets:
            suspects = [(p, e) for p, e in pairs if e.receipt.sign != sign]
            turned = next((e for p, e in suspects if _holds_decay(p, e)), None)
            if turned is not None:
                yield _turned(facts, turned, sign)


def _holds_decay(param: Tensor, entry: Entry) -> bool:
    """Tell a gradient that holds the decay of its window. Reads the gradient."""
    if not entry.paid or param.grad is None:
        return False
    return is_not_zero(param.grad)  # a zeroed gradient holds none


def _turned(facts: Facts, entry: Entry, sign: float) -> Problem:
    return Problem(
        "`maximize` of the optimizer is not what it was, or was not known, in the backward pass: "
        "the decay in the gradient has the wrong sign.",
        "Zero the gradients (zero_grad()) and compute them again. So that the sign is known: "
        'attach(..., optimizer=optimizer); or use attach(..., at="step")',
        {
            "parameter": entry.name,
            "optimizer": f"{facts.optimizer_name}(maximize={sign < 0})",
        },
        (entry.name,),
    )


def pipeline_divides(facts: Facts) -> Iterator[Problem]:
    """Find a pipeline schedule with a division of gradients, decay included, by micro-batches."""
    kind = pipeline_schedules()
    if kind is None:
        return
    owned = {id(param): entry.name for param, entry in facts.owned.pairs()}
    for schedule in living(kind):
        if not getattr(schedule, "scale_grads", False) or micro_batches(schedule) < 2:
            continue
        for stage in stages(schedule):
            params = stage.submod.parameters()
            name = next((owned[id(p)] for p in params if id(p) in owned), None)
            if name is not None:
                yield _divided(schedule, name)


def _divided(schedule: Any, name: str) -> Problem:
    count = micro_batches(schedule)
    return Problem(
        "A pipeline schedule divides the gradients by the number of micro-batches, and with them "
        "the decay that was added in the backward.",
        'Use attach(..., at="step"), or scale_grads=False with a loss_fn that divides by their '
        "number",
        {
            "parameter": name,
            "schedule": f"{type(schedule).__name__}(scale_grads=True), {count} micro-batches",
        },
        (name,),
    )
