"""The dose: how much decay the steps so far have been, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .._base.text import short
from .._plan.names import plain_name
from .engine import Engine
from .entry import Entry
from .tally import Tally

_NEVER_COUNTED = Tally()
_UNKNOWN = Tally(None)

_READINGS = (
    (0.01, "decay has no effect"),
    (0.5, "a mild pull toward zero"),
    (3.0, "weights without a gradient lose a good part"),
    (math.inf, "the initial values are forgotten"),
)


def reading(dose: float) -> str:
    """A dose in words; the bounds are those of docs/how-much.md."""
    return next(words for bound, words in _READINGS if dose < bound or bound == math.inf)


def percent(dose: float) -> str:
    """The share of a weight that a dose leaves, as text."""
    share = 100 * math.exp(-dose)
    if share < 0.1:
        return "less than 0.1 %"
    return f"{share:.4g} %" if share > 99 else f"{share:.3g} %"


@dataclass(frozen=True)
class DoseClass:
    """Parameters with one λ that have had the same decay.

    Attributes:
        weight_decay: λ of the next step.
        dose: −Σ log(1 − lr·λ) over the finished steps; None where nobody can tell.
        parameters: their names.
    """

    weight_decay: float
    dose: float | None
    parameters: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """The part of the initial values that decay alone would have left, e^(−dose)."""
        return None if self.dose is None else math.exp(-self.dose)

    @property
    def half_lives(self) -> float | None:
        """The number of times that decay alone would have halved a weight."""
        return None if self.dose is None else self.dose / math.log(2)

    def __str__(self) -> str:
        number = len(self.parameters)
        whose = f"λ {short(self.weight_decay)}, {number} {'weight' if number == 1 else 'weights'}"
        if self.dose is None:
            return f"{whose}: not known"
        left = f"decay alone leaves {percent(self.dose)}"
        return f"{whose}: {self.dose:.3g}; {left}: {reading(self.dose)}"


class Dose(Mapping[str, "float | None"]):
    """The decay of all finished steps: parameter name → −Σ log(1 − lr·λ). Made by
    `WeightDecay.dose`.

    Decay alone would have multiplied the weights by e^(−dose). Below 0.01 decay has done nothing,
    above 3 the initial values are forgotten; docs/how-much.md says which λ gives which. ``print``
    it: a line for each class of parameters that have had the same; most trainings have one.

    - Steps that were not taken (a GradScaler, an error) do not count, nor do those that were
      paused.
    - A step counts for all decayed parameters of a param group together, as soon as one of them
      was decayed: of a parameter that had no gradient in some of the steps, the dose is an upper
      bound.
    - ``"independent"`` and ``"corrected"``: the formula's own factor in place of lr·λ.
    - Deferred decay of low precision counts in the step that it belongs to, written or not.
    - Toward a target: of the distance from the target, in place of the weight.
    - Cautious decay: an upper bound, as if nothing had been masked.
    - Coupled decay: lr·λ of `torch.optim.SGD`, times (1 − dampening)/(1 − momentum), which holds to
      first order in lr·λ. None under any other optimizer. What clipping takes of a gradient with
      decay in it is not seen.

    Attributes:
        steps: finished optimizer steps of the handle, without those before a checkpoint, whose
            decay is in the dose.
        classes: those classes, in the order of the model.
        unknown: why some doses are None; empty where none is.
    """

    def __init__(self, steps: int, classes: tuple[DoseClass, ...], unknown: str = "") -> None:
        self.steps = steps
        self.classes = classes
        self.unknown = unknown
        self._by_name = {name: one.dose for one in classes for name in one.parameters}

    def __getitem__(self, name: str) -> float | None:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def largest(self) -> float | None:
        """The largest dose that is known, as one number for a logger. None where none is."""
        return max((one.dose for one in self.classes if one.dose is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them.

        Returns:
            ``steps``, and ``classes``: a list with ``weight_decay``, ``dose``, ``share``,
            ``half_lives`` and ``parameters`` (names) of each class.
        """
        classes = []
        for one in self.classes:
            numbers = {"dose": one.dose, "share": one.share, "half_lives": one.half_lives}
            classes.append(
                {"weight_decay": one.weight_decay, **numbers, "parameters": list(one.parameters)}
            )
        return {"steps": self.steps, "classes": classes}

    def __repr__(self) -> str:
        doses = [one.dose for one in self.classes]
        return f"Dose(steps={self.steps}, doses={doses})"

    def __str__(self) -> str:
        if not self.classes:
            return "Dose so far: no weight is decayed."
        lines = [f"Dose so far: {self.classes[0]}"]
        if len(self.classes) > 1:
            lines = ["Dose so far:", *(f"  {one}" for one in self.classes)]
        if self.unknown:
            lines.append(f"  {self.unknown}")
        return "\n".join(lines)


def read_dose(engine: Engine) -> Dose:
    """Read the tallies. Waits for the device where numbers are there."""
    state = engine.state
    read: dict[Tally, float | None] = {}
    classes: dict[tuple[float, float | None], list[str]] = {}
    for name, λ, tally in _trained_weights(engine):
        if tally not in read:
            read[tally] = tally.read()
        dose = read[tally]
        if λ or dose is None or dose > 0:
            classes.setdefault((λ, dose), []).append(name)
    made = tuple(DoseClass(λ, dose, tuple(names)) for (λ, dose), names in classes.items())
    unknown = any(one.dose is None for one in made)
    return Dose(state.steps, made, _reason(engine) if unknown else "")


def _trained_weights(engine: Engine) -> Iterator[tuple[str, float, Tally]]:
    """Trained parameters that the plan decays: name, λ now, tally."""
    state = engine.state
    decided = state.parameters.decided()
    for found in state.parameters.walk():
        known = decided.get(id(found.param))
        if known is None or not known.decision.eligible or not found.param.requires_grad:
            continue
        entry = state.parameters.entry(found.param)
        progress = known.progress if entry is None else entry.progress
        tally = None if progress is None else progress.tally
        if tally is None:
            tally = engine.tallies.waiting(plain_name(known.decision.name)) or _NEVER_COUNTED
        if entry is not None and _is_unheard(entry):
            tally = _UNKNOWN
        yield found.name, state.rate.weight_decay_of(known.decision, entry), tally


def _is_unheard(entry: Entry) -> bool:
    """Nobody announces the steps of a parameter."""
    clock = entry.clock
    return not clock.announced or (entry.terms.owner is None and clock.steps > 0)


def _reason(engine: Engine) -> str:
    if engine.state.config.in_gradient:
        return (
            "The dose of coupled decay is known under torch.optim.SGD alone: other optimizers "
            "divide the decay by the size of the gradient"
        )
    return (
        "Nobody can tell the dose of steps that are not announced or that a CUDA graph replays, "
        "nor of those before a checkpoint that does not say it"
    )
