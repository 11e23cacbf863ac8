"""What a training looks like now: norms, angles and the share of the decay. Nothing is waited for
until it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._base.errors import ArgumentError
from .._base.markup import html_paragraph, html_table
from .._base.text import did_you_mean, short
from .._base.torch_private import version
from .._base.validate import is_number
from .._plan.decision import Decision
from . import tensors
from .engine import Engine
from .entry import Entry
from .ownership import View
from .state import State
from .tensors import Number

By = str | Callable[[Decision], str]

# ‖p‖², ‖p‖² of those with a gradient, ‖g‖², ⟨p, g⟩, ‖decay‖², ‖what the decay is a part of‖²
_COLUMNS = 6
_Row = tuple[str, Tensor]
"""A group, and what one parameter adds to its columns: 1-D, on the parameter's device."""
_Awaited = tuple[State, str, Tensor, Tensor]
"""Whose, a group, a parameter, and its values before the step."""


class Snapshot:
    """Norms, angles and the share of the decay, by groups of parameters.

    Made by `WeightDecay.snapshot`. The numbers stay on their devices; `to_dict` and `scalars` wait
    for them.

    Attributes:
        step: finished optimizer steps when it was taken.
        weight_decay: λ then.
    """

    def __init__(self, engine: Engine, by: By) -> None:
        self.step = engine.state.steps
        self.weight_decay = engine.state.rate.weight_decay
        self._numel: dict[str, int] = {}
        self._decayed: dict[str, bool] = {}
        self._rows: list[_Row] = []
        self._awaited: list[_Awaited] = []
        self._with_gradient: set[str] = set()
        self._unknown: set[str] = set()  # groups with a gradient that decay cannot be told from
        parameters = engine.state.parameters
        decided = parameters.decided()
        with torch.no_grad():
            for found in parameters.walk():
                known = decided.get(id(found.param))
                if known is not None and _has_numbers(found.param):
                    key = _key(by, known.decision)
                    self._look(engine.state, found.param, key, known.decision)
        if self._awaited:
            engine.watchers.add(self)

    def _look(self, state: State, param: Tensor, key: str, decision: Decision) -> None:
        entry = state.parameters.entry(param)
        λ = state.rate.weight_decay_of(decision, entry)
        decayed = bool(λ) and param.requires_grad
        self._numel[key] = self._numel.get(key, 0) + param.numel()
        self._decayed[key] = self._decayed.get(key, False) or decayed
        p = _local(param)
        squared = _dot(p, p)
        if param.grad is None:
            self._add(key, squared)
            return
        self._with_gradient.add(key)
        g = _local(param.grad)
        gradient, product = _dot(g, g), _dot(p, g)
        added = _added(entry, param.grad, state) if entry is not None else 0.0
        if added is None:
            self._unknown.add(key)
            self._add(key, squared, squared, gradient, product)
            return
        if added:  # the gradient is g + added·p: back to what the loss gave
            gradient = (gradient - 2 * added * product + added**2 * squared).clamp(min=0)
            product = product - added * squared
        α = added
        if not decayed or not state.config.in_gradient:
            α = 0.0
        elif entry is None or not entry.paid:
            α = 0.0 if state.pauses else λ
        zero = torch.zeros_like(squared)
        whole = (gradient + 2 * α * product + α**2 * squared).clamp(min=0) if α else zero
        self._add(key, squared, squared, gradient, product, α**2 * squared, whole)
        if decayed and not state.config.in_gradient:
            was = _written(entry) if entry is not None and entry.paid else None
            before = p.clone() if was is None else p / was
            self._awaited.append((state, key, param, before))

    def _add(self, key: str, *columns: Tensor) -> None:
        """Add one parameter to its group; the columns that are missing are 0."""
        zeros = [torch.zeros_like(columns[0])] * (_COLUMNS - len(columns))
        self._rows.append((key, torch.stack([*columns, *zeros])))

    def note_step(self, view: View) -> None:
        """A step of an optimizer has ended; the engine says so."""
        rest = []
        with torch.no_grad():
            for awaited in self._awaited:
                state, key, param, before = awaited
                entry = state.parameters.entry(param)
                if entry is None or entry.clock is not view.clock:
                    rest.append(awaited)
                    continue
                was_paid = entry.stamp == view.clock.steps - 1
                number = entry.receipt.number if was_paid else 1.0
                change = before - _local(param)
                if was_paid and entry.memo is not None and entry.memo.written is not None:
                    change += before * (entry.memo.written - number)  # what is counted, instead
                taken = torch.zeros_like(before)
                if was_paid:
                    taken = state.config.formula.taken(before, change, number)
                decay = _dot(taken, taken)
                zero = torch.zeros_like(decay)
                self._add(key, zero, zero, zero, zero, decay, _dot(change, change))
        self._awaited = rest

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them. Waits for the devices.

        Returns:
            ``step``, ``weight_decay``, and ``groups``: for each group

            - ``numel``: elements;
            - ``norm``: ‖p‖, the L2 norm of its parameters;
            - ``grad_norm``: ‖g‖, of what the loss gave, without the decay; None without a gradient;
            - ``cos``: ⟨p, g⟩ / (‖p‖·‖g‖), 0 where the loss does not depend on the scale of p
              (Euler's identity);
            - ``share``: of decay. Coupled: ‖λ·p‖ / ‖g + λ·p‖. Otherwise: ‖lr·λ·p‖ over the norm of
              all that the next step changes; None before that step.
        """
        sums = self._read()
        groups = {key: self._numbers(key, sums[key]) for key in self._numel}
        return {"step": self.step, "weight_decay": self.weight_decay, "groups": groups}

    def _numbers(self, key: str, sums: list[float]) -> dict[str, Any]:
        squared, with_gradient, gradient, product, decay, whole = sums
        known = key in self._with_gradient and key not in self._unknown
        return {
            "numel": self._numel[key],
            "norm": math.sqrt(squared),
            "grad_norm": math.sqrt(gradient) if known else None,
            "cos": _ratio(product, math.sqrt(with_gradient * gradient)) if known else None,
            "share": self._share(key, decay, whole),
        }

    def _share(self, key: str, decay: float, whole: float) -> float | None:
        if not self._decayed[key]:
            return 0.0
        if key in self._unknown or any(key == waiting for _, waiting, *_ in self._awaited):
            return None
        if key not in self._with_gradient:
            return None
        return _ratio(math.sqrt(decay), math.sqrt(whole))

    def scalars(self, prefix: str = "wdhook") -> dict[str, float]:
        """The numbers that are known, under names for a logger: ``wdhook/norm/weight``. Waits for
        the devices."""
        read = self.to_dict()
        found = {f"{prefix}/weight_decay": read["weight_decay"]}
        for key, numbers in read["groups"].items():
            found |= {
                f"{prefix}/{name}/{key}": n
                for name, n in numbers.items()
                if name != "numel" and is_number(n)
            }
        return found

    def _repr_html_(self) -> str:
        """All numbers as a table, for notebooks. Waits for the devices."""
        read = self.to_dict()
        head = f"step {read['step']}, weight decay {short(read['weight_decay'])}"
        groups: dict[str, dict[str, Any]] = read["groups"]
        columns = list(dict.fromkeys(key for numbers in groups.values() for key in numbers))
        rows = [("group", *columns)]
        for name, numbers in groups.items():
            rows.append((name, *(_cell(numbers[column]) for column in columns)))
        return f"{html_paragraph(head)}\n{html_table(rows)}"

    def _read(self) -> dict[str, list[float]]:
        sums = {key: [0.0] * _COLUMNS for key in self._numel}
        devices = {row.device for _, row in self._rows}
        for device in devices:
            here = [(key, row) for key, row in self._rows if row.device == device]
            for (key, _), row in zip(
                here, torch.stack([row for _, row in here]).tolist(), strict=True
            ):
                sums[key] = [a + b for a, b in zip(sums[key], row, strict=True)]
        return sums

    def __repr__(self) -> str:
        groups = list(self._numel)
        return f"Snapshot(step={self.step}, weight_decay={self.weight_decay:g}, groups={groups})"


def _cell(value: float | None) -> str:
    """A number of a snapshot as text; nothing where it is not known."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else short(value, 4)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _key(by: By, decision: Decision) -> str:
    if callable(by):
        return str(by(decision))
    if by not in ("role", "name"):
        raise ArgumentError(
            f"`by` must be 'role', 'name' or a function of a Decision.\n  got: {by!r}"
            f"{did_you_mean(by, ('role', 'name'), quoted=True)}"
        )
    return str(decision.role) if by == "role" else decision.name


def _added(entry: Entry, grad: Tensor, state: State) -> float | None:
    """The multiple of the parameter that a gradient holds; None where that is not known any more.

    Clipping, un-scaling and a step change the gradient or the parameter, and the decay in it with
    them.
    """
    if not state.config.in_gradient or entry.buffer is None:
        return 0.0
    if not entry.holds(grad):
        return None if entry.paid else 0.0
    whole = entry.paid and not entry.unknown and version(grad) == entry.version
    number = entry.receipt.number
    if not whole or grad.is_sparse or entry.receipt.is_scaled or isinstance(number, Tensor):
        return None
    return number


def _written(entry: Entry) -> Number | None:
    """The factor that the parameter was multiplied with before the step; None where it was not."""
    written = None if entry.memo is None else entry.memo.written
    return entry.receipt.number if written is None else written


def _has_numbers(param: Tensor) -> bool:
    return not is_lazy(param) and (param.is_floating_point() or param.is_complex())


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds, dense and real."""
    dense = tensor if tensor.layout is torch.strided else tensor.detach().to_dense()
    return tensors.local(dense)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """⟨one, other⟩, 0-dim, in float32 at least. In pieces: what is cast is copied, and torch.dot
    counts in 32 bits."""
    wide = torch.promote_types(one.dtype, torch.float32)
    pairs = zip(
        torch.split(one.reshape(-1), _PIECE), torch.split(other.reshape(-1), _PIECE), strict=True
    )
    return torch.stack([torch.dot(a.to(wide), b.to(wide)) for a, b in pairs]).sum()


_PIECE = 2**24  # elements
