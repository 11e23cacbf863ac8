"""All decisions of a model as data: `Plan`, and the differences between two plans."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .._base.errors import WdhookError
from .._base.validate import check_factor
from .decision import Decision
from .table import diff_table, plan_table

# What parametrizations, pruning, the older norms of weights, and adapters insert into or add to parameter names.
_RENAMED = (
    r"(?<![^.])(?:(?:base_layer|original_module|modules_to_save\.[^.]+)\."
    r"|parametrizations\.(?P<local>\w+)\.original\d*$|(?P<pruned>\w+)_orig$|(?P<normed>weight\w*)_v$)"
)


class Plan(Mapping[str, Decision]):
    """An ordered, immutable mapping from parameter name to `Decision`.

    ``print(plan)`` shows it as a table with totals. A plan does not keep its model alive.
    """

    def __init__(
        self, weight_decay: float, decisions: Mapping[str, Decision], model: nn.Module | None
    ):
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
            return replace(
                d, weight_decay=λ, follows=False, reason=f"{d.reason}; its param group has {λ:g}"
            )

        return Plan(self._weight_decay, {name: own(d) for name, d in self.items()}, self._model())

    def renamed(self, decisions: Mapping[str, Decision]) -> Plan:
        """The same decisions on a model that has changed: name now → decision, under whatever name it was made."""
        own = {n: d if d.name == n else _under(n, d) for n, d in decisions.items()}
        return Plan(self._weight_decay, own, self._model())

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


def former_name(name: str) -> str:
    """The name before a parametrization, pruning, a norm of weights or an adapter renamed the parameter."""
    return re.sub(_RENAMED, _former_part, name)


def _former_part(found: re.Match[str]) -> str:
    return found["local"] or found["pruned"] or found["normed"] or ""


def inherited(new: Decision, old: Decision | None) -> Decision:
    """`new`, with the exemption or the absolute λ that the parameter had under its former name."""
    if old is None or old.follows or not new.eligible:
        return new
    reason = f"was {old.name}: {old.reason}"
    return replace(new, weight_decay=old.weight_decay, follows=False, reason=reason)


def _under(name: str, decision: Decision) -> Decision:
    return replace(decision, name=name, reason=f"was {decision.name}: {decision.reason}")


def _λ(decision: Decision | None) -> float | None:
    return None if decision is None else decision.weight_decay


def _nothing() -> None:
    return None
