"""Time per step of the demo's trainings, as ratios of steps taken side by side.

Processor time, which waiting for other programs does not lengthen; wall time where the clock of the
processor is coarse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import comb
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import SGD

from .digits import ARMS, LR, MOMENTUM, Data, _batches, _model, bar, step

WARM_UP, TIMED, MAX_ROUNDS = 2, 5, 16
_CONFIDENCE = 0.95
_FINE = 1e-5  # seconds; Windows counts processor time in steps of 16 ms
_IS_FINE = time.get_clock_info("process_time").resolution <= _FINE
_clock = time.process_time if _IS_FINE else time.perf_counter

Times = dict[str, list[float]]


def time_steps(data: Data, seed: int, rounds: int) -> Times:
    """Measure the time of a step in each training.

    The trainings take turns, so that a busy machine slows all of them, and their ratios within a
    round mean something. wdhook is attached in its own turns only: while it is, it listens to the
    steps of every optimizer.

    Returns:
        Name of the training → seconds of a step, the median of each round. At most 16 rounds.
    """
    (batches,) = _batches(data, seed, epochs=1)
    batches = batches[: WARM_UP + TIMED]
    models = [_model(seed) for _ in ARMS]
    optimizers = []
    for arm, model in zip(ARMS, models, strict=True):
        optimizers.append(SGD(arm.groups(model), lr=LR, momentum=MOMENTUM))
    times: Times = {arm.name: [] for arm in ARMS}
    rounds = min(rounds, MAX_ROUNDS)
    for turn in bar(range(rounds), "time per step, taking turns", rounds, "round"):
        for i in range(len(ARMS)):
            i = (i + turn) % len(ARMS)  # the first place in a round goes round too
            with ARMS[i].attached(models[i]):
                laps = [_lap(models[i], optimizers[i], *batch) for batch in batches]
            times[ARMS[i].name].append(median(laps[WARM_UP:]))
    return times


def _lap(model: nn.Module, optimizer: SGD, images: Tensor, labels: Tensor) -> float:
    start = _clock()
    step(model, optimizer, images, labels)
    return _clock() - start


class Ratio(NamedTuple):
    """The median of paired ratios, and a 95 % interval of the median."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio | None:
    """Compare times measured in the same rounds.

    The interval is that of the sign test: two order statistics, which contain the median with a
    probability of at least 95 %, whatever the distribution of the noise.

    Returns:
        None with fewer than 6 rounds, too few for any such interval.
    """
    ratios = sorted(time / other for time, other in zip(times, reference, strict=True))
    rank = _rank(len(ratios))
    if rank is None:
        return None
    return Ratio(median(ratios), ratios[rank], ratios[-1 - rank])


def _rank(number: int) -> int | None:
    """The largest k such that the k-th smallest and largest of `number` values hold the median."""
    outside, found = 0.0, None
    for k in range(number // 2):
        outside += 2 * comb(number, k) / 2**number
        if outside > 1 - _CONFIDENCE:
            break
        found = k
    return found


def meaning(times: Times, ours: str, reference: str) -> str:
    """Say what the ratio of two trainings means, in a sentence; nothing without an interval."""
    ratio = paired_ratio(times[ours], times[reference])
    if ratio is None:
        return ""
    pair = f"{ours[:3]} and {reference[:3]}"
    if ratio.low <= 1 <= ratio.high:
        return f"{pair}: no difference, as 1 lies in the interval."
    seconds = median(times[reference])
    extra = (ratio.middle - 1) * seconds
    kind = "more" if extra > 0 else "less"
    return (
        f"{pair}: about {abs(extra) * 1e6:.0f} µs {kind} in a step of {seconds * 1e3:.1f} ms. "
        "These tensors are\n"
        "  tiny; docs/performance.md has larger ones, where the ratio is 1 or less."
    )


def ratios(times: Times, reference: str) -> dict[str, Any]:
    """Compare each training with the reference: name → `Ratio`, or None."""
    found: dict[str, Any] = {}
    for name, mine in times.items():
        found[name] = paired_ratio(mine, times[reference])
    return found
