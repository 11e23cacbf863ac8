"""The decision: which parameters are decayed, by how much, and why."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ._conventions import bare_name
from ._errors import ArgumentError, NothingToDecayError, WdhookError
from ._numbers import check_factor
from ._overrides import Candidate, Overrides, apply_overrides
from ._roles import DECAYED_ROLES, Role, classify
from ._table import diff_table, plan_table

_RENAMED = re.compile(r"(?<![^.])(?:base_layer\.|parametrizations\.(?P<local>\w+)\.original\d*$)")


@dataclass(frozen=True)
class Decision:
    """What happens to one parameter.

    Attributes:
        name: full name in the model, as `named_parameters` gives it.
        role: what the parameter is for.
        weight_decay: λ per optimizer step; 0.0 exempts.
        reason: why, in a few words.
        shape: of the parameter; empty while a lazy parameter is uninitialized.
        numel: number of elements, 0 while uninitialized.
        guess: True where only the shape or a weak name spoke for the role.
        follows: True where λ is the one given to `plan`, so that a schedule of λ moves it too; False
            for exempt parameters and where an override or a mark gave an absolute λ.
    """

    name: str
    role: Role
    weight_decay: float
    reason: str
    shape: tuple[int, ...]
    numel: int
    guess: bool = False
    follows: bool = False

    @property
    def eligible(self) -> bool:
        """Whether the parameter is decayed (for some λ: a schedule may start at zero)."""
        return self.follows or self.weight_decay > 0


class Plan(Mapping[str, Decision]):
    """An ordered, immutable mapping from parameter name to `Decision`.

    ``print(plan)`` shows it as a table with totals. A plan does not keep its model alive.
    """

    def __init__(self, weight_decay: float, decisions: Mapping[str, Decision], model: nn.Module | None):
        self._weight_decay = weight_decay
        self._decisions = dict(decisions)
        self._model = weakref.ref(model) if model is not None else _nothing

    @property
    def weight_decay(self) -> float:
        """The λ that the plan was made for."""
        return self._weight_decay

    def __getitem__(self, name: str) -> Decision:
        return self._decisions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    @property
    def decayed(self) -> Plan:
        """The part of the plan whose λ is not zero."""
        return self._where(lambda decision: decision.weight_decay > 0)

    @property
    def exempt(self) -> Plan:
        """The part of the plan whose λ is zero."""
        return self._where(lambda decision: not decision.weight_decay > 0)

    def _where(self, keep: Callable[[Decision], bool]) -> Plan:
        return Plan(self._weight_decay, {n: d for n, d in self.items() if keep(d)}, self._model())

    def scaled_to(self, weight_decay: float) -> Plan:
        """The same plan for another λ; an absolute λ stays (see `Decision.follows`).

        Raises:
            ArgumentError: `weight_decay` is negative, not finite or not a number.
        """
        new = check_factor(weight_decay)
        decisions = {n: replace(d, weight_decay=new) if d.follows else d for n, d in self.items()}
        return Plan(new, decisions, self._model())

    def with_own(self, λs: Mapping[str, float]) -> Plan:
        """This plan where each parameter that follows λ has one of its own (0.0 exempts it)."""

        def own(d: Decision) -> Decision:
            λ = λs.get(d.name, 0.0)
            if not d.follows or λ == self._weight_decay:
                return d
            return replace(d, weight_decay=λ, follows=False, reason=f"{d.reason}; its param group has {λ:g}")

        return Plan(self._weight_decay, {name: own(d) for name, d in self.items()}, self._model())

    def inherited(self, new: Decision) -> Decision:
        """`new`, unless it is a known parameter under another name whose exemption or absolute λ it has to keep.

        A parametrization moves ``weight`` to ``parametrizations.weight.original``, an adapter to ``base_layer.weight``.
        """
        old = self.get(_RENAMED.sub(lambda found: found["local"] or "", new.name))
        if old is None or old.follows or not new.eligible:
            return new
        return replace(new, weight_decay=old.weight_decay, follows=False, reason=f"was {old.name}: {old.reason}")

    def extended(self, newer: Iterable[Decision]) -> Plan:
        """This plan, and after it the decisions on parameters that it does not know."""
        more = {d.name: d for d in newer if d.name not in self}
        return Plan(self._weight_decay, {**self, **more}, self._model())

    def diff(self, other: Mapping[str, Decision]) -> PlanDiff:
        """What two plans decide differently, with both reasons; ``print`` it, or iterate.

        A parameter that only one of them knows counts as different.
        """
        names = dict.fromkeys((*self, *other))
        pairs = {name: (self.get(name), other.get(name)) for name in names}
        return PlanDiff({n: (a, b) for n, (a, b) in pairs.items() if _λ(a) != _λ(b)})

    def param_groups(self) -> list[dict[str, Any]]:
        """The plan as optimizer groups, one for each λ, in order of appearance.

        Returns:
            dicts with the keys ``params`` (every parameter of the model, frozen ones too) and
            ``weight_decay``, for any ``torch.optim`` style constructor.

        Raises:
            WdhookError: the model no longer exists, or has lost a parameter of the plan.
        """
        model = self._model()
        if model is None:
            raise WdhookError(
                "`param_groups` needs the model of the plan, which no longer exists.\n"
                "  Make a new plan: wdhook.plan(model, weight_decay)"
            )
        params = dict(model.named_parameters())
        groups: dict[float, list[nn.Parameter]] = {}
        for name, decision in self.items():
            if name not in params:
                raise WdhookError(
                    f"`param_groups` found no parameter under a name of the plan.\n  parameter: {name}\n"
                    "  The model changed since. Make a new plan: wdhook.plan(model, weight_decay)"
                )
            groups.setdefault(decision.weight_decay, []).append(params[name])
        return [{"params": group, "weight_decay": value} for value, group in groups.items()]

    def __repr__(self) -> str:
        return f"Plan(weight_decay={self._weight_decay:g}, {len(self.decayed)} of {len(self)} tensors decayed)"

    def __str__(self) -> str:
        return plan_table(self._weight_decay, list(self.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        # A weak reference cannot be pickled; a copied plan is data without its model.
        return Plan, (self._weight_decay, self._decisions, None)


class PlanDiff(Mapping[str, "tuple[Decision | None, Decision | None]"]):
    """Parameter name → the two decisions, where their λ differ (None: unknown to that plan)."""

    def __init__(self, pairs: Mapping[str, tuple[Decision | None, Decision | None]]):
        self._pairs = dict(pairs)

    def __getitem__(self, name: str) -> tuple[Decision | None, Decision | None]:
        return self._pairs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def numel(self) -> int:
        """Number of elements about which the two plans disagree."""
        return sum(known.numel for pair in self.values() if (known := pair[0] or pair[1]))

    def __str__(self) -> str:
        return diff_table(self)

    def __repr__(self) -> str:
        return f"PlanDiff({len(self)} tensors, {self.numel} elements)"


def _λ(decision: Decision | None) -> float | None:
    return None if decision is None else decision.weight_decay


def _nothing() -> None:
    return None


def plan(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: str | None = None,
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

    Returns:
        One `Decision` for each name that ``model.named_parameters()`` gives, in its order.

    Raises:
        ArgumentError: an argument has no meaning.
        SelectorError: a selector matches nothing.

    >>> import torch, wdhook
    >>> plan = wdhook.plan(torch.nn.Linear(3, 2), 1e-4)
    >>> {name: decision.weight_decay for name, decision in plan.items()}
    {'weight': 0.0001, 'bias': 0.0}
    """
    return decide(model, weight_decay, overrides, recipe, strict=True)


