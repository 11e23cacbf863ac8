"""Weight decay taken out of the optimizer: exactly once per step, on weights and nothing else.

>>> import torch, wdhook
>>> model = torch.nn.Linear(3, 2)
>>> decay = wdhook.attach(model, 1e-4)  # then train with any optimizer that has weight_decay=0
>>> decay.remove()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import schedules
from ._attach import adopt, attach
from ._decisions import Decision, Plan, PlanDiff
from ._errors import (
    AlreadyAttachedError,
    ArgumentError,
    DoubleDecayError,
    LearningRateError,
    LossScaleError,
    MasterWeightsError,
    NoGradientError,
    NothingToDecayError,
    SelectorError,
    UnreachedError,
    UnsupportedOptimizerError,
    WdhookError,
    WdhookWarning,
)
from ._handle import WeightDecay
from ._oneshot import apply_weight_decay, l2_penalty
from ._plan import param_groups, plan
from ._roles import Role
from ._snapshot import Snapshot

if TYPE_CHECKING:
    from ._audit import audit
    from ._findings import Audit, Finding

__version__ = "0.1.0"

__all__ = [
    "AlreadyAttachedError",
    "ArgumentError",
    "Audit",
    "Decision",
    "DoubleDecayError",
    "Finding",
    "LearningRateError",
    "LossScaleError",
    "MasterWeightsError",
    "NoGradientError",
    "NothingToDecayError",
    "Plan",
    "PlanDiff",
    "Role",
    "SelectorError",
    "Snapshot",
    "UnreachedError",
    "UnsupportedOptimizerError",
    "WdhookError",
    "WdhookWarning",
    "WeightDecay",
    "__version__",
    "adopt",
    "apply_weight_decay",
    "attach",
    "audit",
    "l2_penalty",
    "param_groups",
    "plan",
    "schedules",
]


def __getattr__(name: str) -> Any:
    """What few need is imported when it is asked for: it would be a third of the time of the import."""
    if name in ("audit", "Audit", "Finding"):
        from . import _audit, _findings

        globals().update(audit=_audit.audit, Audit=_findings.Audit, Finding=_findings.Finding)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
