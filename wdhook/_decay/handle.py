"""The handle that `attach` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from .._base.errors import ArgumentError, WdhookError
from .._base.validate import check_factor
from .._plan.plan import Plan
from . import checkpoint
from .check import Check, checked
from .dose import Dose, read_dose
from .engine import Engine
from .snapshot import By, Snapshot


class WeightDecay:
    """The handle of an attached model: change λ, pause, remove.

    It is also a context manager that removes the decay at its end. The decay goes on without it: a
    handle that is thrown away removes nothing. A copy or a pickle of a handle is detached.
    """

    __slots__ = ("__weakref__", "_at", "_engine", "_is_copy", "_mode", "_plan")

    def __init__(
        self, engine: Engine | None, plan: Plan, mode: str, at: str, is_copy: bool = False
    ) -> None:
        self._engine = engine
        self._is_copy = is_copy
        self._plan = plan
        self._mode = mode
        self._at = at

    @property
    def mode(self) -> str:
        """Name of the formula, ``"coupled"`` for one. Attach again to change it."""
        return self._mode

    @property
    def at(self) -> str:
        """``"backward"`` or ``"step"``. Attach again to change it."""
        return self._at

    def remove(self) -> None:
        """Remove every hook, those of the process too; the plan stays readable. May be called
        again.

        What deferred decay has not written yet is written first, as by `flush`.
        """
        if self._engine is not None:
            if not self._engine.closed:
                self._engine.flush()
            self._plan = self._engine.last_plan().bare()
            self._engine.close()
            self._engine = None

    def flush(self) -> None:
        """Write decay that was counted and could not be represented yet, to parameters in bfloat16
        and float16.

        Call it between steps, before weights are exported or compared. A checkpoint needs no
        flush: `state_dict` holds what is pending. What rounding takes of the last factor is lost.
        Waits for the device where numbers are there.
        """
        if self._engine is not None and not self._engine.closed:
            self._engine.flush()

    def __enter__(self) -> WeightDecay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No decay in backward passes and steps inside this context.

        A gradient that was computed inside and is stepped outside is decayed at that step.
        """
        with nullcontext() if self._engine is None else self._engine.paused():
            yield

    @property
    def weight_decay(self) -> float:
        """λ per optimizer step. Set it to change it; absolute λ of overrides and marks stay.

        Raises:
            ArgumentError: (setter) not a number, negative or not finite; or the handle follows a
                schedule.
        """
        return (
            self._plan.weight_decay
            if self._engine is None
            else self._engine.state.rate.weight_decay
        )

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        new = check_factor(value)
        if self._engine is not None and self._engine.state.config.schedule is not None:
            raise ArgumentError(
                "`weight_decay` follows the schedule that `attach` was given, which sets it after "
                "each step.\n"
                f"  schedule: {self._engine.state.config.schedule!r}\n"
                "  Put what you want into that function of the step, or attach with a number and "
                "set that"
            )
        self._set(new)

    def _set(self, new: float) -> None:
        if self._engine is None:
            self._plan = self._plan.scaled_to(new)
        else:
            self._engine.set_weight_decay(new)

    @property
    def plan(self) -> Plan:
        """The decision for each parameter, with the present λ; ``print`` it."""
        return self._plan if self._engine is None else self._engine.plan

    def snapshot(self, by: By = "role") -> Snapshot:
        """Norms of parameters and gradients, the angle between them, the share of the decay, and
        how far the step turns the weights, by group.

        Take it between ``backward()`` and ``step()``, un-scaled (``scaler.unscale_``) if the loss
        is. Nothing waits for the device until the numbers are read, and nothing is computed for a
        handle of which no snapshot is taken. Of a sharded parameter this rank's part counts.
        It keeps a copy of the parameters that have a gradient until the step has ended, for what
        the step changes; a snapshot that is thrown away before keeps nothing.

        Args:
            by: ``"role"``, ``"name"`` for each parameter by itself, or a function that names the
                group of a `Decision`.

        Raises:
            ArgumentError: `by` is something else.
            WdhookError: the handle is removed.

        >>> import torch, wdhook
        >>> model = torch.nn.Linear(1, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(2.0)
        >>> decay = wdhook.attach(model, 0.5)
        >>> model(torch.ones(1, 1)).sum().backward()  # a gradient of 1, and 1 more by the decay
        >>> snapshot = decay.snapshot()
        >>> weight = snapshot.to_dict()["groups"]["weight"]
        >>> weight["norm"], weight["grad_norm"], weight["cos"], weight["share"]
        (2.0, 1.0, 1.0, 0.5)
        >>> snapshot.scalars()["wdhook/norm/weight"]
        2.0
        >>> decay.remove()
        """
        if self._engine is None or self._engine.closed:
            raise WdhookError("`snapshot` needs a handle that is attached, and this one is removed")
        return Snapshot(self._engine, by)

    def check(self) -> Check:
        """Tell what the last optimizer step has decayed, and by how much; ``print`` it.

        Costs nothing in training: it reads what each payment has left. ``print(handle)`` prints the
        same. Take it after ``optimizer.step()``.

        >>> import torch, wdhook
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> decay = wdhook.attach(model, 0.5)
        >>> print(decay.check())
        Nothing is decayed so far: no optimizer has stepped a parameter of the plan.
          no decay so far: 1: weight
          A weight is decayed when it has a gradient and an optimizer steps it; \
`python -m wdhook doctor` finds what is missing
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> print(decay.check())
        Decay works: step 1 decayed 1 of 1 eligible tensors, 6 elements; λ·p = 0.5·p added to the \
gradient.
        >>> decay.remove()
        """
        if self._engine is None or self._engine.closed:
            return Check(removed=True)
        return checked(self._engine)

    @property
    def dose(self) -> Dose:
        """The decay of all steps so far, −Σ log(1 − lr·λ); ``print`` it.

        It costs one addition for each param group and step, waits for the device only where ``lr``
        is there and only when it is read, and is saved by `state_dict`. `Dose` says what is
        counted.

        Raises:
            WdhookError: the handle is removed.

        >>> import torch, wdhook
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
        >>> decay = wdhook.attach(model, 0.1, mode="decoupled", at="step")
        >>> for _ in range(100):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
        >>> print(decay.dose)
        Dose so far: λ 0.1, 1 weight: 0.1; decay alone leaves 90.5 %: \
a mild pull toward zero
        >>> round(decay.dose["weight"], 6)
        0.10005
        >>> decay.remove()
        """
        if self._engine is None or self._engine.closed:
            raise WdhookError("`dose` needs a handle that is attached, and this one is removed")
        return read_dose(self._engine)

    def state_dict(self) -> dict[str, Any]:
        """λ, the dose, what a schedule cannot recompute and what deferred decay has not written, as
        plain numbers (and tensors, where ``lr`` is one).

        With ``toward="init"`` also ``targets``: name → the values before the first update, tensors
        that are not copied.
        """
        progress = checkpoint.REMOVED if self._engine is None else checkpoint.save(self._engine)
        return {"weight_decay": self.weight_decay, "mode": self.mode, **progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the λ of `state`; a schedule goes on after the steps that had been finished.

        Raises:
            ArgumentError: it is not a state of a handle, or one of another mode or with other
                targets, or (for a handle with a schedule) of one that had none.
        """
        state = checkpoint.complete(state, self.mode)
        if self._engine is not None:
            state = checkpoint.checked(self._engine, state)
        self._set(check_factor(state["weight_decay"]))
        if self._engine is not None:
            checkpoint.load(self._engine, state)

    def __repr__(self) -> str:
        plan = self.plan
        decayed = len(plan.decayed)
        if self._engine is None or self._engine.closed:
            life = "removed (a copy: attach again)" if self._is_copy else "removed"
        else:
            life = f"steps={self._engine.state.steps}"
            frozen = len(checked(self._engine).frozen)
            if frozen:
                decayed -= frozen
                life = f"frozen={frozen}, {life}"
        return (
            f"WeightDecay({plan.weight_decay:g}, mode={self.mode!r}, at={self.at!r}, "
            f"decayed={decayed} of {len(plan)} tensors, {life})"
        )

    def __str__(self) -> str:
        return str(self.check())

    def __reduce__(self) -> tuple[Any, ...]:
        # A model may keep its handle as an attribute and still be copied: its copy has no hooks.
        return WeightDecay, (None, self.plan, self.mode, self.at, True)
