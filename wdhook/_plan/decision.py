"""The decision on one parameter, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._roles.vocabulary import Role
from .anchor import Anchor


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision on one parameter.

    Attributes:
        name: full name in the model, as `named_parameters` gives it.
        role: the job of the parameter, see docs/which-parameters.md.
        weight_decay: λ per optimizer step; 0.0 exempts.
        reason: why, in a few words.
        shape: of the parameter; empty while a lazy parameter is uninitialized.
        numel: number of elements, 0 while uninitialized.
        guess: True where only the shape or a weak name spoke for the role.
        follows: True where λ is the number given to `plan`, so that a schedule of λ moves it too;
            False for exempt parameters and where an override or a mark gave an absolute λ.
        trainable: whether the parameter required a gradient when the plan was made. A frozen
            parameter keeps its decision, and is decayed from the first step that trains it.
        aliases: further names of a tied parameter.
        toward: the value that decay draws the parameter to, a number or an `Anchor`.
    """

    name: str
    role: Role
    weight_decay: float
    reason: str
    shape: tuple[int, ...]
    numel: int
    guess: bool = False
    follows: bool = False
    trainable: bool = True
    aliases: tuple[str, ...] = ()
    toward: float | Anchor = 0.0

    @property
    def eligible(self) -> bool:
        """True where the parameter is decayed, now or later (a schedule may start at zero)."""
        return self.follows or self.weight_decay > 0

    @property
    def aim(self) -> float | str:
        """`toward` as plain data: a number, or an anchor in a word."""
        return self.toward if isinstance(self.toward, float) else str(self.toward)

    @property
    def target(self) -> str:
        """`toward` in a word."""
        return f"{self.aim:g}" if isinstance(self.aim, float) else self.aim

    @property
    def given(self) -> Tensor | None:
        """The values of `toward`, where it is an `Anchor` with a source; None where the source has
        none for the parameter."""
        if isinstance(self.toward, float):
            return None
        return self.toward.value((self.name, *self.aliases), self.shape)

    def to_dict(self) -> dict[str, Any]:
        """The decision as plain data that ``json.dumps`` takes, with the attributes as keys."""
        return {
            "name": self.name,
            "role": str(self.role),
            "weight_decay": self.weight_decay,
            "reason": self.reason,
            "shape": list(self.shape),
            "numel": self.numel,
            "guess": self.guess,
            "follows": self.follows,
            "trainable": self.trainable,
            "aliases": list(self.aliases),
            "toward": self.aim,
        }
