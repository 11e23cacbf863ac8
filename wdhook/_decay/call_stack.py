"""What runs now, read off the call stack: nested steps, a GradScaler, a checkpoint that makes a
state.

A step that raised leaves no word behind, a scaler leaves no trace on an optimizer that it has
un-scaled, and torch.distributed.checkpoint steps optimizers to make their state. The call stack is
the only witness.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from .._base.torch_private import OPTIMIZER_FILE, STATE_MAKERS

# Folders whose lines are no place in a user's program.
_INSIDE = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
)


@dataclass(frozen=True, slots=True)
class Running:
    """Calls that run now.

    Attributes:
        steps: optimizer steps that run, one inside the other.
        scaler: the enabled GradScaler whose `step` runs.
        makes_state: torch.distributed.checkpoint steps, with a learning rate of 0, to make a state.
    """

    steps: int = 0
    scaler: Any | None = None
    makes_state: bool = False


def look() -> Running:
    """Read the call stack."""
    steps, scaler, makes_state = 0, None, False
    for code, frame in _callers():
        name = code.co_name
        if name == "wrapper":
            steps += code.co_filename == OPTIMIZER_FILE
        elif name == "step" and scaler is None and code is torch.amp.GradScaler.step.__code__:
            # Only now: a frame that was asked for its locals keeps them alive.
            scaler = frame.f_locals["self"]
        elif name in STATE_MAKERS:
            makes_state = True
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    return Running(steps, scaler, makes_state)


def level_of_user() -> int:
    """Return the ``stacklevel`` at which `warnings.warn`, called by the caller, names the first
    line outside of wdhook and torch; 1 where there is none, as in a thread of autograd."""
    for level, (code, _) in enumerate(_callers(), start=1):
        if not code.co_filename.startswith(_INSIDE):
            return level
    return 1


def _callers() -> Iterator[tuple[CodeType, FrameType]]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_code, frame
        frame = frame.f_back
