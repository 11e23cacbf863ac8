"""One look at a training: the engine's rules, asked before, in and after a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from .._base.errors import (
    DoubleDecayError,
    LearningRateError,
    UnsupportedOptimizerError,
    WdhookError,
    WdhookWarning,
)
from .._base.problem import Problem
from .._decay.check import Check, checked
from .._decay.engine import Engine
from .._decay.optimizers import (
    announces_steps,
    check_supports_decoupled,
    innermost,
    learning_rate,
    owned_ids,
)
from .._decay.rules.base import Facts, Rules
from .._decay.rules.table import RULES
from .._decay.step_listener import attached
from .._plan.plan import Plan
from . import looks
from .findings import SEVERITIES, Finding, joined, raised
from .targets import users_code
from .training import Seen, Training, run_step, watched


class Examination:
    """One look at a training. `findings` holds the result.

    Attributes:
        training: the model, its optimizers and the step.
        findings: errors first.
        seen: gradients and steps of the training step.
        names: of the model's parameters.
        engines: the handles that decay parameters of the model.
        was_attached: `make` has attached them.
        checks: what each of them says of its decay after the training step.
    """

    def __init__(
        self,
        training: Training,
        attach: Callable[[], Any],
        plan: Callable[[], Plan],
        mode: str | None,
        at: str,
    ) -> None:
        """Attach a handle where the user has attached none and the optimizers do not decay.

        Args:
            training: of the user.
            attach: attaches wdhook.
            plan: the plan by which `attach` decays.
            mode: of `attach`; None if the user has not named one.
            at: of `attach`.
        """
        self.training = training
        self.findings: list[Finding] = []
        self.seen = Seen()
        self.names = looks.Names(training.model)
        self.engines = self._engines()
        self.checks: list[Check] = []
        self.was_attached = bool(self.engines)
        self._own = ExitStack()
        self._unannounced = [o for o in training.optimizers if not _announces(o)]
        self._at_step = at == "step"
        self._decoupled = (mode or "coupled") != "coupled"
        if not self.was_attached:
            self._attach(attach, plan)
        if self.engines:
            configs = [engine.state.config for engine in self.engines]
            self._decoupled = any(not config.in_gradient for config in configs)
            self._at_step = any(not config.in_backward for config in configs)

    def _engines(self) -> list[Engine]:
        ids = self.names.ids()
        return [e for e in attached() if not ids.isdisjoint(e.state.parameters.governed())]

    def _attach(self, attach: Callable[[], Any], plan: Callable[[], Plan]) -> None:
        decided = plan()
        if looks.decays_by_groups(self.training.optimizers, decided, self.names):
            self._at_step = False
            self._add(looks.group_decay(self.training.optimizers, decided, self.names))
            return
        if self._unannounced and self._at_step:
            return  # `attach` refuses it; the look at steps says why
        try:
            self._own.enter_context(attach())
        except (DoubleDecayError, LearningRateError, UnsupportedOptimizerError) as error:
            self._add(raised(error))
        self.engines = self._engines()

    def run(self, then: Callable[[], None] = lambda: None) -> None:
        """Look, train a step, look again. A handle of the doctor's is removed at the end.

        Args:
            then: called before that.
        """
        with self._own:
            self._look()
            then()
        self.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))

    def _look(self) -> None:
        optimizers = self.training.optimizers
        self._look_at_own_decay()
        self._add_all(looks.two_owners(optimizers, self.names))
        owned = owned_ids([*optimizers, *looks.innermost_of(optimizers)])
        unowned = [p for p in looks.trained(self.training.model) if id(p) not in owned]
        before = [p.detach().clone() for p in unowned]
        with _without_own_decay(optimizers):
            self._train()
        self.checks = [checked(engine) for engine in self.engines]
        moved = set()
        for param, old in zip(unowned, before, strict=True):
            if not torch.equal(param, old):
                moved.add(id(param))
        self._look_at_roundings()
        self._add_all(looks.unowned(set(map(id, unowned)) - moved, self.names))
        self._look_at_strangers(bool(moved))
        self._look_at_steps()
        self._look_at_gradients()
        self._look_at_support()

    # ---------------------------------------------------------------- before

    def _look_at_own_decay(self) -> None:
        for problem in self._ask("own-decay"):
            self._add(Finding("error", "double-decay", problem, "own-decay"))
        governed: set[int] = set()
        for engine in self.engines:
            governed.update(engine.state.parameters.governed())
        plans = [engine.plan for engine in self.engines]
        self._add_all(looks.exempt_decayed(self.training.optimizers, plans, governed, self.names))

    def _ask(self, rule: str) -> list[Problem]:
        """The problems of one rule, for each handle and each optimizer."""
        found = []
        for engine in self.engines:
            rules = Rules(RULES, engine.state)  # what a rule counts in training stays as it is
            for optimizer in self.training.optimizers:
                facts = Facts(engine.state, optimizer, engine.view(optimizer))
                found += joined(rules.look(rule, facts))
        return found

    # ---------------------------------------------------------------- the step

    def _train(self) -> None:
        with watched(self.training.model) as self.seen, users_code("the training step"):
            try:
                with _recorded() as warned:
                    run_step(self.training, self.seen)
            except WdhookError as error:
                self._add(raised(error))
                self._train_without_decay()
        for message in warned:
            self._add_warning(message)

    def _train_without_decay(self) -> None:
        """Train the step again, for the gradients: decay has no part in them."""
        with ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.paused())
            with _recorded():  # of the repetition, which is the doctor's
                run_step(self.training, self.seen)

    def _add_warning(self, message: WdhookWarning) -> None:
        if message.rule == "rounds-away":
            return  # asked for below, with the names of all parameters
        problem = message.problem or Problem(str(message), "")
        if message.rule == "stepped-again" and self._has_two_owners(problem.parameters):
            return  # found before the step: the second owner steps what the first one has stepped
        if message.rule == "second-gradient" and not self.seen.steps:
            return  # the steps between the gradients were forgotten, and the look at steps says so
        if message.rule == "default-mode" and not self.was_attached:
            # `attach` was not told a mode because the doctor was not.
            self._add(Finding("note", "default-mode", problem, message.rule))
            return
        self._add(Finding("warning", "warned", problem, message.rule))

    def _has_two_owners(self, names: tuple[str, ...]) -> bool:
        shared: set[str] = set()
        for finding in self.findings:
            if finding.kind == "two-optimizers":
                shared.update(finding.parameters)
        return shared.issuperset(names)

    # ---------------------------------------------------------------- after

    def _look_at_roundings(self) -> None:
        problems = self._ask("rounds-away")
        if problems:
            names = [name for problem in problems for name in problem.parameters]
            problem = replace(problems[0], parameters=tuple(dict.fromkeys(names)))
            self._add(Finding("warning", "rounds-away", problem, "rounds-away"))

    def _look_at_strangers(self, moved: bool) -> None:
        """Look at foreign tensors in the param groups.

        Args:
            moved: parameters that no optimizer owns have changed.
        """
        if any(finding.kind == "master-weights" for finding in self.findings):
            return
        params = looks.trained(self.training.model)
        optimizers = looks.innermost_of(self.training.optimizers)
        if moved or any(looks.keeps_masters(o, params) for o in optimizers):
            self._add(looks.master_weights("error" if self._decoupled else "note"))
        else:
            self._add_all(looks.strangers(self.training.optimizers, self.names))

    def _look_at_steps(self) -> None:
        for optimizer in self.training.optimizers:
            if self.seen.heard(optimizer):
                continue
            facts: dict[str, object] = {"optimizer": type(optimizer).__name__}
            severity = "error" if self._at_step else "warning"
            if any(optimizer is other for other in self._unannounced):
                what = "torch announces no step of the optimizer: nothing is decayed at its step."
                facts["why"] = "it is no torch.optim.Optimizer, or its step() was replaced"
                fix = 'Use mode="coupled" with at="backward"'
                severity = "error" if self._at_step else "note"
            else:
                what = "The optimizer was not stepped: it trains nothing, and no step decays."
                facts["why"] = "none came in the training step"
                fix = (
                    "Call optimizer.step() in `step`; or return the loss alone, and the doctor "
                    "calls backward() and optimizer.step()"
                )
            self._add(Finding(severity, "unheard-steps", Problem(what, fix, facts)))

    def _look_at_gradients(self) -> None:
        params = looks.trained(self.training.model)
        missing = [id(p) for p in params if id(p) not in self.seen.with_gradient]
        self._add_all(looks.without_gradient(missing, self.names))

    def _look_at_support(self) -> None:
        """Ask whether decay by the learning rate is possible with these optimizers."""
        severity = "error" if self._decoupled else "note"
        given = self.engines[0].state.config.lr if self.engines else None
        for optimizer in looks.innermost_of(self.training.optimizers):
            try:
                check_supports_decoupled(optimizer)
                for group in optimizer.param_groups:
                    learning_rate(group, given)
            except (LearningRateError, UnsupportedOptimizerError) as error:
                self._add(raised(error, severity))

    # ---------------------------------------------------------------- pieces

    def _add_all(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._add(finding)

    def _add(self, finding: Finding) -> None:
        """Add a finding, unless an equal one of any severity is there."""
        for known in self.findings:
            if replace(known, severity=finding.severity, rule=finding.rule) == finding:
                return
        self.findings.append(finding)


def _announces(optimizer: Any) -> bool:
    return any(map(announces_steps, innermost(optimizer)))


@contextmanager
def _without_own_decay(optimizers: Iterable[Any]) -> Iterator[None]:
    """Set ``weight_decay`` to 0: the optimizers' decay is known by now, and would end the step."""
    groups = looks.decaying_groups(looks.innermost_of(optimizers))
    before = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["weight_decay"] = value


@contextmanager
def _recorded() -> Iterator[list[WdhookWarning]]:
    """Record the warnings of wdhook, and show all others as ever."""
    ours: list[WdhookWarning] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WdhookWarning)
        try:
            yield ours
        finally:
            ours += [w.message for w in caught if isinstance(w.message, WdhookWarning)]
    for w in caught:
        if not isinstance(w.message, WdhookWarning):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
