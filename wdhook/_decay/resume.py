"""How far a run is: what a saved handle holds besides λ, by the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._base.validate import check_factor
from ..schedules import Schedule
from .formulas import Number
from .tracked import View
from .window import Owner

NO_PROGRESS: Mapping[str, Any] = {"lr_peaks": (), "finished_steps": ()}


class Progress:
    """The largest learning rates so far, and, for a schedule of λ, the finished steps of each parameter's optimizer.

    What was loaded for optimizers that have not stepped yet waits until they do.
    """

    def __init__(self, schedule: Schedule | None) -> None:
        self._schedule = schedule
        self._peaks: list[dict[str, Number]] = []
        self._owners: dict[str, Owner] = {}  # of parameters by name, where there is a schedule

    def weight_decay(self, finished: int) -> float:
        """The λ that the schedule has for the step after `finished` ones."""
        assert self._schedule is not None
        return check_factor(self._schedule(finished), f"weight_decay({finished})")

    def finished(self, name: str) -> int:
        """Finished steps of a parameter's optimizer."""
        return self._owners[name].finished if name in self._owners else 0

    def meet(self, view: View) -> None:
        """Look at what an optimizer owns. A new one goes on where the parameters were, or where they were saved."""
        if not view.peaks:
            self._recall_peaks(view)
        if self._schedule is not None:
            names = [entry.name for entry in view.entries()]
            view.owner.finished = view.owner.finished or max(map(self.finished, names), default=0)
            self._owners.update(dict.fromkeys(names, view.owner))

    def _recall_peaks(self, view: View) -> None:
        """Take the first loaded peaks that name a parameter of its own. The order of optimizers may differ."""
        for index, known in enumerate(self._peaks):
            if view.set_peaks(known):
                del self._peaks[index]
                return

    def save(self, views: Iterable[View]) -> dict[str, Any]:
        """``lr_peaks``: for each optimizer, parameter → lr; ``finished_steps``: parameter → steps of its optimizer.

        Each in a tuple, which torch.distributed.checkpoint saves as one object: it looks into lists and mappings, and
        then loads no more than the keys that are there already.
        """
        peaks = [known for view in views if (known := view.peaks_by_name())]
        finished = {name: owner.finished for name, owner in self._owners.items()}
        return {
            "lr_peaks": (*peaks, *self._peaks),
            "finished_steps": () if self._schedule is None else (finished,),
        }

    def load(self, state: Mapping[str, Any], views: Iterable[View]) -> None:
        """Undo of `save`."""
        self._peaks = [dict(known) for known in state["lr_peaks"]]
        finished = {
            name: steps for known in state["finished_steps"] for name, steps in known.items()
        }
        self._owners = {name: Owner(finished=steps) for name, steps in finished.items()}
        for view in views:
            view.owner.finished = 0
            self._recall_peaks(view)
            self.meet(view)
