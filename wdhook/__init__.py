"""Weight decay taken out of the optimizer: exactly once per step, on weights and nothing else.

>>> import torch, wdhook
>>> model = torch.nn.Linear(3, 2)
>>> decay = wdhook.attach(model, 1e-4)  # then train with any optimizer that has weight_decay=0
>>> decay.remove()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import schedules
from ._base.errors import (
    AlreadyAttachedError,
    AmbiguousGradientError,
    ArgumentError,
    DoubleDecayError,
    LearningRateError,
    LossScaleError,
    MasterWeightsError,
    NoGradientError,
    NothingToDecayError,
    SelectorError,
    TargetError,
    UndecayedError,
    UnsupportedOptimizerError,
    WdhookError,
    WdhookWarning,
)
from ._decay.attach import adopt, attach
from ._decay.check import Check
from ._decay.dose import Dose, DoseClass
from ._decay.functional import apply_weight_decay, l2_penalty
from ._decay.handle import WeightDecay
from ._decay.snapshot import Snapshot
from ._plan.anchor import Anchor
from ._plan.decide import param_groups, plan
from ._plan.decision import Decision
from ._plan.plan import Plan, PlanDiff
from ._roles.classifier import Role

if TYPE_CHECKING:
    from ._audit.finding import Finding
    from ._audit.report import Audit
    from ._audit.run import audit

__version__ = "0.1.0"

__all__ = [
    "AlreadyAttachedError",
    "AmbiguousGradientError",
    "Anchor",
    "ArgumentError",
    "Audit",
    "Check",
    "Decision",
    "Dose",
    "DoseClass",
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
    "TargetError",
    "UndecayedError",
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
    "plot",
    "schedules",
]


def __getattr__(name: str) -> Any:
    """Import on first use what few need: `audit` alone would be a third of the import time."""
    if name == "plot":
        return import_module(".plot", __name__)
    if name in ("audit", "Audit", "Finding"):
        from ._audit.finding import Finding
        from ._audit.report import Audit
        from ._audit.run import audit

        globals().update(audit=audit, Audit=Audit, Finding=Finding)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, and the attributes that every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
