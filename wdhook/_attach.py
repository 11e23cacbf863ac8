"""`attach`, `adopt`, and the handle that they return."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ._engine import Engine
from ._errors import AlreadyAttachedError, ArgumentError, LearningRateError
from ._listener import attached, listen
from ._numbers import check_factor, is_number
from ._optimizers import LearningRate, check_supports_decoupled, learning_rate, own_mode
from ._overrides import Overrides
from ._plan import Plan, decide, plan, require_eligible
from ._state import Settings

MODES = ("coupled", "decoupled", "independent")
MOMENTS = ("backward", "step")
Optimizers = Optimizer | Iterable[Optimizer]


class WeightDecay:
    """The handle of an attached model: change λ, pause, remove.

    It is also a context manager that removes the decay at its end. The decay goes on without it: a handle
    that is thrown away removes nothing. A copy or a pickle of a handle is detached.
    """

    def __init__(self, engine: Engine | None, plan: Plan, mode: str, at: str):
        self._engine = engine
        self._plan = plan
        self.mode = mode
        self.at = at

    def remove(self) -> None:
        """Remove every hook, those of the process too; the plan stays readable. May be called again."""
        if self._engine is not None:
            self._plan = self._engine.plan
            self._engine.close()
            self._engine = None

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
        engine = self._engine
        if engine is not None:
            engine.pauses += 1
        try:
            yield
        finally:
            if engine is not None:
                engine.pauses -= 1

    @property
    def weight_decay(self) -> float:
        """λ per optimizer step. Set it to follow a schedule; absolute λ of overrides and marks stay.

        Raises:
            ArgumentError: (setter) not a number, negative or not finite.
        """
        return self._plan.weight_decay if self._engine is None else self._engine.weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        new = check_factor(value)
        if self._engine is None:
            self._plan = self._plan.scaled_to(new)
        else:
            self._engine.weight_decay = new

    @property
    def plan(self) -> Plan:
        """The decision for each parameter, with the present λ; ``print`` it."""
        return self._plan if self._engine is None else self._engine.plan

    def state_dict(self) -> dict[str, Any]:
        """λ and what a schedule cannot recompute, as plain numbers (and tensors, where ``lr`` is one)."""
        peaks = [] if self._engine is None else self._engine.lr_peaks()
        return {"weight_decay": self.weight_decay, "mode": self.mode, "lr_peaks": peaks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the λ of `state`.

        Raises:
            ArgumentError: it is not a state of a handle, or one of another mode.
        """
        missing = {"weight_decay", "mode", "lr_peaks"} - set(state)
        if missing:
            raise ArgumentError(f"`state` is not the state of a handle.\n  missing: {', '.join(sorted(missing))}")
        if state["mode"] != self.mode:
            raise ArgumentError(
                "`state` is of another mode, in which the same λ means something else.\n"
                f"  state: {state['mode']}\n  handle: {self.mode}"
            )
        self.weight_decay = state["weight_decay"]
        if self._engine is not None:
            self._engine.set_lr_peaks(state["lr_peaks"])

    def __repr__(self) -> str:
        plan = self.plan
        life = "removed" if self._engine is None or self._engine.closed else f"steps={self._engine.steps}"
        return (
            f"WeightDecay({plan.weight_decay:g}, mode={self.mode!r}, at={self.at!r}, "
            f"decayed={len(plan.decayed)} of {len(plan)} tensors, {life})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A model may keep its handle as an attribute and still be copied: its copy has no hooks.
        return WeightDecay, (None, self.plan, self.mode, self.at)


def attach(
    model: nn.Module,
    weight_decay: float | Plan,
    *,
    mode: str = "coupled",
    at: str = "backward",
    optimizer: Optimizers | None = None,
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    foreach: bool | None = None,
) -> WeightDecay:
    r"""Decay the weights of `model`, and nothing else, once per optimizer step from now on.

    Construct the optimizer with ``weight_decay=0``; the training loop stays as it is.

    Args:
        model: the module whose parameters are decayed.
        weight_decay: λ per optimizer step (not per backward), or a ready `Plan`.
        mode: ``"coupled"``: g ← g + λ·p, as if ½·λ·‖p‖² were part of the loss (`torch.optim.SGD`).
            ``"decoupled"``: p ← p·(1 − lr·λ) before the update (`torch.optim.AdamW`; Loshchilov & Hutter 2019).
            ``"independent"``: p ← p·(1 − (lr/lr_peak)·λ), so that λ does not change with the base
            learning rate.
        at: ``"backward"``: in a post-accumulate-grad hook, so that clipping and logging see the decay.
            ``"step"``: just before the update, after accumulation, un-scaling and clipping, as the
            optimizer's own ``weight_decay`` would.
        optimizer: the optimizer(s) that step the model. Needed for decoupled decay at ``"backward"``
            (unless `lr` is a number) and for optimizers that maximize; else any optimizer is heard.
        lr: learning rate of decoupled decay, a number or a function of the param group that owns the
            parameter, where it is not the group's ``lr``.
        scaler: the ``GradScaler``, where coupled decay at ``"backward"`` meets a scaled loss.
        overrides: see `plan`.
        recipe: see `plan`.
        foreach: as in ``torch.optim``, for the pass at the step: None chooses, True forces the foreach
            implementation, False forbids it.

    Returns:
        The handle; ``print(handle.plan)`` shows what is decayed and why.

    Raises:
        ArgumentError: an argument has no meaning.
        SelectorError: a selector of `overrides` matches nothing.
        NothingToDecayError: no parameter is eligible.
        LearningRateError: decoupled decay has no learning rate to go by.
        AlreadyAttachedError: another handle decays some of these parameters.
        UnsupportedOptimizerError: decoupled decay cannot be taken out of this optimizer.

    Nothing is registered when an error is raised. What can only be seen in the training loop is raised
    there, before a step changes anything: `DoubleDecayError`, `MasterWeightsError`, `LossScaleError`.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(3, 2)
    >>> decay = wdhook.attach(model, 1e-4)
    >>> decay
    WeightDecay(0.0001, mode='coupled', at='backward', decayed=1 of 2 tensors, steps=0)
    >>> decay.remove()
    """
    _check_choice("mode", mode, MODES)
    _check_choice("at", at, MOMENTS)
    if foreach not in (None, True, False):
        raise ArgumentError(f"`foreach` must be None, True or False.\n  got: {foreach!r}")
    ready = _ready_plan(model, weight_decay, overrides, recipe)
    require_eligible(ready)
    optimizers = _optimizers(optimizer)
    _check_lr(mode, at, optimizers, lr)
    _check_step(at, optimizers)
    _check_scaler(scaler)
    settings = Settings(
        mode=mode,
        at=at,
        optimizers=tuple(weakref.ref(o) for o in optimizers),
        lr=lr,
        scaler=scaler,
        foreach=foreach,
        replan=partial(decide, overrides=overrides, recipe=recipe, strict=False),
    )
    engine = Engine(model, ready, settings)
    _check_free(engine, ready)
    engine.open()
    listen(engine)
    return WeightDecay(engine, ready, mode, at)


def adopt(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    mode: str | None = None,
    at: str = "step",
    lr: LearningRate | None = None,
    scaler: Any | None = None,
    overrides: Overrides | None = None,
    recipe: str | None = None,
    foreach: bool | None = None,
) -> WeightDecay:
    """Take over the decay that `optimizer` is configured with.

    λ of each parameter is read from its param group; eligible parameters keep it, others are no longer
    decayed, and ``weight_decay`` is set to 0 in the groups and in the optimizer's defaults.

    Args:
        model: the module that `optimizer` trains.
        optimizer: with a non-zero ``weight_decay`` in at least one param group.
        mode: None picks the formula of the optimizer's own decay, where it is known.
        at: the default ``"step"`` is when the optimizer did it itself.
        lr, scaler, overrides, recipe, foreach: see `attach`. An override is absolute; its True means the
            λ of the param group.

    Returns:
        The handle. `WeightDecay.remove` ends the decay; it does not give it back to the optimizer.

    Raises:
        ArgumentError: `optimizer` does not decay, or its formula is not known and `mode` is None; and all
            that `attach` raises. The optimizer is left as it was.

    >>> import torch, wdhook
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    >>> wdhook.adopt(model, optimizer)
    WeightDecay(0.05, mode='decoupled', at='step', decayed=1 of 2 tensors, steps=0)
    >>> optimizer.param_groups[0]["weight_decay"]
    0.0
    """
    groups = optimizer.param_groups
    λs = {id(p): float(group.get("weight_decay") or 0.0) for group in groups for p in group["params"]}
    if not any(λs.values()):
        raise ArgumentError(
            "`optimizer` is not configured to decay anything, so there is nothing to adopt.\n"
            f"  optimizer: {type(optimizer).__name__}, weight_decay 0 in {len(groups)} param groups\n"
            "  Use wdhook.attach(model, weight_decay)"
        )
    if mode is None:
        mode = own_mode(optimizer)
    if mode is None:
        raise ArgumentError(
            "The formula of the optimizer's own decay is not known, so `mode` cannot be picked.\n"
            f"  optimizer: {type(optimizer).__name__}\n"
            '  Give mode="coupled" (L2, as in SGD) or mode="decoupled" (as in AdamW)'
        )
    decided = plan(model, max(λs.values()), overrides=overrides, recipe=recipe)
    adopted = decided.with_own({n: λs[id(p)] for n, p in model.named_parameters() if id(p) in λs})
    handle = attach(model, adopted, mode=mode, at=at, optimizer=optimizer, lr=lr, scaler=scaler, foreach=foreach)
    for settings in (*groups, optimizer.defaults):
        if "weight_decay" in settings:
            settings["weight_decay"] = 0.0
    return handle


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"`{argument}` must be one of {', '.join(map(repr, choices))}.\n  got: {value!r}")


