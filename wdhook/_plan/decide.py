"""Deciding: roles or a recipe, then overrides, make a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from .._base.errors import ArgumentError, NothingToDecayError
from .._base.validate import check_factor
from .._roles.classifier import DECAYED_ROLES, Verdict, classified
from .._roles.marks import bare_name, is_flattened
from .._roles.vocabulary import Role
from .decision import Decision
from .overrides import Candidate, Overrides, apply_overrides
from .plan import Plan

if TYPE_CHECKING:
    from .._audit.report import Audit


def plan(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    audit: Audit | None = None,
) -> Plan:
    """Decide which parameters of `model` are decayed. Pure: nothing is registered or changed.

    Args:
        model: any module; frozen, tied and lazy parameters are welcome.
        weight_decay: λ per optimizer step, finite and ≥ 0.
        overrides: ordered mapping from a selector to a λ. A selector is a `Role` or its string, a
            glob on the full parameter name, a module class that owns the parameter, or a predicate
            ``f(name, module, parameter) -> bool``. A λ is absolute; 0.0 exempts, True means
            `weight_decay`. The last match wins.
        recipe: name of a known project's rule, used in place of wdhook's own.
        audit: of this model, see `audit`. Roles are those that it has seen; marks and overrides still win, and so
            does what types and names say where the audit saw nothing.

    Returns:
        One `Decision` for each name that ``model.named_parameters()`` gives, in its order.

    Raises:
        ArgumentError: an argument has no meaning.
        SelectorError: a selector matches nothing.
        NothingToDecayError: FSDP has flattened parameters into one, of which no part can be decayed.

    >>> import torch, wdhook
    >>> plan = wdhook.plan(torch.nn.Linear(3, 2), 1e-4)
    >>> {name: decision.weight_decay for name, decision in plan.items()}
    {'weight': 0.0001, 'bias': 0.0}
    """
    return decide(model, weight_decay, overrides, recipe, strict=True, audit=audit)


def decide(
    model: nn.Module,
    weight_decay: float,
    overrides: Overrides | None,
    recipe: str | None,
    strict: bool,
    audit: Audit | None = None,
) -> Plan:
    """`plan`, where with `strict` False a selector may match nothing: the model was planned before, and changed."""
    value = check_factor(weight_decay)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` must be a torch.nn.Module.\n  got: {type(model).__name__}")
    if audit is not None:
        _check_audit(audit, model, recipe)
    decisions = (
        _follow_recipe(model, recipe, value)
        if recipe is not None
        else _follow_roles(model, value, audit)
    )
    if overrides is not None:
        candidates = list(_candidates(model, decisions))
        for name, given, reason in apply_overrides(candidates, overrides, value, strict):
            decisions[name] = replace(
                decisions[name],
                weight_decay=value if given is None else given,
                reason=reason,
                guess=False,
                follows=given is None,
            )
    _refuse_flattened(model, decisions)
    return Plan(value, decisions, model)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    audit: Audit | None = None,
) -> list[dict[str, Any]]:
    """The same decision as optimizer groups, where the optimizer's own decay is the right one.

    Arguments and errors are those of `plan`, the result that of `Plan.param_groups`.

    >>> import torch, wdhook
    >>> groups = wdhook.param_groups(torch.nn.Linear(3, 2), 0.01)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.01, 1), (0.0, 1)]
    """
    return plan(model, weight_decay, overrides=overrides, recipe=recipe, audit=audit).param_groups()


def require_eligible(plan: Plan) -> None:
    """Raise unless something in `plan` would ever be decayed."""
    if not any(decision.eligible for decision in plan.values()):
        roles = (
            ", ".join(sorted({str(d.role) for d in plan.values()}))
            or "none: the model has no parameters"
        )
        raise NothingToDecayError(
            "The model has no eligible parameter, so there would be nothing to decay.\n"
            f"  parameters: {len(plan)}\n  roles: {roles}\n"
            '  Print wdhook.plan(model, λ) for the reasons; include more with overrides={"<glob>": True}'
        )


def _refuse_flattened(model: nn.Module, decisions: Mapping[str, Decision]) -> None:
    """Raise for a parameter that FSDP made of weights, biases and scales: it would not be decayed."""
    suspects = {d.name for d in decisions.values() if d.role is Role.OTHER and not d.eligible}
    for name, parameter in model.named_parameters() if suspects else ():
        if name in suspects and is_flattened(parameter) and parameter.requires_grad:
            raise NothingToDecayError(
                "FSDP has flattened the parameters of a module into one: its weights cannot be told from its biases.\n"
                f"  parameter: {name} {tuple(parameter.shape)}\n"
                "  Use FullyShardedDataParallel(..., use_orig_params=True), or fully_shard(...). To decay the whole, "
                'biases too: overrides={"*_flat_param": True} with at="step"'
            )


def _check_audit(audit: Audit, model: nn.Module, recipe: str | None) -> None:
    from .._audit.report import Audit  # needed by few

    if not isinstance(audit, Audit):
        raise ArgumentError(
            f"`audit` must be an Audit.\n  got: {type(audit).__name__}\n"
            "  Make one: wdhook.audit(model, *inputs)"
        )
    if recipe is not None:
        raise ArgumentError(
            "`audit` and `recipe` both say which parameters are decayed.\n"
            f"  recipe: {recipe}\n  Give one of them; Plan.diff shows what they decide differently"
        )
    # A shard or an uninitialized parameter does not have the shape of the whole.
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if _is_whole(parameter)
    }
    differences = audit.differences(shapes) if shapes else []
    if differences:
        raise ArgumentError(
            "`audit` is of another model: names or shapes of parameters differ.\n"
            f"  of the audit: {', '.join(list(audit)[:3])}, ...\n"
            f"  of the model: {', '.join(list(shapes)[:3])}, ...\n"
            f"  first difference: {differences[0]}\n"
            "  Make one of this model: wdhook.audit(model, *inputs)"
        )


def _is_whole(parameter: Any) -> bool:
    """Tell a whole parameter from lazy ones and from the shards of FSDP and DeepSpeed."""
    if is_lazy(parameter) or hasattr(parameter, "ds_shape"):
        return False
    return not (hasattr(parameter, "_fsdp_flattened") or is_flattened(parameter))


def _follow_roles(
    model: nn.Module, weight_decay: float, audit: Audit | None = None
) -> dict[str, Decision]:
    decisions = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most repeat, and a plan lives long
    for name, parameter, verdict in classified(model):
        if (
            audit is not None
            and not verdict.marked
            and (seen := audit.traced_role(name)) is not None
        ):
            verdict = Verdict(seen[0], f"traced: {seen[1]}")
        follows = verdict.weight_decay is None and verdict.role in DECAYED_ROLES
        λ = weight_decay if follows else verdict.weight_decay or 0.0
        numel = 0 if is_lazy(parameter) else parameter.numel()
        shape = () if is_lazy(parameter) else tuple(parameter.shape)
        shape = shapes.setdefault(shape, shape)
        decisions[name] = Decision(
            name, verdict.role, λ, verdict.reason, shape, numel, verdict.guess, follows
        )
    return decisions


def _follow_recipe(model: nn.Module, recipe: str, weight_decay: float) -> dict[str, Decision]:
    from .recipes import follow  # a layer of its own, needed by few

    decided = follow(model, recipe)
    return {
        name: replace(
            decision,
            weight_decay=weight_decay if decided[name][0] else 0.0,
            reason=decided[name][1],
            guess=False,
            follows=decided[name][0],
        )
        for name, decision in _follow_roles(model, weight_decay).items()
    }


def _candidates(model: nn.Module, decisions: Mapping[str, Decision]) -> Iterator[Candidate]:
    """Every (parameter, alias): a tied parameter can be selected by each of its names."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            alias = f"{path}.{local}" if path else local
            name = first.setdefault(id(parameter), alias)
            yield Candidate(name, alias, bare_name(alias), decisions[name].role, module, parameter)
