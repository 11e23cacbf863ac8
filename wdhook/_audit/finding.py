"""The finding of an audit on one parameter, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .._roles.vocabulary import Role
from .operations import Use


@dataclass(frozen=True, slots=True)
class Finding:
    """The use and the scale of one parameter, as a forward and a backward pass showed them.

    Attributes:
        name: full name in the model, as `named_parameters` gives it.
        shape: of the parameter.
        numel: number of elements.
        use: the effect of the first operation that mixes the parameter with data:
            ``"contraction"``, ``"lookup"``, ``"norm"``, ``"multiplication"``, ``"addition"``,
            ``"token"``, ``"slope"``, ``"constant"``, ``"other"``, ``"opaque"`` or ``"unused"``.
        operations: each different use with its operation and the argument of it:
            ``("addmm[mat2]",)``.
        role: as the use has it; the static one where the use decides nothing.
        static_role: from type, name and shape, as in `plan`.
        decayed: whether `plan` decays it.
        reason: why `plan` does or does not.
        agrees: whether the use agrees with the plan. None (undecided) where the use says
            nothing, where several uses contradict one another, where the same operations could
            mean the planned use too, and where the parameter is marked, which outranks the use.
        trainable: whether it requires a gradient.
        sensitivity: √n·abs⟨w, g⟩/(‖w‖·‖g‖), of the order of 1 where the scale of the parameter
            matters and 0 where it does not; None where the outputs do not depend on the parameter.
        invariant: whether the outputs are the same for α·w, all α > 0; None without a verdict.
        rows: (number of output channels that are invariant one by one, number of those with a
            verdict); None where there are none.
        doubt: why `invariant` is None; empty where there is a verdict.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    use: Use
    operations: tuple[str, ...]
    role: Role
    static_role: Role
    decayed: bool
    reason: str
    agrees: bool | None
    trainable: bool
    sensitivity: float | None = None
    invariant: bool | None = None
    rows: tuple[int, int] | None = None
    doubt: str = ""

    @property
    def should_decay(self) -> bool:
        """Whether a parameter of this use is decayed by default."""
        return self.decayed if self.agrees is not False else not self.decayed

    @property
    def acts_on(self) -> str:
        """The effect of weight decay on this parameter, in words; empty without a verdict."""
        rows, live = self.rows or (0, 0)
        if self.invariant is None:
            return ""
        if self.invariant:
            return "step size, row by row" if rows and rows == live else "step size"
        return f"function; step size in {rows} of {live} rows" if rows else "function"
