"""All findings of an audit as data: `Audit`, a mapping from parameter name to `Finding`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from .._roles.marks import bare_name
from .._roles.vocabulary import Role
from .finding import Finding
from .operations import Use
from .table import audit_html, audit_table

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Audit(Mapping[str, Finding]):
    """An ordered, immutable mapping from parameter name to `Finding`; ``print`` it for the table.

    Notebooks show it as a table too.

    Attributes:
        dtype: of the arithmetic of the audit, such as ``"float64"``.
        threshold: the sensitivity up to which a parameter counts as invariant; see
            docs/audit.md. None on the meta device, and where no floating output depends on a
            parameter.
        eps_share: how far the eps of the normalizations breaks the invariance: the root mean
            square of ε/(σ² + ε), of the normalization with the most. The audit itself runs
            without eps.
        training: whether the model was in training mode.
        stopped: names of the parameters behind a stop-gradient or a straight-through estimator,
            where gradients are not those of the outputs; empty where they agree.
    """

    def __init__(
        self,
        findings: Mapping[str, Finding],
        *,
        dtype: str,
        threshold: float | None,
        eps_share: float,
        training: bool,
        stopped: tuple[str, ...] = (),
    ) -> None:
        self._findings = dict(findings)
        self.dtype = dtype
        self.threshold = threshold
        self.eps_share = eps_share
        self.training = training
        self.stopped = stopped
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
    def undecided(self) -> list[Finding]:
        """The findings whose use neither supports nor contradicts the plan."""
        return [finding for finding in self.values() if finding.agrees is None]

    @property
    def overrides(self) -> dict[str, float | bool]:
        """Selectors that make `plan` follow the uses, for its `overrides`.

        A selector is a glob where several names can share one without matching any other name.
        """
        groups: dict[tuple[str, bool], list[str]] = {}
        for finding in self.contradictions:
            pattern = _NUMBER.sub("*", escape(finding.name))
            groups.setdefault((pattern, finding.should_decay), []).append(finding.name)
        found: dict[str, float | bool] = {}
        for (pattern, decay), names in groups.items():
            for selector in self._selectors(pattern, names):
                found[selector] = True if decay else 0.0
        return found

    def _selectors(self, pattern: str, names: list[str]) -> list[str]:
        matched = {name for name in self if fnmatchcase(name, pattern)}
        if len(names) > 1 and matched == set(names):
            return [pattern]
        return [escape(name) for name in names]

    # ------------------------------------------------------------------------------- for a plan

    def saw(self, name: str) -> bool:
        """Tell whether the audited model has a parameter of this name, wrappers aside."""
        return bare_name(name) in self._bare

    def is_of(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Tell whether the audit is of a model with these parameters.

        The names of one must be among those of the other (a model may have grown or lost a head
        since), and every name that both have must have one shape.

        Args:
            shapes: parameter name → shape, as of ``model.named_parameters()``.
        """
        return not self.differences(shapes)

    def differences(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return descriptions of how the audited model differs from a model with these parameters.

        Empty where the audit is of that model, see `is_of`.
        """
        others = {bare_name(name): tuple(shape) for name, shape in shapes.items()}
        shared = [name for name in self._bare if name in others]
        found = []
        for name in shared:
            own = self._bare[name].shape
            if own != others[name]:
                found.append(f"{name}: {own} in the audit, {others[name]} in the model")
        if len(shared) < min(len(self._bare), len(others)):
            lost = next(name for name in self._bare if name not in others)
            new = next(name for name in others if name not in self._bare)
            found.append(f"the audit has {lost}, the model has {new}")
        return found

    def traced_role(self, name: str) -> tuple[Role, str] | None:
        """Return the traced role of a parameter and the operation; None if undecided."""
        finding = self._bare.get(bare_name(name))
        if finding is None or finding.agrees is None:
            return None
        return finding.role, finding.operations[0]

    # ------------------------------------------------------------------------------- as data and
    # text

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain data that ``json.dumps`` takes.

        Returns:
            the keys ``dtype``, ``threshold``, ``eps_share``, ``training``, ``stopped``,
            ``overrides`` and ``parameters``: a list of dicts with the attributes of `Finding`.
        """
        return {
            "dtype": self.dtype,
            "threshold": self.threshold,
            "eps_share": self.eps_share,
            "training": self.training,
            "stopped": list(self.stopped),
            "overrides": self.overrides,
            "parameters": [_plain(finding) for finding in self.values()],
        }

    def __str__(self) -> str:
        return audit_table(self)

    def _repr_html_(self) -> str:
        return audit_html(self)

    def __repr__(self) -> str:
        invariant = sum(1 for finding in self.values() if finding.invariant)
        against = len(self.contradictions)
        verb = "contradicts" if against == 1 else "contradict"
        return f"Audit({len(self)} tensors, {against} {verb} the plan, {invariant} invariant)"


def _plain(finding: Finding) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in asdict(finding).items():
        if isinstance(value, (Use, Role)):
            data[key] = str(value)
        elif isinstance(value, tuple):
            data[key] = list(value)
        else:
            data[key] = value
    return data
