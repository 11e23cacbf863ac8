"""Findings of the doctor: problems of the engine and of the doctor itself, with a severity."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .._base.errors import WdhookError
from .._base.problem import Problem

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One problem of a training, with its severity.

    Attributes:
        severity: ``error``: wdhook stops there, or the decay would be wrong; ``warning``: probably
            a mistake; ``note``: worth knowing before a change.
        kind: one of a fixed list of words, for programs.
        problem: the sentences, the facts, the way out and the parameters.
        rule: id of the engine's rule in docs/limits.md; empty for what the doctor alone looks at.
    """

    severity: str
    kind: str
    problem: Problem
    rule: str = ""

    @property
    def what(self) -> str:
        """The broken rule."""
        return self.problem.what

    @property
    def do(self) -> str:
        """The call or the change that mends the training."""
        return self.problem.fix

    @property
    def facts(self) -> dict[str, str]:
        """Labels and values. The parameters have a place of their own."""
        facts = {label: str(value) for label, value in self.problem.facts.items()}
        if self.problem.parameters:
            facts.pop("parameter", None)
        return facts

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters concerned, in the order of the model."""
        return list(self.problem.parameters)

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON."""
        return {
            "severity": self.severity,
            "kind": self.kind,
            "rule": self.rule,
            "what": self.what,
            "do": self.do,
            "facts": self.facts,
            "parameters": self.parameters,
        }


def raised(error: WdhookError, severity: str = "error") -> Finding:
    """The finding of an error of wdhook."""
    problem = error.problem or Problem(str(error), "")
    return Finding(severity, kind_of(type(error)), problem, error.rule)


def kind_of(error: type[WdhookError]) -> str:
    """The kind of an error class: "double-decay" for DoubleDecayError."""
    words = re.sub(r"(?<!^)(?=[A-Z])", "-", error.__name__.removesuffix("Error"))
    return words.lower()


def joined(problems: Iterable[Problem]) -> list[Problem]:
    """One problem for each sentence, with the parameters of all and the facts of the first."""
    first: dict[str, Problem] = {}
    names: dict[str, list[str]] = {}
    for problem in problems:
        first.setdefault(problem.what, problem)
        names.setdefault(problem.what, []).extend(problem.parameters)
    result = []
    for what, problem in first.items():
        unique = tuple(dict.fromkeys(names[what]))
        result.append(Problem(what, problem.fix, problem.facts, unique))
    return result
