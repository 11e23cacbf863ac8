"""Notices steps that torch's hooks do not announce: parameters that move between two backward
passes.

Looks only until the first step is announced, as it begins. Gradient accumulation moves no
parameter, a loop without torch.optim does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .._base.torch_private import version
from . import tensors
from .rules.base import Facts, Rules
from .state import State


class Named(Protocol):
    """What stands for a parameter: its entry, or a sentinel."""

    name: str


class Unannounced:
    """Compares one parameter before a backward pass with its values after the one before."""

    def __init__(self, state: State, rules: Rules) -> None:
        self._state = state
        self._rules = rules
        # Weak: an entry that outlives its parameter would be taken for one of a tensor with its id.
        self._asked: Callable[[], Named | None] = _nobody  # the first of the pass that runs
        self._who: Callable[[], Named | None] = _nobody
        self._head: Tensor | None = None
        self._version = 0
        self._moves = 0

    def look(self, who: Named, param: Tensor) -> None:
        """Close every window if the parameter has moved since it was remembered."""
        self._asked = weakref.ref(who)
        clock = getattr(who, "clock", None)
        if clock is not None and not clock.announced:
            return  # given, and known not to announce: its fresh gradients tell
        if self._state.announced or not self.has_moved(who, param):
            return
        self._moves += 1
        self._state.rate.close_windows()
        # The first may be a weight loaded after a trial, or the first half of SAM.
        if self._moves > 1:
            self._rules.tell("unannounced-steps", Facts(self._state, who=who.name))

    def has_moved(self, who: Named, param: Tensor) -> bool:
        """The parameter has changed since it was remembered."""
        if who is not self._who() or self._head is None:
            return False
        return version(param) != self._version or not torch.equal(_head(param), self._head)

    def forget(self) -> None:
        """Forget the parameter, whose entry is to die with it."""
        self._asked = self._who = _nobody
        self._head = None

    def remember(self, who: Named, param: Tensor) -> None:
        """Keep some values of a parameter, as they are when wdhook is done with it in a pass."""
        if self._state.announced:
            self.forget()
        if who is not self._asked():
            return
        self._who = self._asked
        self._version = version(param)
        self._head = _head(param).clone()


def _nobody() -> None:
    return None


def _head(param: Tensor) -> Tensor:
    return tensors.local(param).flatten()[:_ELEMENTS]


_ELEMENTS = 64  # to compare: enough to see a step, cheap for any parameter
