"""What an audit found of one parameter, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .._roles.vocabulary import Role
from .operations import Use


@dataclass(frozen=True, slots=True)
class Finding:
    """What a forward and a backward pass did with one parameter.

    Attributes:
        name: full name in the model, as `named_parameters` gives it.
        shape: of the parameter.
        numel: number of elements.
        use: what the first operation that mixes it with something else does with it: ``"contraction"``,
            ``"lookup"``, ``"norm"``, ``"multiplication"``, ``"addition"``, ``"token"``, ``"slope"``,
            ``"constant"``, ``"other"``, ``"opaque"`` or ``"unused"``.
        operations: each different use with its operation and the argument it is: ``("addmm[mat2]",)``.
        role: as the use has it; the static one where the use says nothing.
        static_role: what type, name and shape say, as in `plan`.
        decayed: whether `plan` decays it.
        reason: why `plan` does or does not.
        agrees: False where the use contradicts that; None where the use says nothing, where several uses
            contradict one another, and where somebody has marked the parameter, which outranks the use.
        trainable: whether it requires a gradient.
        sensitivity: √n·abs⟨w, g⟩/(‖w‖·‖g‖), of the order of 1 where the scale of the parameter matters and 0 where
            it does not; None without a gradient.
        invariant: whether the outputs are the same for α·w, all α > 0; None where that cannot be told.
        rows: (how many output channels are invariant one by one, of how many that have a gradient); None where
            there are none.
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
        """What weight decay on this parameter acts on, in words; empty where the audit cannot tell."""
        rows, live = self.rows or (0, 0)
        if self.invariant is None:
            return ""
        if self.invariant:
            return "step size, row by row" if rows and rows == live else "step size"
        return f"function; step size in {rows} of {live} rows" if rows else "function"
