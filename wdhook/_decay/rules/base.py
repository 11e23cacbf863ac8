"""A rule: an id, an error or a warning, and a pure function from facts to problems."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..._base.errors import WdhookError, WdhookWarning
from ..._base.problem import Problem
from ..call_stack import Running, level_of_user
from ..entry import Entry
from ..ownership import View
from ..state import State


class Moment(enum.Enum):
    """Moments of a training, each with rules."""

    PLAN = "at `attach`, of the model"
    ATTACH = "at `attach`, of an optimizer"
    BACKWARD = "in the backward pass"
    STEP = "before the step changes anything"
    FOREIGN_STEP = "before the step of an optimizer that owns nothing of the model"
    STEP_END = "when the step has ended"
    SETTER = "when λ is set"


@dataclass(frozen=True)
class Facts:
    """The facts for one look of the rules. The moment decides about the optional facts.

    Attributes:
        state: of the handle.
        optimizer: of the step.
        view: its view.
        running: calls that run now.
        claimed: some handle decays parameters of the optimizer.
        entry: of the parameter concerned.
        who: name of the parameter, where there is no entry.
        suspects: parameters with a gradient and without decay after a step.
        value: the new λ.
    """

    state: State
    optimizer: Any = None
    view: View | None = None
    running: Running = field(default_factory=Running)
    claimed: bool = False
    entry: Entry | None = None
    who: str = ""
    suspects: Sequence[tuple[Tensor, Entry]] = ()
    value: float | None = None

    @property
    def owned(self) -> View:
        """The view, at a moment of a step."""
        assert self.view is not None
        return self.view

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer."""
        return type(self.optimizer).__name__

    @property
    def name(self) -> str:
        """Name of the parameter concerned."""
        return self.who if self.entry is None else self.entry.name


Looks = Callable[[Facts], Iterable[Problem]]


@dataclass(frozen=True)
class Rule:
    """A cause of a wrong decay, with the error or warning.

    Attributes:
        id: in errors, in docs/limits.md, and in the names of the tests.
        says: class of the error or warning; an error comes before anything is changed.
        moment: of the look.
        looks: a function of the facts without side effects; or a class of such functions, for a
            rule with a count of its own.
        situation: text for docs/limits.md.
        answer: likewise.
        applies: decides from the configuration of a handle.
        first_steps: looks at the first steps of an optimizer alone: its state is complete by then.
        on_change: looks only after a change of the optimizer's parameters.
        asked: looks only when the code that has met the situation asks for the rule by id.
    """

    id: str
    says: type[WdhookError] | type[WdhookWarning]
    moment: Moment
    looks: Looks | type[Any]
    situation: str
    answer: str
    applies: Callable[[State], bool] = lambda state: True
    first_steps: bool = False
    on_change: bool = False
    asked: bool = False

    @property
    def is_error(self) -> bool:
        """The rule raises."""
        return issubclass(self.says, WdhookError)


FIRST_STEPS = 3


class Rules:
    """The rules of a handle, with counts and warnings so far."""

    def __init__(self, table: Iterable[Rule], state: State) -> None:
        self._state = state
        self._warned: set[str] = set()
        self._looks: dict[str, tuple[Rule, Looks]] = {}
        self._of: dict[Moment, list[tuple[Rule, Looks]]] = {moment: [] for moment in Moment}
        for rule in table:
            looks: Looks = rule.looks() if isinstance(rule.looks, type) else rule.looks
            self._looks[rule.id] = rule, looks
            if rule.applies(state) and not rule.asked:
                self._of[rule.moment].append((rule, looks))

    def problems(self, moment: Moment, facts: Facts) -> Iterator[tuple[Rule, Problem]]:
        """Every broken rule of a moment, in the order of the table."""
        for rule, looks in self._of[moment]:
            if _is_due(rule, facts):
                for problem in looks(facts):
                    yield rule, problem

    def check(self, moment: Moment, facts: Facts) -> None:
        """Raise the first error of a moment, after earlier warnings; warn once for each rule."""
        for rule, problem in self.problems(moment, facts):
            self._say(rule, problem)

    def look(self, id: str, facts: Facts) -> list[Problem]:  # noqa: A002
        """The problems of a rule, at any moment and under any configuration."""
        _, looks = self._looks[id]
        return list(looks(facts))

    def tell(self, id: str, facts: Facts) -> None:  # noqa: A002
        """Raise or warn about a situation met by the caller, by the id of the rule."""
        rule, looks = self._looks[id]
        if id in self._warned or not rule.applies(self._state):
            return
        for problem in looks(facts):
            self._say(rule, problem)

    def _say(self, rule: Rule, problem: Problem) -> None:
        if issubclass(rule.says, WdhookError):
            raise rule.says(problem, rule.id)
        if rule.id not in self._warned:
            self._warned.add(rule.id)
            warnings.warn(rule.says(problem, rule.id), stacklevel=level_of_user())


def _is_due(rule: Rule, facts: Facts) -> bool:
    if rule.first_steps:
        return facts.owned.clock.steps < FIRST_STEPS
    return not rule.on_change or facts.owned.unchecked