def _ready_plan(model: nn.Module, weight_decay: float | Plan, overrides: Overrides | None, recipe: str | None) -> Plan:
    if not isinstance(weight_decay, Plan):
        return plan(model, weight_decay, overrides=overrides, recipe=recipe)
    if overrides is not None or recipe is not None:
        raise ArgumentError(
            "A ready plan has its `overrides` and `recipe` in it already: give them to wdhook.plan instead"
        )
    names = dict(model.named_parameters())
    unknown = [name for name in (*names, *weight_decay) if (name in names) != (name in weight_decay)]
    if unknown:
        raise ArgumentError(
            "The plan is not one of this model.\n"
            f"  names that only one of them has: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
        )
    return weight_decay


def _optimizers(given: Optimizers | None) -> tuple[Any, ...]:
    if given is None:
        return ()
    optimizers = (given,) if hasattr(given, "param_groups") else given
    if not isinstance(optimizers, Iterable) or not all(hasattr(o, "param_groups") for o in optimizers):
        raise ArgumentError(f"`optimizer` must have param_groups, or be a list of such.\n  got: {given!r}")
    return tuple(optimizers)


def _check_lr(mode: str, at: str, optimizers: tuple[Any, ...], lr: LearningRate | None) -> None:
    if is_number(lr):
        check_factor(lr, "lr")
    elif lr is not None and not (callable(lr) or isinstance(lr, Tensor)):
        raise ArgumentError(f"`lr` must be a number or a function of a param group.\n  got: {lr!r}")
    if mode == "coupled":
        if lr is not None:
            raise ArgumentError(
                f'`lr` has no meaning with mode="coupled": the optimizer applies its own.\n  got: {lr!r}'
            )
        return
    for optimizer in optimizers:
        check_supports_decoupled(optimizer)
        if lr is None:
            for group in optimizer.param_groups:
                learning_rate(group, None)
    if at == "backward" and not optimizers and (lr is None or callable(lr) or mode == "independent"):
        raise LearningRateError(
            f'mode={mode!r} with at="backward" needs a learning rate before any optimizer has stepped.\n'
            f"  optimizer: None\n  lr: {lr!r}\n"
            '  Use attach(..., optimizer=optimizer), a number as `lr=`, or at="step"'
        )


