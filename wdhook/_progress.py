"""How far a run is: what a saved handle holds besides λ, by the names of parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ._arithmetic import Number
from ._numbers import check_factor
from ._state import View
from .schedules import Schedule

NO_PROGRESS: Mapping[str, Any] = {"lr_peaks": (), "finished_steps": ()}


class Progress:
    """The largest learning rates so far, and, for a schedule of λ, the finished steps of each optimizer.

    What was loaded for optimizers that have not stepped yet waits until they do.
    """

    def __init__(self, schedule: Schedule | None) -> None:
        self._schedule = schedule
        self._peaks: list[dict[str, Number]] = []
        self._finished: dict[str, int] = {}

    def weight_decay(self, finished: int) -> float:
        """The λ that the schedule has for the step after `finished` ones."""
        assert self._schedule is not None
        return check_factor(self._schedule(finished), f"weight_decay({finished})")

    def save(self, views: Collection[View]) -> dict[str, Any]:
        """``lr_peaks``: for each optimizer, parameter → lr; ``finished_steps``: parameter → steps of its optimizer.

        Each in a tuple, which torch.distributed.checkpoint saves as one object: it looks into lists and mappings, and
        then loads no more than the keys that are there already.
        """
        peaks = [known for view in views if (known := view.peaks_by_name())]
        finished = {entry.name: view.finished for view in views for entry in view.entries()}
        scheduled = self._schedule is not None
        return {
            "lr_peaks": (*peaks, *self._peaks),
            "finished_steps": ({**self._finished, **finished},) if scheduled else (),
        }

    def load(self, state: Mapping[str, Any], views: Collection[View]) -> None:
        """Undo of `save`."""
        self._peaks = [dict(known) for known in state["lr_peaks"]]
        self._finished = {name: steps for known in state["finished_steps"] for name, steps in known.items()}
        for view in views:
            self.recall(view)

    def recall(self, view: View) -> None:
        """Give an optimizer what was loaded for the parameters that it owns. The order of optimizers may differ."""
        view.finished = max((self.finished(entry.name) for entry in view.entries()), default=0)
        for index, known in enumerate(self._peaks):
            if view.set_peaks(known):
                del self._peaks[index]
                return

    def finished(self, name: str) -> int:
        """Finished steps of a parameter's optimizer when the state was saved."""
        return self._finished.get(name, 0)
