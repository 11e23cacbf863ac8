"""Looks at optimizers and parameters, without a handle and without a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._base.problem import Problem
from .._decay.optimizers import decays_itself, inner_optimizers, innermost, owned_ids
from .._plan.plan import Plan
from .findings import Finding


class Names:
    """The names of a model's parameters, by id."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, param: Tensor) -> bool:
        return id(param) in self._names

    def ids(self, names: Iterable[str] | None = None) -> set[int]:
        """Ids of the parameters with these names, or of all."""
        if names is None:
            return set(self._names)
        wanted = set(names)
        return {key for key, name in self._names.items() if name in wanted}

    def of(self, keys: Iterable[int]) -> tuple[str, ...]:
        """Names of the parameters with these ids, in the order of the model."""
        wanted = set(keys)
        return tuple(name for key, name in self._names.items() if key in wanted)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]


def innermost_of(optimizers: Iterable[Any]) -> list[Any]:
    """The optimizers inside wrappers, and optimizers without a wrapper."""
    found: list[Any] = []
    for optimizer in optimizers:
        found.extend(innermost(optimizer))
    return found


def decaying_groups(optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """The param groups that the optimizers decay."""
    groups: list[dict[str, Any]] = []
    for optimizer in optimizers:
        groups.extend(group for group in optimizer.param_groups if decays_itself(group))
    return groups


def ids_in(groups: Iterable[Mapping[str, Any]]) -> set[int]:
    """Ids of the parameters in some param groups."""
    found: set[int] = set()
    for group in groups:
        found.update(map(id, group["params"]))
    return found


def lambdas_of(groups: Iterable[Mapping[str, Any]]) -> str:
    """Every λ of some param groups."""
    λs = sorted({float(group["weight_decay"]) for group in groups})
    return ", ".join(f"{λ:g}" for λ in λs)


# Who decays ------------------------------------------------------------------------------------


def decays_by_groups(optimizers: Sequence[Any], plan: Plan, names: Names) -> bool:
    """Tell optimizers with a decay of weights, and of nothing exempt by the plan."""
    decaying = ids_in(decaying_groups(innermost_of(optimizers)))
    if decaying.isdisjoint(names.ids(plan.decayed)):
        return False
    return decaying.isdisjoint(names.ids(plan.exempt))


def group_decay(optimizers: Sequence[Any], plan: Plan, names: Names) -> Finding:
    """The note about decay by param groups, beside which no handle is attached."""
    groups = decaying_groups(innermost_of(optimizers))
    missing = names.of(names.ids(plan.decayed) - ids_in(groups))
    facts: dict[str, object] = {"the optimizer's weight_decay": lambdas_of(groups)}
    what = "The optimizer decays by its param groups, and exempts what the plan exempts."
    if missing:
        what += " It does not decay some parameters that the plan decays."
    fix = "Nothing to mend, and no handle was attached. To let wdhook decay: "
    fix += "wdhook.adopt(model, optimizer)"
    return Finding("note", "group-decay", Problem(what, fix, facts, missing))


def exempt_decayed(
    optimizers: Sequence[Any], plans: Sequence[Plan], governed: set[int], names: Names
) -> Iterator[Finding]:
    """Find parameters decayed by an optimizer and exempt by every plan."""
    groups = decaying_groups(optimizers)
    exempt = names.of(ids_in(groups) - governed)
    if not exempt or not plans:
        return
    roles: set[str] = set()
    for plan in plans:
        roles.update(str(plan[name].role) for name in exempt if name in plan)
    yield warning(
        "exempt-decayed",
        "The optimizer decays parameters that the plan exempts.",
        "Construct the optimizer with weight_decay=0: wdhook decays the weights",
        exempt,
        {"roles": ", ".join(sorted(roles)), "the optimizer's weight_decay": lambdas_of(groups)},
    )


# Who owns --------------------------------------------------------------------------------------


def two_owners(optimizers: Sequence[Any], names: Names) -> Iterator[Finding]:
    """Find parameters of two optimizers, wrappers aside."""
    inside: set[int] = set()
    for optimizer in optimizers:
        inside.update(map(id, inner_optimizers(optimizer)))
    once: set[int] = set()
    twice: set[int] = set()
    for optimizer in optimizers:
        if id(optimizer) in inside:
            continue
        owned = owned_ids([optimizer])
        twice |= once & owned
        once |= owned
    shared = names.of(twice)
    if shared:
        yield warning(
            "two-optimizers",
            "More than one optimizer owns a parameter: each step of each of them moves it.",
            "Give each parameter to one optimizer",
            shared,
        )


def unowned(keys: Iterable[int], names: Names) -> Iterator[Finding]:
    """Report parameters without an optimizer and without a change in the step."""
    found = names.of(keys)
    if found:
        yield warning(
            "no-optimizer",
            "Parameters that require a gradient are in no optimizer: they are not trained, and not "
            "decayed.",
            "Give them to the optimizer, or freeze them: parameter.requires_grad_(False)",
            found,
        )


def without_gradient(keys: Iterable[int], names: Names) -> Iterator[Finding]:
    """Report parameters without a gradient."""
    found = names.of(keys)
    if found:
        yield warning(
            "no-gradient",
            "Parameters that require a gradient never got one: they are not trained, and not "
            "decayed.",
            "Use them in the forward pass, or freeze them: parameter.requires_grad_(False)",
            found,
        )


def strangers(optimizers: Sequence[Any], names: Names) -> Iterator[Finding]:
    """Find foreign tensors in param groups."""
    found = []
    for optimizer in innermost_of(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                if param not in names:
                    where = f"{type(optimizer).__name__}.param_groups[{index}]['params'][{place}]"
                    found.append(f"{where} {tuple(param.shape)}")
    if found:
        yield warning(
            "not-of-the-model",
            "The optimizer owns tensors that are no parameters of the model.",
            "Build the optimizer after the last change to the model; return what holds the others "
            "as one module",
            (),
            {"tensors": f"{len(found)}, first {found[0]}"},
        )


# Master weights --------------------------------------------------------------------------------


def master_weights(severity: str) -> Finding:
    """The finding of an optimizer of copies of the parameters."""
    return Finding(
        severity,
        "master-weights",
        Problem(
            "The optimizer keeps master weights: copies that it steps, and writes back over the "
            "parameters.",
            'Use mode="coupled" with at="backward", whose decay travels in the gradient',
        ),
        "master-weights",
    )


def keeps_masters(optimizer: Any, params: Iterable[Tensor]) -> bool:
    """Tell an optimizer with float32 copies of low-precision parameters in the state."""
    state: Mapping[Any, Any] = getattr(optimizer, "state", {})
    for param in params:
        if param.dtype not in (torch.float16, torch.bfloat16) or param not in state:
            continue
        for value in state[param].values():
            if isinstance(value, Tensor) and _is_master(value, param):
                return True
    return False


def _is_master(value: Tensor, param: Tensor) -> bool:
    """Tell a wide copy of a parameter: after a step, the parameter is the rounded copy.

    One number, such as a count of steps, proves nothing. Rounding, also a stochastic one, errs by
    less than one unit in the last place.
    """
    if value.dtype != torch.float32 or value.numel() != param.numel() or param.numel() == 1:
        return False
    wide = param.detach().float().flatten()
    unit = torch.finfo(param.dtype).eps
    near = torch.isclose(value.detach().flatten(), wide, rtol=unit, atol=0.0).all()
    return bool(near & wide.any())


def warning(
    kind: str,
    what: str,
    fix: str,
    parameters: tuple[str, ...],
    facts: Mapping[str, object] | None = None,
) -> Finding:
    """A finding of the doctor's own with the severity of a warning."""
    return Finding("warning", kind, Problem(what, fix, facts or {}, parameters))
