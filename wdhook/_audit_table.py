"""Audits as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._table import Row, aligned, fold_by

if TYPE_CHECKING:
    from ._findings import Audit, Finding


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
    said = f"{against} contradict the plan, of {silent} the trace says nothing or a mark outranks it"
    lines = [f"audit of {len(findings)} tensors in {mode} mode: {said}"]
    if audit.threshold is None:
        lines.append("scale invariance: not told, no output with a gradient and a value")
    else:
        lines.append(
            f"scale invariance in {audit.dtype}, up to {audit.threshold:.1e}: decay acts on the step size alone in "
            f"{len(free)} decayed tensors, {sum(f.numel for f in free):,} elements"
        )
    if audit.eps_share >= 1e-3:
        lines.append(f"the eps of a normalization takes part by {audit.eps_share:.1%}: so far the scale still matters")
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
    return ["", "to follow the uses:", "overrides={", *(f"    {k!r}: {λ!r}," for k, λ in audit.overrides.items()), "}"]


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
