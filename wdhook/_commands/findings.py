"""A finding: what the doctor says, in the words of the engine's errors and warnings where it has some."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .._base.errors import WdhookError

SEVERITIES = ("error", "warning", "note")


@dataclass
class Finding:
    """One thing that was found.

    Attributes:
        severity: ``error``: wdhook stops there, or the decay would be wrong; ``warning``: probably not what is
            wanted; ``note``: what to know before something is changed.
        kind: one of a fixed list of words, for programs.
        what: one sentence.
        do: what mends it.
        facts: labels and what they are here.
        parameters: names, in the order of the model.
    """

    severity: str
    kind: str
    what: str
    do: str
    facts: dict[str, str] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON."""
        return asdict(self)


def told(message: str, severity: str, kind: str, parameters: Iterable[str] = ()) -> Finding:
    """A finding in the words of an error or a warning of wdhook: the rule, labelled facts, what mends it."""
    what, *lines = message.split("\n")
    labelled = (line.partition(":") for line in lines[:-1])
    facts = {label.strip(): fact.strip() for label, colon, fact in labelled if colon}
    named = facts.pop("parameter", "").split(" ")[0]
    names = list(parameters) or [named][: len(named)]
    return Finding(severity, kind, what, lines[-1].strip() if lines else "", facts, names)


def raised(error: WdhookError, severity: str = "error", parameters: Iterable[str] = ()) -> Finding:
    """A finding in the words of an error."""
    # DoubleDecayError is of the kind "double-decay".
    kind = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__.removesuffix("Error")).lower()
    return told(str(error), severity, kind, parameters)
