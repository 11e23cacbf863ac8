"""All findings of an audit, as data (`Audit`) and as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from .._base.text import Row, aligned, fold_by
from .._roles.marks import bare_name
from .._roles.vocabulary import Role
from .finding import Finding
from .operations import Use

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


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
    data = {
        key: str(value) if isinstance(value, (Use, Role)) else value
        for key, value in asdict(finding).items()
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


def audit_table(audit: Audit) -> str:
    """Contradictions first, then the parameters in the order of the model, and what to paste."""
    return "\n".join([*headlines(audit), "", *aligned(audit_rows(audit)), *advice(audit)])


def headlines(audit: Audit) -> list[str]:
    """The audit in two or three lines."""
    findings = list(audit.values())
    against = len(audit.contradictions)
    silent = sum(1 for f in findings if f.agrees is None)
    free = [f for f in findings if f.invariant and f.should_decay]
    mode = "training" if audit.training else "evaluation"
    said = (
        f"{against} contradict the plan, of {silent} the trace says nothing or a mark outranks it"
    )
    lines = [f"audit of {len(findings)} tensors in {mode} mode: {said}"]
    if audit.threshold is None:
        lines.append("scale invariance: not told, no output with a gradient and a value")
    else:
        lines.append(
            f"scale invariance in {audit.dtype}, up to {audit.threshold:.1e}: decay acts on the step size alone in "
            f"{len(free)} decayed tensors, {sum(f.numel for f in free):,} elements"
        )
    if audit.eps_share >= 1e-3:
        lines.append(
            f"the eps of a normalization takes part by {audit.eps_share:.1%}: so far the scale still matters"
        )
    return lines


def audit_rows(audit: Audit) -> list[Row]:
    """A heading, and a row for each run of findings that differ only in the numbers of their names."""
    ordered = sorted(audit.values(), key=lambda f: f.agrees is not False)
    rows: list[Row] = [("parameter", "shape", "used as", "role", "decayed", "decay acts on")]
    return [*rows, *((label, *_cells(f)) for label, f in fold_by(ordered, _cells))]


def advice(audit: Audit) -> list[str]:
    """The overrides that follow the uses, to be pasted; nothing where none contradicts the plan."""
    if not audit.overrides:
        return []
    return [
        "",
        "to follow the uses:",
        "overrides={",
        *(f"    {k!r}: {λ!r}," for k, λ in audit.overrides.items()),
        "}",
    ]


def _cells(f: Finding) -> Row:
    return "×".join(map(str, f.shape)) or "scalar", _use(f), _role(f), _decayed(f), _acts_on(f)


def _use(f: Finding) -> str:
    return f"{f.use}: {', '.join(f.operations)}" if f.operations else str(f.use)


def _role(f: Finding) -> str:
    return str(f.role) if f.role is f.static_role else f"{f.role}, planned as {f.static_role}"


def _decayed(f: Finding) -> str:
    said = "yes" if f.decayed else "no"
    return f"{said}, wrong" if f.agrees is False else said


def _acts_on(f: Finding) -> str:
    if not f.should_decay:
        return "-"
    if not f.trainable:
        return "frozen"
    return f.acts_on or "no gradient"
