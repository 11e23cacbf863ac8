"""Schedules of λ over a run, and helpers that choose a λ.

A schedule is a function of the number of finished optimizer steps; `attach` takes one in place of a
number. Any callable from an int to a λ will do; `constant`, `linear` and `cosine` are the common
ones. A resumed run (`WeightDecay.state_dict`) continues its schedule.

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

`half_life` and `timescale` turn a number of steps into a λ, `transfer` moves a λ to another batch
size, learning rate or length of training, and `dose` says how much a whole run will decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ._base.errors import ArgumentError
from ._base.validate import check_factor, is_number

Schedule = Callable[[int], float]
"""Number of finished optimizer steps (0 for the first) → λ of the next step."""

# -- schedules -------------------------------------------------------------------------------------


def constant(weight_decay: float) -> Schedule:
    """The same λ at every step; for code that takes schedules only.

    Raises:
        ArgumentError: λ is negative, not finite or not a number.
    """
    return _Line(check_factor(weight_decay), check_factor(weight_decay), 1)


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line from `start` to `end` within `steps` optimizer steps, then `end`.

    From 0.0 the line is a warm-up.

    Raises:
        ArgumentError: a λ is negative, not finite or not a number; `steps` is no positive whole
            number.

    >>> import wdhook
    >>> [wdhook.schedules.linear(0.0, 0.4, steps=4)(step) for step in range(6)]
    [0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.4]
    """
    return _Line(check_factor(start, "start"), check_factor(end, "end"), _check_steps(steps))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from `start` to `end` within `steps` optimizer steps, then `end`.

    λ(t) = end + ½·(start − end)·(1 + cos(π·t/steps)): the schedule of DINO (Caron et al. 2021,
    arXiv:2104.14294) and of DINOv2 (`CosineScheduler`), which go from 0.04 to 0.4.

    Raises:
        ArgumentError: a λ is negative, not finite or not a number; `steps` is no positive whole
            number.

    >>> import wdhook
    >>> [round(wdhook.schedules.cosine(0.04, 0.4, steps=4)(step), 3) for step in range(6)]
    [0.04, 0.093, 0.22, 0.347, 0.4, 0.4]
    """
    return _Cosine(check_factor(start, "start"), check_factor(end, "end"), _check_steps(steps))


class _Course:
    """A way from `start` to `end` in `steps`, then `end`. A class: closures cannot be pickled."""

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


# -- which λ? --------------------------------------------------------------------------------------


def half_life(steps: float, *, lr: float) -> float:
    """Choose λ so that decay alone would halve a weight in `steps` optimizer steps.

    Each step multiplies a weight by 1 − lr·λ. From (1 − lr·λ)^steps = ½ follows
    λ = (1 − 2^(−1/steps))/lr. For the modes that multiply λ by the
    learning rate: "decoupled", and "coupled" with plain SGD.

    Args:
        steps: optimizer steps, not micro-batches; above 0.
        lr: the learning rate that counts, such as the peak of a schedule. For "independent" decay
            give ``lr=1``.

    Returns:
        λ per optimizer step.

    Raises:
        ArgumentError: `steps` or `lr` is no finite number above 0.

    >>> import wdhook
    >>> λ = wdhook.schedules.half_life(1000, lr=1e-3)
    >>> round(λ, 3), round((1 - 1e-3 * λ) ** 1000, 6)
    (0.693, 0.5)
    """
    # expm1 keeps the digits that 1 − 2^(−1/steps) would lose where steps is large.
    product = -math.expm1(-math.log(2) / _check_positive("steps", steps))
    return product / _check_positive("lr", lr)


def timescale(steps: float, *, lr: float) -> float:
    """Choose λ so that the weights average the updates of about the last `steps` steps.

    With decoupled decay the weights are an exponential moving average of updates, with a timescale
    of τ = 1/(lr·λ) steps; so λ = 1/(lr·steps). Wang & Aitchison (2024, arXiv:2405.13698) find good
    τ between one epoch and the whole run, and about the same τ, in epochs, as model and data grow.

    Args:
        steps: τ in optimizer steps, at least 1.
        lr: the learning rate that counts, such as the peak of a schedule. For "independent" decay
            give ``lr=1``.

    Returns:
        λ per optimizer step.

    Raises:
        ArgumentError: `steps` is below 1, or `lr` is no finite number above 0.

    >>> import wdhook
    >>> round(wdhook.schedules.timescale(10_000, lr=1e-3), 6)
    0.1
    """
    if _check_positive("steps", steps) < 1:
        raise ArgumentError(
            "`steps` must be at least 1: a shorter timescale would turn weights around.\n"
            f"  got: {steps!r}"
        )
    return 1 / (_check_positive("lr", lr) * steps)


def transfer(
    weight_decay: float,
    *,
    batch: tuple[float, float] = (1, 1),
    lr: tuple[float, float] = (1, 1),
    tokens: tuple[float, float] = (1, 1),
) -> float:
    """Move a good λ to another batch size, learning rate or amount of data.

    λ·(B/B_ref)·(lr_ref/lr)·(D_ref/D) keeps the timescale τ = 1/(lr·λ), counted as a share of the
    run (arXiv:2405.13698; for batch and data also Bergsma et al. 2025, arXiv:2505.13738). A
    quantity that is not given stays as it is.

    Args:
        weight_decay: λ of the run that worked.
        batch: (of that run, of the new run), in samples or tokens per optimizer step.
        lr: the same of the learning rate.
        tokens: the same of the data that the whole run sees, in samples or tokens.

    Returns:
        λ of the new run.

    Raises:
        ArgumentError: λ is negative; a quantity is no pair of finite numbers above 0.

    >>> import wdhook
    >>> wdhook.schedules.transfer(0.1, batch=(256, 1024), lr=(1e-3, 2e-3))
    0.2
    """
    new = check_factor(weight_decay)
    for name, pair, power in (("batch", batch, 1), ("lr", lr, -1), ("tokens", tokens, -1)):
        reference, other = _check_pair(name, pair)
        new *= (other / reference) ** power
    return new


def dose(
    weight_decay: float | Schedule, lr: float | Callable[[int], float], *, steps: int
) -> float:
    """Add up the decay of a whole run: −Σ log(1 − lr·λ) over its optimizer steps.

    Decay alone would multiply the weights by e^(−dose). Below 0.01 decay does nothing, as in
    many runs of fine-tuning; above 3 the initial values are forgotten.

    Args:
        weight_decay: λ, or a schedule of λ.
        lr: the learning rate, or a function of the number of finished steps. For "independent"
            decay give ``lr=1``, or the share of the peak.
        steps: optimizer steps of the run.

    Returns:
        The dose, 0 or larger.

    Raises:
        ArgumentError: a λ or a learning rate is negative or not finite; lr·λ is 1 or more, which
            would set weights to zero or turn them around; `steps` is no positive whole number.

    >>> import wdhook
    >>> round(wdhook.schedules.dose(0.01, 2e-5, steps=3000), 6)
    0.0006
    >>> lr = wdhook.schedules.cosine(1e-3, 0.0, 10_000)
    >>> round(wdhook.schedules.dose(0.1, lr, steps=10_000), 2)
    0.5
    """
    total = 0.0
    for step in range(_check_steps(steps)):
        λ = check_factor(weight_decay(step) if callable(weight_decay) else weight_decay)
        rate = check_factor(lr(step) if callable(lr) else lr, "lr")
        if rate * λ >= 1:
            raise ArgumentError(
                "lr·λ must be below 1: at 1 a step sets weights to zero.\n"
                f"  step: {step}\n  lr: {rate:g}\n  weight_decay: {λ:g}\n"
                "  Give λ per step, as to wdhook.attach"
            )
        total -= math.log1p(-rate * λ)
    return total


# -- checks ----------------------------------------------------------------------------------------


def _check_steps(steps: object) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(
            f"`steps` must be a whole number of optimizer steps, at least 1.\n  got: {steps!r}"
        )
    return steps


def _check_positive(name: str, value: float) -> float:
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ArgumentError(f"`{name}` must be a finite number above 0.\n  got: {value!r}")
    return float(value)


def _check_pair(name: str, pair: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ArgumentError(
            f"`{name}` must be a pair: of the run that worked, and of the new run.\n"
            f"  got: {pair!r}\n"
            f"  For example {name}=(256, 1024)"
        )
    return _check_positive(name, pair[0]), _check_positive(name, pair[1])
