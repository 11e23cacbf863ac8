"""One look at a model and its optimizers: the engine's own checks, asked before, in and after a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._base.errors import (
    DoubleDecayError,
    LearningRateError,
    UnsupportedOptimizerError,
    WdhookError,
    WdhookWarning,
)
from .._decay.engine import Engine
from .._decay.optimizers import (
    check_supports_decoupled,
    inner_optimizers,
    innermost,
    learning_rate,
    owned_ids,
    tells_of_steps,
)
from .._decay.rules import check_own_decay, decays_itself, is_copy, roundings
from .._decay.step_listener import attached
from .findings import SEVERITIES, Finding, raised, told
from .targets import users_code
from .training import Seen, Training, run_step, watched


class Examination:
    """One look at a training; `findings` is what came of it."""

    def __init__(self, training: Training, attach: Callable[[], Any], mode: str, at: str) -> None:
        """Args:
        attach: attaches wdhook where the user has not, in this `mode` and `at` this moment.
        """
        self.training = training
        self.findings: list[Finding] = []
        self.seen = Seen()
        self.names = {id(p): name for name, p in training.model.named_parameters()}
        self.engines = self._engines()
        self.was_attached = bool(self.engines)
        self._own = ExitStack()
        self.unheard = [
            o for o in training.optimizers if not any(map(tells_of_steps, innermost(o)))
        ]
        if not self.engines and not (self.unheard and at == "step"):
            try:
                self._own.enter_context(attach())
            except (DoubleDecayError, LearningRateError, UnsupportedOptimizerError) as error:
                self.findings.append(raised(error))
            self.engines = self._engines()
        settings = [(e.settings.mode, e.settings.at) for e in self.engines] or [(mode, at)]
        self.decoupled = any(mode != "coupled" for mode, _ in settings)
        self.at_step = any(at == "step" for _, at in settings)
        self.governed = {key for engine in self.engines for key in engine.governed()}

    def _engines(self) -> list[Engine]:
        return [
            engine for engine in attached() if not self.names.keys().isdisjoint(engine.governed())
        ]

    def run(self) -> None:
        """Look, train a step, look again; nothing stays attached that was not before."""
        with self._own:
            self._look()
        order = {severity: i for i, severity in enumerate(SEVERITIES)}
        self.findings.sort(key=lambda finding: order[finding.severity])

    def _look(self) -> None:
        owned = owned_ids([*self.training.optimizers, *self._innermost()])
        self._look_at_own_decay()
        self._look_at_owners()
        unowned = [p for p in self._trained() if id(p) not in owned]
        before = [p.detach().clone() for p in unowned]
        with _without_own_decay(self.training.optimizers):
            self._train()
        moved = {id(p) for p, old in zip(unowned, before, strict=True) if not torch.equal(p, old)}
        self._look_at_unowned([p for p in unowned if id(p) not in moved])
        self._look_at_strangers(bool(moved))
        self._look_at_steps()
        self._look_at_gradients()
        self._look_at_support()

    # ------------------------------------------------------------------ before

    def _look_at_own_decay(self) -> None:
        groups = [
            group
            for o in self.training.optimizers
            for group in o.param_groups
            if decays_itself(group)
        ]
        decaying = {id(p) for group in groups for p in group["params"]}
        for engine in self.engines:
            for optimizer in self.training.optimizers:
                try:
                    check_own_decay(optimizer, engine.view(optimizer))
                except DoubleDecayError as error:
                    mine = decaying & owned_ids([optimizer]) & engine.governed().keys()
                    self._add(raised(error, "error", self._named(mine)))
        exempt = self._named(decaying - self.governed)
        if exempt and self.engines:
            λs = sorted({float(group["weight_decay"]) for group in groups})
            roles = {
                str(d.role)
                for engine in self.engines
                for d in engine.plan.values()
                if d.name in set(exempt)
            }
            self._warn(
                "exempt-decayed",
                "The optimizer decays parameters that the plan exempts.",
                "Construct the optimizer with weight_decay=0: wdhook decays the weights",
                exempt,
                {
                    "roles": ", ".join(sorted(roles)),
                    "the optimizer's weight_decay": ", ".join(f"{λ:g}" for λ in λs),
                },
            )

    def _look_at_owners(self) -> None:
        inside = {id(inner) for o in self.training.optimizers for inner in inner_optimizers(o)}
        owners: dict[int, list[str]] = {}
        for optimizer in self.training.optimizers:
            for key in owned_ids([optimizer]) if id(optimizer) not in inside else ():
                owners.setdefault(key, []).append(type(optimizer).__name__)
        shared = self._named(key for key, kinds in owners.items() if len(kinds) > 1)
        if shared:
            self._warn(
                "two-optimizers",
                "More than one optimizer owns a parameter: each step of each of them moves it.",
                "Give each parameter to one optimizer",
                shared,
            )

    # ------------------------------------------------------------------ the step

    def _train(self) -> None:
        with (
            watched(self.training.model) as self.seen,
            _recorded() as messages,
            users_code("the training step"),
        ):
            try:
                run_step(self.training, self.seen)
            except WdhookError as error:
                self._add(raised(error))
                # The same without the decay: what gets a gradient does not depend on it.
                with ExitStack() as stack:
                    for engine in self.engines:
                        stack.enter_context(engine.paused())
                    run_step(self.training, self.seen)
        self._look_at_roundings(messages)

    def _look_at_roundings(self, warned: list[str]) -> None:
        """Decay below the precision of the parameters; and what the engine has warned of besides."""
        names, messages = [], []
        for engine in self.engines:
            for optimizer in self.training.optimizers:
                for bucket, message in roundings(engine, optimizer, engine.view(optimizer)):
                    names += [entry.name for _, entry in bucket]
                    messages.append(message)
        if messages:
            self._add(told(messages[0], "warning", "rounds-away", names))
        for message in warned:
            if message not in messages:
                self._add(told(message, "warning", "warned"))

    # ------------------------------------------------------------------ after

    def _look_at_unowned(self, params: Iterable[Tensor]) -> None:
        names = self._named(map(id, params))
        if names:
            self._warn(
                "no-optimizer",
                "Parameters that require a gradient are in no optimizer: they are not trained, and not decayed.",
                "Give them to the optimizer, or freeze them: parameter.requires_grad_(False)",
                names,
            )

    def _look_at_strangers(self, moved: bool) -> None:
        """Tensors in the groups that are not of the model; `moved`: parameters that no optimizer owns have changed."""
        strangers = [
            (f"{type(o).__name__}.param_groups[{i}]['params'][{j}]", p)
            for o in self._innermost()
            for i, group in enumerate(o.param_groups)
            for j, p in enumerate(group["params"])
            if id(p) not in self.names
        ]
        if any(finding.kind == "master-weights" for finding in self.findings):
            return
        if moved or any(self._is_master(o) for o in self._innermost()):
            severity = "error" if self.decoupled else "note"
            self._add(
                Finding(
                    severity,
                    "master-weights",
                    "The optimizer keeps master weights: copies that it steps, and writes back over the parameters.",
                    'Use mode="coupled" with at="backward", whose decay travels in the gradient',
                )
            )
        elif strangers:
            shapes = {
                "tensors": f"{len(strangers)}, first {strangers[0][0]} {tuple(strangers[0][1].shape)}"
            }
            self._warn(
                "not-of-the-model",
                "The optimizer owns tensors that are no parameters of the model.",
                "Build the optimizer after the last change to the model; return what holds the others as one module",
                [],
                shapes,
            )

    def _is_master(self, optimizer: Any) -> bool:
        """Whether the optimizer keeps a copy of a parameter in a wider dtype."""
        state: Mapping[Any, Any] = getattr(optimizer, "state", {})
        low = [
            p for p in self._trained() if p in state and p.dtype in (torch.float16, torch.bfloat16)
        ]
        kept = ((p, value) for p in low for value in state[p].values() if isinstance(value, Tensor))
        return any(value.dtype == torch.float32 and is_copy(value, p) for p, value in kept)

    def _look_at_steps(self) -> None:
        for optimizer in self.training.optimizers:
            if self.seen.heard(optimizer):
                continue
            hidden = any(optimizer is o for o in self.unheard)
            why = (
                "its class has no step that torch.optim announces"
                if hidden
                else "none came in the training step"
            )
            self._add(
                Finding(
                    "error" if self.at_step else "note" if hidden else "warning",
                    "unheard-steps",
                    "No step of the optimizer was heard: decay at the step never happens.",
                    'Use at="backward" in coupled mode, or step the optimizer in step()',
                    {"optimizer": type(optimizer).__name__, "why": why},
                )
            )

    def _look_at_gradients(self) -> None:
        names = self._named(id(p) for p in self._trained() if id(p) not in self.seen.with_gradient)
        if names:
            self._warn(
                "no-gradient",
                "Parameters that require a gradient never got one: they are not trained, and not decayed.",
                "Use them in the forward pass, or freeze them: parameter.requires_grad_(False)",
                names,
            )

    def _look_at_support(self) -> None:
        """Whether decay by the learning rate would be possible with these optimizers."""
        severity = "error" if self.decoupled else "note"
        given = self.engines[0].settings.lr if self.engines else None
        for optimizer in self._innermost():
            try:
                check_supports_decoupled(optimizer)
                for group in optimizer.param_groups:
                    learning_rate(group, given)
            except (LearningRateError, UnsupportedOptimizerError) as error:
                self._add(raised(error, severity))

    # ------------------------------------------------------------------ pieces

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.training.model.parameters() if p.requires_grad and not is_lazy(p)]

    def _innermost(self) -> list[Any]:
        return [inner for optimizer in self.training.optimizers for inner in innermost(optimizer)]

    def _named(self, keys: Iterable[int]) -> list[str]:
        wanted: Collection[int] = set(keys)
        return [name for key, name in self.names.items() if key in wanted]

    def _add(self, finding: Finding) -> None:
        if not any(replace(known, severity=finding.severity) == finding for known in self.findings):
            self.findings.append(finding)

    def _warn(
        self,
        kind: str,
        what: str,
        do: str,
        parameters: list[str],
        facts: dict[str, str] | None = None,
    ) -> None:
        self._add(Finding("warning", kind, what, do, facts or {}, parameters))


@contextmanager
def _without_own_decay(optimizers: Iterable[Any]) -> Iterator[None]:
    """The optimizers with ``weight_decay`` 0: what they decay is known by now, and would end the step."""
    groups = [
        group
        for o in optimizers
        for inner in innermost(o)
        for group in inner.param_groups
        if decays_itself(group)
    ]
    before = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["weight_decay"] = value


@contextmanager
def _recorded() -> Iterator[list[str]]:
    """The warnings of wdhook, as text; those of others are shown as ever."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WdhookWarning)
        try:
            yield messages
        finally:
            messages += [str(w.message) for w in caught if issubclass(w.category, WdhookWarning)]
            others = [w for w in caught if not issubclass(w.category, WdhookWarning)]
    for w in others:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
