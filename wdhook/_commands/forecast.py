"""The dose of a run that is planned: learning rates and λ are followed, and nothing is trained."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import SGD

from .._base.errors import LearningRateError
from .._base.problem import Problem
from .._base.text import short
from .._decay.dose import percent, reading
from .._decay.engine import Engine
from .._decay.formulas import Formula, Rates
from .._decay.optimizers import decays_itself, known_rates, learning_rate, own_mode, sgd_gain
from .findings import Finding
from .looks import innermost_of
from .shared import counted
from .training import Training

Group = Mapping[str, Any]

NOTHING = 0.01
"""Below this dose decay has no effect, as docs/how-much.md says."""
_TARGETS = (0.1, 1.0)


# -- learning rates --------------------------------------------------------------------------------


class Course:
    """The param groups of a training, without their tensors, and copies of its schedulers that
    change them. Made before the training step.

    Attributes:
        remarks: schedulers that could not be followed, and why.
        followed: class names of the others.
    """

    def __init__(self, optimizers: Iterable[Any], schedulers: Iterable[Any]) -> None:
        self.remarks: list[str] = []
        self.followed: list[str] = []
        self._shadows: dict[int, dict[str, Any]] = {}  # by the id of the real group
        self._schedulers: list[Any] = []
        self._memo: dict[int, Any] = {}
        for optimizer in optimizers:
            self._shadow(optimizer)
        for scheduler in schedulers:
            self._follow(scheduler)

    def _shadow(self, optimizer: Any) -> None:
        """An optimizer with the same numbers, without parameters and state."""
        if id(optimizer) in self._memo:
            return
        shadow = SGD([torch.zeros(1)], lr=0.0)
        shadow.param_groups = []
        for group in optimizer.param_groups:
            if id(group) not in self._shadows:  # a wrapper has the groups of the one inside
                numbers = {key: copy.deepcopy(v) for key, v in group.items() if key != "params"}
                self._shadows[id(group)] = {"params": [], **numbers}
            shadow.param_groups.append(self._shadows[id(group)])
        self._memo[id(optimizer)] = shadow

    def _follow(self, scheduler: Any) -> None:
        name = type(scheduler).__name__
        optimizer = getattr(scheduler, "optimizer", None)
        if optimizer is None or not hasattr(scheduler, "last_epoch"):
            self.remarks.append(f"{name} is unknown: its learning rate is taken as constant")
            return
        self._shadow(optimizer)
        try:
            follower = copy.deepcopy(scheduler, dict(self._memo))
            _advance(copy.deepcopy(scheduler, self._strangers()))
        except Exception as error:  # code of the user
            why = f"{type(error).__name__}: {error}"
            self.remarks.append(
                f"{name} cannot be stepped without training: its learning rate is taken as "
                f"constant ({why})"
            )
            return
        self._schedulers.append(follower)
        self.followed.append(name)

    def _strangers(self) -> dict[int, Any]:
        """Copies of the shadows, for a trial."""
        return {key: copy.deepcopy(shadow) for key, shadow in self._memo.items()}

    @property
    def is_constant(self) -> bool:
        """No learning rate changes."""
        return not self._schedulers

    def now(self, group: Group) -> Group:
        """The numbers of a param group at the step that the course has come to."""
        return self._shadows.get(id(group), group)

    def advance(self) -> None:
        """Step the schedulers."""
        for scheduler in self._schedulers:
            _advance(scheduler)


def _advance(scheduler: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses a step of the optimizer
        scheduler.step()


# -- parameters ------------------------------------------------------------------------------------


@dataclass
class Strand:
    """Parameters with the same λ and the same learning rate over the run.

    Attributes:
        names: of the parameters.
        weight_decay: λ at the first step.
        lr: learning rate at the first step; None where the formula has none.
        largest_lr: of the run.
        dose: of the run; None where nobody can tell.
        why: the reason then.
        follows_schedule: λ changes in the run.
        peak: the largest learning rate so far, as the formulas know it.
    """

    names: list[str]
    weight_decay: float = 0.0
    lr: float | None = None
    largest_lr: float | None = None
    dose: float | None = 0.0
    why: str = ""
    follows_schedule: bool = False
    peak: float | None = field(default=None, repr=False)

    def note(self, λ: float, lr: float | None, step: int) -> None:
        """Note the numbers of one step."""
        if step == 0:
            self.weight_decay, self.lr, self.largest_lr = λ, lr, lr
        self.follows_schedule |= λ != self.weight_decay
        if lr is not None and self.largest_lr is not None:
            self.largest_lr = max(self.largest_lr, lr)

    def add(self, kept: float | None, times: int, why: str) -> None:
        """Add the decay of steps that leave this share of a parameter each."""
        if kept is None:
            self.dose, self.why = None, why
        elif self.dose is not None:
            self.dose += -times * math.log(abs(kept)) if kept else math.inf

    def half_life(self, steps: int) -> float | None:
        """Steps in which decay alone halves a weight, on the average over the run."""
        return steps * math.log(2) / self.dose if self.dose else None


Look = Callable[[int], "tuple[float, float | None, float | None, str]"]
"""Number of a step → λ, learning rate, the share of a parameter that decay leaves, and why it is
not known."""


class Forecast:
    """The dose of a planned run. Made before the training step; `look` comes after it.

    Attributes:
        steps: of the optimizers, in the run.
        every: steps of the optimizers for each step of the schedulers.
        strands: parameters with their doses.
    """

    def __init__(self, training: Training, steps: int, every: int) -> None:
        self.steps = steps
        self.every = every
        self.strands: list[Strand] = []
        self._optimizers = innermost_of(training.optimizers)
        self._course = Course([*training.optimizers, *self._optimizers], training.schedulers)

    def look(self, engines: list[Engine]) -> None:
        """Follow λ and the learning rates over the run.

        Args:
            engines: of handles that have decayed in the training step; without any, the decay is
                that of the optimizers themselves.
        """
        found = self._found(engines)
        scheduled = any(engine.state.config.schedule for engine in engines)
        constant = self._course.is_constant and not scheduled
        for step in range(1 if constant else self.steps):
            for strand, look in found:
                λ, lr, kept, why = look(step)
                strand.note(λ, lr, step)
                strand.add(kept, self.steps if constant else 1, why)
            if (step + 1) % self.every == 0:
                self._course.advance()
        self.strands = _merged(strand for strand, _ in found)

    def _found(self, engines: list[Engine]) -> list[tuple[Strand, Look]]:
        found: list[tuple[Strand, Look]] = []
        for engine in engines:
            found += _of_engine(engine, self._course)
        for optimizer in self._optimizers if not engines else ():
            found += _of_optimizer(optimizer, self._course)
        return found

    def findings(self) -> Iterator[Finding]:
        """Notes on decay that has no effect."""
        for strand in self.strands:
            if strand.dose and strand.dose < NOTHING:
                yield _without_effect(strand, self.steps)

    def lines(self) -> Iterator[str]:
        """The forecast in words: a heading, and a line for each strand and each remark."""
        by = ""
        if self._course.followed:
            every = "each" if self.every == 1 else f"every {self.every}"
            by = f" ({', '.join(self._course.followed)}: a step for {every} of them)"
        yield f"dose of {counted(self.steps, 'optimizer step')}{by}:"
        yield from self._course.remarks
        for strand in self.strands:
            yield _sentence(strand, self.steps)
        if not self.strands:
            yield "not known: no step has decayed a parameter"

    def as_dict(self) -> dict[str, Any]:
        """The forecast as JSON."""
        classes = []
        for strand in self.strands:
            classes.append(
                {
                    "weight_decay": strand.weight_decay,
                    "lr": strand.lr,
                    "largest_lr": strand.largest_lr,
                    "dose": strand.dose,
                    "share": None if strand.dose is None else math.exp(-strand.dose),
                    "half_life": strand.half_life(self.steps),
                    "why": strand.why,
                    "parameters": strand.names,
                }
            )
        return {
            "steps": self.steps,
            "schedulers": self._course.followed,
            "scheduler_every": self.every,
            "remarks": self._course.remarks,
            "classes": classes,
        }


def _merged(strands: Iterable[Strand]) -> list[Strand]:
    """Strands with the same numbers as one."""
    joined: dict[tuple[object, ...], Strand] = {}
    for one in strands:
        key = one.weight_decay, one.lr, one.largest_lr, one.dose, one.why
        if key in joined:
            joined[key].names += one.names
        elif one.weight_decay or one.dose:
            joined[key] = one
    return list(joined.values())


def _of_engine(engine: Engine, course: Course) -> Iterator[tuple[Strand, Look]]:
    optimizers = engine.state.optimizers
    for optimizer in optimizers.met():
        view = optimizers.known_view(optimizer)
        for _, pairs in () if view is None else view.all_buckets():
            names = [entry.name for param, entry in pairs if param.requires_grad]
            known = pairs[0][1].terms.group()
            if names and known is not None:
                strand = Strand(names)
                yield strand, _look(engine, strand, pairs[0][1].own, *known, course)


def _look(
    engine: Engine,
    strand: Strand,
    own: float | None,
    optimizer: Any,
    group: Group,
    course: Course,
) -> Look:
    config, λ_now = engine.state.config, engine.state.rate.weight_decay

    def look(step: int) -> tuple[float, float | None, float | None, str]:
        λ = λ_now if config.schedule is None else config.schedule(step)
        λ = λ if own is None else own
        now = course.now(group)
        try:
            lr = float(learning_rate(now, config.lr))
        except LearningRateError:
            return λ, None, None, "the learning rate cannot be read"
        kept, why = _kept(config.formula, strand, λ, lr, optimizer, now)
        return λ, lr, kept, why

    return look


def _kept(
    formula: Formula, strand: Strand, λ: float, lr: float, optimizer: Any, now: Group
) -> tuple[float | None, str]:
    if formula.needs_lr and "d" in now and "beta2_decay" not in now:
        return None, "the optimizer estimates its learning rate as it trains"
    rates = [lr, *map(float, known_rates(now))]
    strand.peak = max(rates if strand.peak is None else [strand.peak, *rates])
    number = formula.number(Rates(λ, lr, strand.peak))
    kept = formula.kept(number, sgd_gain(optimizer, now) if formula.in_gradient else None)
    if kept is None:
        return None, _coupled(optimizer)
    return float(kept), ""


def _coupled(optimizer: Any) -> str:
    return (
        f"under {type(optimizer).__name__} coupled decay has no dose: how much it takes depends on "
        "the gradients"
    )


def _of_optimizer(optimizer: Any, course: Course) -> Iterator[tuple[Strand, Look]]:
    mode = own_mode(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        if decays_itself(course.now(group)):
            number = len(group["params"])
            strand = Strand([f"param_groups[{index}]: {counted(number, 'tensor')}"])
            yield strand, _own_look(optimizer, mode, group, course)


def _own_look(optimizer: Any, mode: str | None, group: Group, course: Course) -> Look:
    def look(step: int) -> tuple[float, float | None, float | None, str]:
        now = course.now(group)
        λ, lr = float(now["weight_decay"]), float(now["lr"])
        if mode == "decoupled":
            return λ, lr, 1 - lr * λ, ""
        gain = sgd_gain(optimizer, now) if mode == "coupled" else None
        if gain is not None:
            return λ, lr, 1 - float(gain) * λ, ""
        why = _coupled(optimizer) if mode == "coupled" else "its formula of decay is not known"
        return λ, lr, None, why

    return look


# -- words -----------------------------------------------------------------------------------------


def _sentence(strand: Strand, steps: int) -> str:
    """One line of the forecast."""
    number = len(strand.names)
    whose = strand.names[0] if number == 1 else counted(number, "weight")
    text = f"λ {short(strand.weight_decay)}"
    if strand.lr is not None:
        text += f", lr {short(strand.lr)}"
        if strand.largest_lr is not None and strand.largest_lr != strand.lr:
            text += f" (at most {short(strand.largest_lr)})"
    if strand.dose is None:
        return f"{text}, {whose}: not known: {strand.why}"
    text += f", {whose}: {strand.dose:.2g}; decay alone leaves {percent(strand.dose)}"
    half_life = strand.half_life(steps)
    if half_life is not None:
        text += f", half-life {half_life:,.0f} steps"
    return f"{text}: {reading(strand.dose)}"


def _without_effect(strand: Strand, steps: int) -> Finding:
    """The note on decay that has no effect, with the λ that would have one."""
    assert strand.dose
    ways = []
    for target in _TARGETS:
        times = target / strand.dose
        λ = f"λ times {_rounded(times)}"
        if not strand.follows_schedule:
            λ = f"λ = {_rounded(strand.weight_decay * times)}"
        ways.append(f"{λ} would leave {percent(target)}")
    what = (
        f"Decay has no effect in {steps:,} steps: of a weight without a gradient it alone would "
        f"leave {percent(strand.dose)}."
    )
    fix = (
        f"Do not tune this λ. {'; '.join(ways)} (a timescale as long as the run, where training "
        "from scratch begins; fine-tuning is rarely meant to forget that much). "
        "docs/how-much.md says which λ to take"
    )
    facts: dict[str, object] = {"dose": f"{strand.dose:.2g}", "λ": short(strand.weight_decay)}
    if strand.largest_lr is not None:
        facts["largest lr"] = short(strand.largest_lr)
    return Finding("note", "dose", Problem(what, fix, facts, tuple(strand.names)))


def _rounded(number: float) -> str:
    """Two digits, without an exponent up to a million."""
    return f"{float(f'{number:.2g}'):,g}"
