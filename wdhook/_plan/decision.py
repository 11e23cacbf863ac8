"""The decision on one parameter, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .._roles.vocabulary import Role


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one parameter.

    Attributes:
        name: full name in the model, as `named_parameters` gives it.
        role: what the parameter is for.
        weight_decay: λ per optimizer step; 0.0 exempts.
        reason: why, in a few words.
        shape: of the parameter; empty while a lazy parameter is uninitialized.
        numel: number of elements, 0 while uninitialized.
        guess: True where only the shape or a weak name spoke for the role.
        follows: True where λ is the one given to `plan`, so that a schedule of λ moves it too; False
            for exempt parameters and where an override or a mark gave an absolute λ.
    """

    name: str
    role: Role
    weight_decay: float
    reason: str
    shape: tuple[int, ...]
    numel: int
    guess: bool = False
    follows: bool = False

    @property
    def eligible(self) -> bool:
        """Whether the parameter is decayed, now or later (a schedule may start at zero)."""
        return self.follows or self.weight_decay > 0
