"""A problem as data, for errors, warnings and the findings of the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import indent


@dataclass(frozen=True)
class Problem:
    """A broken rule, the facts, and the call that mends the training.

    Attributes:
        what: the broken rule, in a sentence or two.
        facts: labels and values, in the order of the message.
        fix: the call or the change that mends the training; code on lines of its own is indented.
        parameters: names of the parameters concerned.
    """

    what: str
    fix: str
    facts: Mapping[str, object] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        facts = [f"  {label}: {value}" for label, value in self.facts.items()]
        return "\n".join([self.what, *facts, indent(self.fix, "  ")])
