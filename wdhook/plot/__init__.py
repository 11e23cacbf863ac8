"""Pictures of plans, audits and trainings, with matplotlib (``pip install matplotlib``).

Plans, audits and numbers come in, figures go out. Nothing else in the package imports this room.
"""

from __future__ import annotations

from .audit import audit
from .norms import norms
from .plan import plan

__all__ = ["audit", "norms", "plan"]
