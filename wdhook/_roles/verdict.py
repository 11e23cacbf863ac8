"""The answer of the classifier for one parameter: a role, the reason for it, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

from .vocabulary import Role

DECAYED_ROLES: frozenset[Role] = frozenset({Role.WEIGHT, Role.EMBEDDING})
"""The roles that are decayed unless an override or a mark says otherwise."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The role of one parameter and the evidence for it."""

    role: Role
    reason: str
    guess: bool = False
    weight_decay: float | None = None
    """An explicit mark: 0.0 exempts, another float is a λ of its own; None follows the role."""

    @property
    def marked(self) -> bool:
        """True where a person marked the role or the decay on purpose."""
        return self.weight_decay is not None or self.reason.startswith("marked ")

    @property
    def decayed(self) -> bool:
        """True where weight decay applies by default."""
        if self.weight_decay is not None:
            return self.weight_decay > 0
        return self.role in DECAYED_ROLES
