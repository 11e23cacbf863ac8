"""Decides: roles or a recipe, then overrides, make a `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .._base.errors import ArgumentError, NothingToDecayError
from .._roles.classifier import classify_model
from .._roles.evidence import has_shape
from .._roles.marks import bare_name, is_flattened
from .._roles.places import named_parameters, places, walk
from .._roles.verdict import DECAYED_ROLES, Verdict
from .._roles.vocabulary import Role
from .arguments import audit_with, check_audit, check_sources, check_weight_decay
from .decision import Decision
from .overrides import Candidate, Overrides, apply_overrides, weakly
from .plan import Plan
from .recipes import Recipe, follow
from .targets import Toward, aim

if TYPE_CHECKING:
    from .._audit.report import Audit


def plan(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: Recipe | None = None,
    audit: Audit | None = None,
    inputs: Any | None = None,
    toward: Toward | None = None,
) -> Plan:
    """Decide which parameters of `model` are decayed. Pure: nothing is registered or changed.

    Args:
        model: any module; frozen, tied and lazy parameters are welcome.
        weight_decay: λ per optimizer step, finite and ≥ 0.
        overrides: ordered mapping from a selector to a λ. A selector is a `Role` or its string, a
            parameter name or a glob on it, a module class that owns the parameter, a module of the
            model (all that lies in it), or a predicate ``f(name, module, parameter) -> bool``. A λ
            is absolute; 0.0 exempts, True means `weight_decay`. The last match wins.
        recipe: name of a known project's rule, used in place of wdhook's own.
        audit: of this model, see `audit`. Roles are those that the audit has seen. Marks and
            overrides still win, and where the audit saw nothing, types and names decide.
        inputs: example inputs, in place of `audit`: the model is audited on them. A tensor, a
            tuple of arguments, or a mapping of arguments by name. The pass runs on copies.
        toward: the values to which decay draws parameters, in place of 0: a number; ``"init"``,
            the values before the first update (L2-SP; Li et al. 2018, arXiv:1802.01483); an
            `Anchor`; or an ordered mapping from a selector to one of these. The last match wins.

    Returns:
        One `Decision` for each name that ``model.named_parameters()`` gives, in its order.

    Raises:
        ArgumentError: an argument has no meaning.
        SelectorError: a selector matches nothing.
        NothingToDecayError: FSDP has flattened parameters into one, which cannot be decayed in
            part.

    >>> import torch, wdhook
    >>> plan = wdhook.plan(torch.nn.Linear(3, 2), 1e-4)
    >>> {name: decision.weight_decay for name, decision in plan.items()}
    {'weight': 0.0001, 'bias': 0.0}
    """
    check_weight_decay(model, weight_decay)
    check_sources(audit, inputs, recipe)
    if inputs is not None:
        audit = audit_with(model, inputs)
    return decide(model, weight_decay, overrides, recipe, strict=True, audit=audit, toward=toward)


def decide(
    model: nn.Module,
    weight_decay: float,
    overrides: Overrides | None,
    recipe: Recipe | None,
    strict: bool,
    audit: Audit | None = None,
    toward: Toward | None = None,
) -> Plan:
    """Make a plan; with `strict` False for a model that has changed since it was first planned.

    A selector may then match nothing.
    """
    value = check_weight_decay(model, weight_decay)
    if audit is not None:
        check_audit(audit, model)
    if recipe is None:
        decisions = _follow_roles(model, value, audit)
    else:
        decisions = _follow_recipe(model, recipe, value)
    if overrides is not None:
        _override(model, decisions, overrides, value, strict)
    if toward is not None:
        _aim(model, decisions, toward, strict)
    _refuse_flattened(model, decisions)
    _refuse_overflow(model, decisions)
    again = partial(
        _decide_again, overrides=weakly(overrides), recipe=recipe, toward=weakly(toward)
    )
    return Plan(value, decisions, model, again)


def _decide_again(
    model: nn.Module,
    weight_decay: float,
    overrides: Callable[[], Any],
    recipe: Recipe | None,
    toward: Callable[[], Any],
) -> Plan:
    """A plan of a model that has changed, by the rules of the first one."""
    return decide(model, weight_decay, overrides(), recipe, strict=False, toward=toward())


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: Recipe | None = None,
    audit: Audit | None = None,
    inputs: Any | None = None,
) -> list[dict[str, Any]]:
    """The same decision as optimizer groups, where the optimizer's own decay is the right one.

    Arguments and errors are those of `plan`, the result that of `Plan.param_groups`.

    >>> import torch, wdhook
    >>> groups = wdhook.param_groups(torch.nn.Linear(3, 2), 0.01)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.01, 1), (0.0, 1)]
    """
    made = plan(model, weight_decay, overrides=overrides, recipe=recipe, audit=audit, inputs=inputs)
    return made.param_groups()


def require_eligible(plan: Plan) -> None:
    """Raise unless something in `plan` would ever be decayed."""
    if any(decision.eligible for decision in plan.values()):
        return
    roles = ", ".join(sorted({str(d.role) for d in plan.values()}))
    raise NothingToDecayError(
        "The model has no eligible parameter, so there would be nothing to decay.\n"
        f"  parameters: {len(plan)}\n  roles: {roles or 'none: the model has no parameters'}\n"
        "  Print wdhook.plan(model, λ) for the reasons; include more with "
        'overrides={"<glob>": True}'
    )


# ------------------------------------------------------------------------------------- the sources


def _follow_roles(
    model: nn.Module, weight_decay: float, audit: Audit | None = None
) -> dict[str, Decision]:
    decisions = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most repeat, and a plan lives long
    for found in classify_model(model):
        name, parameter = found.name, found.parameter
        verdict = found.verdict if audit is None else _traced(found.verdict, name, audit)
        follows = verdict.weight_decay is None and verdict.role in DECAYED_ROLES
        shape, numel = _size(parameter)
        shape = shapes.setdefault(shape, shape)
        decisions[name] = Decision(
            name,
            verdict.role,
            weight_decay if follows else verdict.weight_decay or 0.0,
            verdict.reason,
            shape,
            numel,
            verdict.guess,
            follows,
            parameter.requires_grad,
            found.aliases,
        )
    return decisions


def _size(parameter: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """Shape and number of elements; () and 0 for a lazy parameter."""
    if not has_shape(parameter):
        return (), 0
    return tuple(parameter.shape), parameter.numel()


def _traced(verdict: Verdict, name: str, audit: Audit) -> Verdict:
    """The verdict of the audit, unless a mark outranks it or the audit saw nothing."""
    seen = None if verdict.marked else audit.traced_role(name)
    if seen is None:
        return verdict
    role, operation = seen
    return Verdict(role, f"traced: {operation}")


def _follow_recipe(model: nn.Module, recipe: Recipe, weight_decay: float) -> dict[str, Decision]:
    decisions = {}
    decided = follow(model, recipe)
    for name, decision in _follow_roles(model, weight_decay).items():
        decayed, reason = decided[name]
        decisions[name] = replace(
            decision,
            weight_decay=weight_decay if decayed else 0.0,
            reason=reason,
            guess=False,
            follows=decayed,
        )
    return decisions


def _override(
    model: nn.Module,
    decisions: dict[str, Decision],
    overrides: Overrides,
    weight_decay: float,
    strict: bool,
) -> None:
    """Apply the user's rules to `decisions`, in place."""
    candidates = list(_candidates(model, decisions))
    for name, given, reason in apply_overrides(candidates, overrides, weight_decay, strict):
        decisions[name] = replace(
            decisions[name],
            weight_decay=weight_decay if given is None else given,
            reason=reason,
            guess=False,
            follows=given is None,
        )


