"""Schedules of λ: functions of the number of finished optimizer steps, to be given to `attach` in place of a number.

Any callable that takes an int and returns a λ will do; these are the common ones. A run that is saved with
`WeightDecay.state_dict` goes on where it was.

>>> import torch, wdhook
>>> model = torch.nn.Linear(2, 1)
>>> decay = wdhook.attach(model, wdhook.schedules.linear(0.0, 0.1, steps=100))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> for _ in range(50):
...     model(torch.ones(1, 2)).sum().backward()
...     optimizer.step()
...     optimizer.zero_grad()
>>> decay.weight_decay
0.05
>>> decay.remove()
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ._base.errors import ArgumentError
from ._base.validate import check_factor

Schedule = Callable[[int], float]
"""Number of finished optimizer steps (0 for the first) → λ of the next step."""


def constant(weight_decay: float) -> Schedule:
    """The same λ at every step; for code that takes schedules only.

    Raises:
        ArgumentError: it is negative, not finite or not a number.
    """
    return _Line(check_factor(weight_decay), check_factor(weight_decay), 1)


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line from `start` to `end` within `steps` optimizer steps, then `end`. From 0.0: a warm-up.

    Raises:
        ArgumentError: a λ is negative, not finite or not a number; `steps` is no positive whole number.

    >>> import wdhook
    >>> [wdhook.schedules.linear(0.0, 0.4, steps=4)(step) for step in range(6)]
    [0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.4]
    """
    return _Line(check_factor(start, "start"), check_factor(end, "end"), _check_steps(steps))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from `start` to `end` within `steps` optimizer steps, then `end`.

    λ(t) = end + ½·(start − end)·(1 + cos(π·t/steps)): that of DINO (Caron et al. 2021, arXiv:2104.14294) and of DINOv2
    (`CosineScheduler`), which go from 0.04 to 0.4.

    Raises:
        ArgumentError: a λ is negative, not finite or not a number; `steps` is no positive whole number.

    >>> import wdhook
    >>> [round(wdhook.schedules.cosine(0.04, 0.4, steps=4)(step), 3) for step in range(6)]
    [0.04, 0.093, 0.22, 0.347, 0.4, 0.4]
    """
    return _Cosine(check_factor(start, "start"), check_factor(end, "end"), _check_steps(steps))


class _Course:
    """From `start` to `end` in `steps`, then `end`. A class and no closure, so that it can be pickled and printed."""

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start, self.end, self.steps = start, end, steps

    def __call__(self, step: int) -> float:
        return self.end if step >= self.steps else self._between(step / self.steps)

    def _between(self, part: float) -> float:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(start={self.start!r}, end={self.end!r}, steps={self.steps})"


class _Line(_Course):
    def _between(self, part: float) -> float:
        return self.start + (self.end - self.start) * part


class _Cosine(_Course):
    def _between(self, part: float) -> float:
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * part))


def _check_steps(steps: object) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(
            f"`steps` must be a whole number of optimizer steps, at least 1.\n  got: {steps!r}"
        )
    return steps