def _check_step(at: str, optimizers: tuple[Any, ...]) -> None:
    for optimizer in optimizers:
        if at == "step" and not isinstance(optimizer, Optimizer):
            raise ArgumentError(
                'at="step" hears the steps of torch.optim.Optimizer and its subclasses only.\n'
                f'  optimizer: {type(optimizer).__name__}\n  Use at="backward"'
            )


def _check_scaler(scaler: object) -> None:
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("scale", "is_enabled")):
        raise ArgumentError(f"`scaler` must be a torch.amp.GradScaler.\n  got: {type(scaler).__name__}")


def _check_free(engine: Engine, wanted: Plan) -> None:
    """Raise if another handle decays a parameter that this one is to decay."""
    others = attached()
    mine = engine.governed() if others else {}
    for other in others:
        for key, name in other.governed().items():
            if key in mine:
                raise AlreadyAttachedError(
                    "A parameter is decayed by another handle already.\n"
                    f"  parameter: {mine[key]}\n  that handle: weight_decay={other.weight_decay:g}, "
                    f"mode={other.settings.mode!r}, name there: {name}\n"
                    f"  this call: weight_decay={wanted.weight_decay:g}\n"
                    "  Call remove() on the first handle, or exempt the parameter in one of them with `overrides`"
                )
