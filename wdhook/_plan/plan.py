"""All decisions of a model as data: `Plan`, and the differences between two plans."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .._base.errors import TargetError, WdhookError
from .._base.text import did_you_mean
from .._base.validate import check_factor
from .._roles.places import named_parameters
from .decision import Decision
from .renames import under
from .table import diff_html, diff_table, plan_html, plan_table


class _UnknownNameError(KeyError):
    """A name that is not in the plan; the message is made when it is read."""

    def __init__(self, name: object, plan: Plan) -> None:
        super().__init__(name)
        self._plan = plan

    def __str__(self) -> str:
        name, plan = self.args[0], self._plan
        for decision in plan.values():
            if name in decision.aliases:
                return f"{name!r} is tied: its decision is that of {decision.name!r}"
        facts = f"{name!r} is no parameter of this plan, which has {len(plan)}"
        near = did_you_mean(name, plan, quoted=True)
        return f"{facts}{near}" if near else f"{facts}. list(plan) has the names"


Replan = Callable[[nn.Module, float], "Plan"]
"""Makes a plan of a model that has changed, by the same rules."""


class Plan(Mapping[str, Decision]):
    """An ordered, immutable mapping from parameter name to `Decision`.

    ``print(plan)`` shows it as a table with totals. A plan does not keep its model alive, unless
    selectors that it was made with refer to it.
    """

    def __init__(
        self,
        weight_decay: float,
        decisions: Mapping[str, Decision],
        model: nn.Module | None,
        again: Replan | None = None,
    ):
        self._weight_decay = weight_decay
        self._decisions = dict(decisions)
        self._model = weakref.ref(model) if model is not None else _nothing
        self._again = again

    @property
    def weight_decay(self) -> float:
        """The λ that the plan was made for."""
        return self._weight_decay

    def __getitem__(self, name: str) -> Decision:
        try:
            return self._decisions[name]
        except KeyError:
            raise _UnknownNameError(name, self) from None

    def __contains__(self, name: object) -> bool:
        return name in self._decisions

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
        return self._with({n: d for n, d in self.items() if keep(d)})

    def _with(self, decisions: Mapping[str, Decision], weight_decay: float | None = None) -> Plan:
        λ = self._weight_decay if weight_decay is None else weight_decay
        return Plan(λ, decisions, self._model(), self._again)

    def bare(self) -> Plan:
        """The same decisions, without the rules by which they were made: selectors may refer to the
        model."""
        return Plan(self._weight_decay, self._decisions, self._model())

    @property
    def again(self) -> Replan | None:
        """Makes a plan by the same rules; None for a copy of a plan."""
        return self._again

    def scaled_to(self, weight_decay: float) -> Plan:
        """The same plan for another λ; an absolute λ stays (see `Decision.follows`).

        Raises:
            ArgumentError: `weight_decay` is negative, not finite or not a number.
        """
        new = check_factor(weight_decay)
        decisions = {n: replace(d, weight_decay=new) if d.follows else d for n, d in self.items()}
        return self._with(decisions, new)

    def with_own(self, λs: Mapping[str, float]) -> Plan:
        """This plan where each parameter that follows λ has one of its own (0.0 exempts it)."""

        def own(d: Decision) -> Decision:
            λ = λs.get(d.name, 0.0)
            if not d.follows or λ == self._weight_decay:
                return d
            return replace(
                d, weight_decay=λ, follows=False, reason=f"{d.reason}; its param group has {λ:g}"
            )

        return self._with({name: own(d) for name, d in self.items()})

    def renamed(self, decisions: Mapping[str, Decision]) -> Plan:
        """The same decisions on a model that has changed: name now → decision."""
        return self._with({n: under(n, d) for n, d in decisions.items()})

    def diff(self, other: Mapping[str, Decision]) -> PlanDiff:
        """The decisions that differ between two plans, with both reasons; ``print`` or iterate.

        A parameter that only one of them knows counts as different.
        """
        pairs = {}
        for name in dict.fromkeys((*self, *other)):
            one, two = self.get(name), other.get(name)
            if _λ(one) != _λ(two):
                pairs[name] = one, two
        return PlanDiff(pairs)

    def param_groups(self) -> list[dict[str, Any]]:
        """The plan as optimizer groups, one for each λ, in order of appearance.

        Returns:
            dicts with the keys ``params`` (every parameter of the model, frozen ones too) and
            ``weight_decay``, for any ``torch.optim`` style constructor.

        Raises:
            WdhookError: the model no longer exists, or has lost a parameter of the plan.
            TargetError: the plan draws parameters to other values than 0, as no optimizer does.
        """
        aimed = [decision.name for decision in self.values() if decision.toward]
        if aimed:
            raise TargetError(
                "`param_groups` has no place for targets: an optimizer draws parameters to 0.\n"
                f"  parameter: {aimed[0]}\n"
                "  Use wdhook.attach(model, weight_decay, toward=...)"
            )
        model = self._model()
        if model is None:
            raise WdhookError(
                "`param_groups` needs the model of the plan, which no longer exists.\n"
                "  Make a new plan: wdhook.plan(model, weight_decay)"
            )
        params = dict(named_parameters(model))
        groups: dict[float, list[Tensor]] = {}
        for name, decision in self.items():
            if name not in params:
                raise WdhookError(
                    "`param_groups` found no parameter under a name of the plan.\n"
                    f"  parameter: {name}\n"
                    "  The model changed since. Make a new plan: wdhook.plan(model, weight_decay)"
                )
            groups.setdefault(decision.weight_decay, []).append(params[name])
        return [{"params": group, "weight_decay": value} for value, group in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data that ``json.dumps`` takes.

        Returns:
            the keys ``weight_decay`` and ``parameters``: a list of dicts with the attributes of
            `Decision`.
        """
        rows = [decision.to_dict() for decision in self.values()]
        return {"weight_decay": self._weight_decay, "parameters": rows}

    def to_pandas(self) -> Any:
        """The plan as a ``pandas.DataFrame``; an ``ImportError`` where pandas is not installed.

        Returns:
            a frame with a row for each parameter: the names as index, and the other attributes of
            `Decision` as columns.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "`Plan.to_pandas` needs pandas, which is not installed.\n"
                "  Install it with `pip install pandas`, or use Plan.to_dict()"
            ) from error
        rows = self.to_dict()["parameters"]
        columns = [field.name for field in fields(Decision)]
        return pandas.DataFrame(rows, columns=columns).set_index("name")

    def __repr__(self) -> str:
        decayed = self.decayed
        frozen = sum(1 for decision in decayed.values() if not decision.trainable)
        count = f"{len(decayed) - frozen} of {len(self)} tensors decayed"
        more = f", {frozen} more frozen" if frozen else ""
        return f"Plan(weight_decay={self._weight_decay:g}, {count}{more})"

    def __str__(self) -> str:
        return plan_table(self._weight_decay, list(self.values()))

    def _repr_html_(self) -> str:
        return plan_html(self._weight_decay, list(self.values()))

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
        total = 0
        for one, other in self.values():
            known = one or other
            total += known.numel if known is not None else 0
        return total

    def __str__(self) -> str:
        return diff_table(self)

    def _repr_html_(self) -> str:
        return diff_html(self)

    def __repr__(self) -> str:
        return f"PlanDiff({len(self)} tensors, {self.numel} elements)"


def _λ(decision: Decision | None) -> float | None:
    return None if decision is None else decision.weight_decay


def _nothing() -> None:
    return None