def decide(
    model: nn.Module, weight_decay: float, overrides: Overrides | None, recipe: str | None, strict: bool
) -> Plan:
    """`plan`, where with `strict` False a selector may match nothing: the model was planned before, and changed."""
    value = check_factor(weight_decay)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` must be a torch.nn.Module.\n  got: {type(model).__name__}")
    decisions = _follow_recipe(model, recipe, value) if recipe is not None else _follow_roles(model, value)
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
    return Plan(value, decisions, model)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    overrides: Overrides | None = None,
    recipe: str | None = None,
) -> list[dict[str, Any]]:
    """The same decision as optimizer groups, where the optimizer's own decay is the right one.

    Arguments and errors are those of `plan`, the result that of `Plan.param_groups`.

    >>> import torch, wdhook
    >>> groups = wdhook.param_groups(torch.nn.Linear(3, 2), 0.01)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.01, 1), (0.0, 1)]
    """
    return plan(model, weight_decay, overrides=overrides, recipe=recipe).param_groups()


def require_eligible(plan: Plan) -> None:
    """Raise unless something in `plan` would ever be decayed."""
    if not any(decision.eligible for decision in plan.values()):
        roles = ", ".join(sorted({str(d.role) for d in plan.values()})) or "none: the model has no parameters"
        raise NothingToDecayError(
            "The model has no eligible parameter, so there would be nothing to decay.\n"
            f"  parameters: {len(plan)}\n  roles: {roles}\n"
            '  Print wdhook.plan(model, λ) for the reasons; include more with overrides={"<glob>": True}'
        )


def _follow_roles(model: nn.Module, weight_decay: float) -> dict[str, Decision]:
    params = dict(model.named_parameters())
    decisions = {}
    for name, verdict in classify(model).items():
        follows = verdict.weight_decay is None and verdict.role in DECAYED_ROLES
        λ = weight_decay if follows else verdict.weight_decay or 0.0
        extent = _extent(params[name])
        decisions[name] = Decision(name, verdict.role, λ, verdict.reason, *extent, verdict.guess, follows)
    return decisions


def _follow_recipe(model: nn.Module, recipe: str, weight_decay: float) -> dict[str, Decision]:
    from ._recipes import follow  # a layer of its own, needed by few

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


def _extent(parameter: Any) -> tuple[tuple[int, ...], int]:
    if is_lazy(parameter):
        return (), 0
    return tuple(parameter.shape), parameter.numel()


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