def _aim(model: nn.Module, decisions: dict[str, Decision], toward: Toward, strict: bool) -> None:
    """Give the decayed parameters their targets, in place."""
    candidates = list(_candidates(model, decisions))
    for name, target in aim(candidates, decisions, toward, strict):
        decisions[name] = replace(decisions[name], toward=target)


def _candidates(model: nn.Module, decisions: Mapping[str, Decision]) -> Iterator[Candidate]:
    """Every name of every parameter: a tied parameter can be selected by each of its names."""
    visits = walk(model)
    modules = {path: module for path, module, _ in visits}
    first: dict[int, str] = {}
    for place in places(visits):
        name = first.setdefault(id(place.parameter), place.name)
        yield Candidate(
            name,
            place.name,
            bare_name(place.name),
            decisions[name].role,
            modules[place.path],
            cast("nn.Parameter", place.parameter),
        )


# -------------------------------------------------------------------------------------- the checks


def _refuse_flattened(model: nn.Module, decisions: Mapping[str, Decision]) -> None:
    """Raise for a parameter that FSDP made of weights, biases and scales: it would not decay."""
    suspects = {d.name for d in decisions.values() if d.role is Role.OTHER and not d.eligible}
    if not suspects:
        return
    for name, parameter in named_parameters(model):
        if name not in suspects or not parameter.requires_grad or not is_flattened(parameter):
            continue
        raise NothingToDecayError(
            "FSDP has flattened the parameters of a module into one: its weights cannot be told "
            "from its biases.\n"
            f"  parameter: {name} {tuple(parameter.shape)}\n"
            "  Use FullyShardedDataParallel(..., use_orig_params=True), or fully_shard(...). To "
            'decay the whole, biases too: overrides={"*_flat_param": True} with at="step"'
        )


_LARGEST_OF_ALL_TYPES = torch.finfo(torch.float16).max


def _refuse_overflow(model: nn.Module, decisions: Mapping[str, Decision]) -> None:
    """Raise for a λ or a target that is infinite in the type of its parameter."""
    large = {name: d for name, d in decisions.items() if _largest(d) > _LARGEST_OF_ALL_TYPES}
    for name, parameter in named_parameters(model) if large else ():
        is_number = parameter.is_floating_point() or parameter.is_complex()
        if name not in large or not is_number:
            continue
        decision = large[name]
        for argument in ("weight_decay", "toward"):
            value = getattr(decision, argument)
            if isinstance(value, float) and abs(value) > torch.finfo(parameter.dtype).max:
                raise ArgumentError(
                    f"`{argument}` must be finite in the type of the parameter.\n"
                    f"  parameter: {name}\n  dtype: {parameter.dtype}\n  {argument}: {value:g}\n"
                    "  Give a smaller one: usual λ are between 1e-6 and 1, targets 0 or 1"
                )


def _largest(decision: Decision) -> float:
    toward = decision.toward
    target = abs(toward) if isinstance(toward, float) else 0.0
    return max(decision.weight_decay, target)
