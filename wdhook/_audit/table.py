"""An audit as text and as HTML: contradictions first, then in the order of the model."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Protocol

from .._base.markup import html_paragraph, html_table
from .._base.terminal import paragraph, table
from .._base.text import Row, fold_by
from .finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEAD: Row = ("parameter", "shape", "used as", "role", "decayed", "decay acts on")
_NOTABLE_SHARE = 1e-3  # of eps


class Audited(Protocol):
    """The parts of an `Audit` that a table shows."""

    dtype: str
    threshold: float | None
    eps_share: float
    training: bool
    stopped: tuple[str, ...]

    def __len__(self) -> int: ...

    def values(self) -> Iterable[Finding]:
        """The findings in the order of the model."""

    @property
    def contradictions(self) -> list[Finding]:
        """The findings whose use contradicts the plan."""

    @property
    def undecided(self) -> list[Finding]:
        """The findings whose use decides nothing."""

    @property
    def overrides(self) -> dict[str, float | bool]:
        """Selectors that make a plan follow the uses."""


def audit_table(audit: Audited) -> str:
    """Return the audit as text: headlines, the table, and the overrides to paste."""
    head = [line for text in headlines(audit) for line in paragraph(text)]
    return "\n".join([*head, "", *table(audit_rows(audit)), *advice(audit)])


def audit_html(audit: Audited) -> str:
    """Return the audit as HTML, for notebooks."""
    lines = [*map(html_paragraph, headlines(audit)), html_table(audit_rows(audit))]
    pasted = "\n".join(advice(audit)[1:])
    if pasted:
        lines.append(f"<pre>{escape(pasted)}</pre>")
    return "\n".join(lines)


def headlines(audit: Audited) -> list[str]:
    """Return the audit in two to four lines."""
    mode = "training" if audit.training else "evaluation"
    against, undecided = len(audit.contradictions), len(audit.undecided)
    verb = "contradicts" if against == 1 else "contradict"
    lines = [
        f"audit of {_tensors(len(audit))} in {mode} mode: "
        f"{against} {verb} the plan; {undecided} undecided",
        _scale_line(audit),
    ]
    if audit.eps_share >= _NOTABLE_SHARE:
        lines.append(
            f"a normalization's eps makes scale invariance approximate ({audit.eps_share:.1%})"
        )
    if audit.stopped:
        lines.append(
            f"outputs and gradients disagree for {_tensors(len(audit.stopped))}: "
            "a stop-gradient or a straight-through estimator"
        )
    return lines


def audit_rows(audit: Audited) -> list[Row]:
    """Return the heading and the rows; findings that differ in the numbers of names share one."""
    ordered = sorted(audit.values(), key=lambda finding: finding.agrees is not False)
    folded = fold_by(ordered, _cells)
    return [_HEAD, *((label, *_cells(finding)) for label, finding in folded)]


def advice(audit: Audited) -> list[str]:
    """Return the overrides that follow the uses, to be pasted; nothing without contradictions."""
    overrides = audit.overrides
    if not overrides:
        return []
    lines = [f"    {selector!r}: {λ!r}," for selector, λ in overrides.items()]
    return ["", "to follow the uses:", "overrides={", *lines, "}"]


def _scale_line(audit: Audited) -> str:
    if audit.threshold is None:
        return "scale invariance: not measured, no output with a gradient and a value"
    free = [finding for finding in audit.values() if finding.invariant and finding.should_decay]
    elements = sum(finding.numel for finding in free)
    return (
        f"scale invariance in {audit.dtype}: decay acts on the step size alone in "
        f"{len(free)} decayed {'tensor' if len(free) == 1 else 'tensors'}, {elements:,} elements"
    )


def _tensors(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"


def _cells(finding: Finding) -> Row:
    shape = "×".join(map(str, finding.shape)) or "scalar"
    return shape, _use(finding), _role(finding), _decayed(finding), _acts_on(finding)


def _use(finding: Finding) -> str:
    if not finding.operations:
        return str(finding.use)
    return f"{finding.use}: {', '.join(finding.operations)}"


def _role(finding: Finding) -> str:
    if finding.role is finding.static_role:
        return str(finding.role)
    return f"{finding.role}, planned as {finding.static_role}"


def _decayed(finding: Finding) -> str:
    said = "yes" if finding.decayed else "no"
    return f"{said}, wrong" if finding.agrees is False else said


def _acts_on(finding: Finding) -> str:
    if not finding.should_decay:
        return "-"
    if not finding.trainable:
        return "frozen"
    return finding.acts_on or finding.doubt
