"""What runs now, read off the call stack: nested steps, a GradScaler, a checkpoint that makes a
state.

A step that raised leaves no word behind, a scaler leaves no trace on an optimizer that it has
un-scaled, and
torch.distributed.checkpoint steps optimizers to make their state. The call stack is the only
witness.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch

from .._base.torch_private import OPTIMIZER_FILE, STATE_MAKERS


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


def _callers() -> Iterator[tuple[CodeType, FrameType]]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_code, frame
        frame = frame.f_back
