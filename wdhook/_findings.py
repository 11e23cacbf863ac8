"""What an audit found, as data: `Finding` and `Audit`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from ._audit_table import audit_table
from ._conventions import bare_name
from ._role_names import Role
from ._trace_ops import Use

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


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


class Audit(Mapping[str, Finding]):
    """An ordered, immutable mapping from parameter name to `Finding`; ``print`` it for the table.

    Attributes:
        dtype: of the arithmetic of the audit, such as ``"float64"``.
        threshold: the sensitivity up to which a parameter counts as invariant; see docs/audit.md. None on the meta
            device, and where no floating output depends on a parameter.
        eps_share: how far the eps of the normalizations breaks the invariance: the root mean square of
            ε/(σ² + ε), of the normalization with the most. The audit itself makes eps as small as it may.
        training: whether the model was in training mode.
    """

    def __init__(
        self,
        findings: Mapping[str, Finding],
        *,
        dtype: str,
        threshold: float | None,
        eps_share: float,
        training: bool,
    ) -> None:
        self._findings = dict(findings)
        self.dtype = dtype
        self.threshold = threshold
        self.eps_share = eps_share
        self.training = training
        self._bare = {bare_name(name): finding for name, finding in self._findings.items()}

    def __getitem__(self, name: str) -> Finding:
        return self._findings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._findings)

    def __len__(self) -> int:
        return len(self._findings)

    @property
    def contradictions(self) -> list[Finding]:
        """The findings whose use contradicts the plan."""
        return [finding for finding in self.values() if finding.agrees is False]

    @property
    def overrides(self) -> dict[str, float | bool]:
        """Selectors that make `plan` follow the uses, for its `overrides`: globs where several names allow it."""
        groups: dict[tuple[str, bool], list[str]] = {}
        for finding in self.contradictions:
            pattern = _NUMBER.sub("*", escape(finding.name))
            groups.setdefault((pattern, finding.should_decay), []).append(finding.name)
        found: dict[str, float | bool] = {}
        for (pattern, decay), names in groups.items():
            exact = set(names) == {name for name in self if fnmatchcase(name, pattern)}
            for selector in [pattern] if exact and len(names) > 1 else map(escape, names):
                found[selector] = True if decay else 0.0
        return found

    def saw(self, name: str) -> bool:
        """Whether the audited model has a parameter of that name, whatever wraps either model."""
        return bare_name(name) in self._bare

    def traced_role(self, name: str) -> tuple[Role, str] | None:
        """The role that a parameter was seen in, and by which operation; None where the trace says nothing."""
        finding = self._bare.get(bare_name(name))
        if finding is None or finding.agrees is None:
            return None
        return finding.role, finding.operations[0]

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain data that ``json.dumps`` takes.

        Returns:
            the keys ``dtype``, ``threshold``, ``eps_share``, ``training``, ``overrides`` and ``parameters``: a
            list of dicts with the attributes of `Finding`.
        """
        return {
            "dtype": self.dtype,
            "threshold": self.threshold,
            "eps_share": self.eps_share,
            "training": self.training,
            "overrides": self.overrides,
            "parameters": [_plain(finding) for finding in self.values()],
        }

    def __str__(self) -> str:
        return audit_table(self)

    def __repr__(self) -> str:
        invariant = sum(1 for finding in self.values() if finding.invariant)
        return f"Audit({len(self)} tensors, {len(self.contradictions)} contradict the plan, {invariant} invariant)"


def _plain(finding: Finding) -> dict[str, Any]:
    data = {key: str(value) if isinstance(value, (Use, Role)) else value for key, value in asdict(finding).items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
