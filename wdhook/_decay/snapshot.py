"""What a training looks like now: norms, angles and the share of the decay. Nothing is waited for until it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._base.errors import ArgumentError
from .._base.validate import is_number
from .._plan.decision import Decision
from .engine import Engine
from .tracked import Entry, View

By = str | Callable[[Decision], str]

_COLUMNS = (
    6  # ‖p‖², ‖p‖² of those with a gradient, ‖g‖², ⟨p, g⟩, ‖decay‖², ‖what the decay is a part of‖²
)
_Row = tuple[
    str, Tensor
]  # a group, and what one parameter adds to its columns: 1-D, on the parameter's device


class Snapshot:
    """Norms, angles and the share of the decay, by groups of parameters.

    Made by `WeightDecay.snapshot`. The numbers stay on their devices; `to_dict` and `scalars` wait for them.

    Attributes:
        step: finished optimizer steps when it was taken.
        weight_decay: λ then.
    """

    def __init__(self, engine: Engine, by: By) -> None:
        self.step = engine.steps
        self.weight_decay = engine.weight_decay
        self._numel: dict[str, int] = {}
        self._decayed: dict[str, bool] = {}
        self._rows: list[_Row] = []
        self._awaited: list[tuple[View, str, Tensor, Tensor, Tensor]] = []
        self._with_gradient: set[str] = set()
        self._unknown: set[str] = set()  # groups of which the share cannot be known
        names, plan = engine.names(), engine.plan
        with torch.no_grad():
            for _, param in engine.parameters():
                if (
                    id(param) in names
                    and not is_lazy(param)
                    and (param.is_floating_point() or param.is_complex())
                ):
                    decision = plan[names[id(param)]]
                    self._look(engine, param, _key(by, decision), decision.weight_decay)
        if self._awaited:
            engine.watchers.add(self)

    def _look(self, engine: Engine, param: Tensor, key: str, weight_decay: float) -> None:
        entry = engine.entry(param)  # at "step" there is none before the first one
        α = weight_decay if entry is None else entry.alpha
        decayed = bool(α)
        self._numel[key] = self._numel.get(key, 0) + param.numel()
        self._decayed[key] = self._decayed.get(key, False) or decayed
        p, g = _local(param), None if param.grad is None else _local(param.grad)
        squared = _dot(p, p)
        zero = torch.zeros_like(squared)
        if g is None:
            self._rows.append((key, torch.stack([squared, *[zero] * (_COLUMNS - 1)])))
        else:
            self._with_gradient.add(key)
            gradient, product = _dot(g, g), _dot(p, g)
            α = α if engine.settings.mode == "coupled" else 0.0
            if entry is not None and α and _holds_decay(entry, param.grad):
                # g is g₀ + α·p: back to what the loss gave.
                gradient = (gradient - 2 * α * product + α**2 * squared).clamp(min=0)
                product = product - α * squared
            whole = (gradient + 2 * α * product + α**2 * squared).clamp(min=0) if α else zero
            self._rows.append(
                (key, torch.stack([squared, squared, gradient, product, α**2 * squared, whole]))
            )
        if decayed and engine.settings.mode != "coupled":
            self._await(engine, entry, param, key)

    def _await(self, engine: Engine, entry: Entry | None, param: Tensor, key: str) -> None:
        """Keep what the next step will change, to see by how much."""
        optimizer = None if entry is None or entry.place is None else entry.place[0]()
        view = None if optimizer is None else engine.known_view(optimizer)
        if entry is None or entry.place is None or optimizer is None or view is None:
            self._unknown.add(key)
            return
        by = engine.factor(
            view, entry.place[1], optimizer.param_groups[entry.place[1]], entry.weight_decay
        )
        before = (
            _local(param) / by
            if engine.settings.at == "backward" and entry.decayed
            else _local(param).clone()
        )
        self._awaited.append((view, key, param, before, _dot(before, before) * (1 - by) ** 2))

    def note_step(self, view: View) -> None:
        """A step of an optimizer has ended; the engine says so."""
        rest = []
        with torch.no_grad():
            for awaited in self._awaited:
                owner, key, param, before, decay = awaited
                if owner is not view:
                    rest.append(awaited)
                    continue
                change = before.sub_(_local(param))
                zero = torch.zeros_like(decay)
                self._rows.append(
                    (key, torch.stack([zero, zero, zero, zero, decay, _dot(change, change)]))
                )
        self._awaited = rest

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them. Waits for the devices.

        Returns:
            ``step``, ``weight_decay``, and ``groups``: for each group

            - ``numel``: elements;
            - ``norm``: ‖p‖, the L2 norm of its parameters;
            - ``grad_norm``: ‖g‖, of what the loss gave, without the decay; None without a gradient;
            - ``cos``: ⟨p, g⟩ / (‖p‖·‖g‖), 0 where the loss does not depend on the scale of p (Euler's identity);
            - ``share``: of decay. Coupled: ‖λ·p‖ / ‖g + λ·p‖. Otherwise: ‖lr·λ·p‖ over the norm of all that the next
              step changes; None before that step.
        """
        sums = self._read()
        groups = {key: self._numbers(key, sums[key]) for key in self._numel}
        return {"step": self.step, "weight_decay": self.weight_decay, "groups": groups}

    def _numbers(self, key: str, sums: list[float]) -> dict[str, Any]:
        squared, with_gradient, gradient, product, decay, whole = sums
        return {
            "numel": self._numel[key],
            "norm": math.sqrt(squared),
            "grad_norm": math.sqrt(gradient) if key in self._with_gradient else None,
            "cos": _ratio(product, math.sqrt(with_gradient * gradient))
            if key in self._with_gradient
            else None,
            "share": self._share(key, decay, whole),
        }

    def _share(self, key: str, decay: float, whole: float) -> float | None:
        if not self._decayed[key]:
            return 0.0
        if key in self._unknown or any(key == waiting for _, waiting, *_ in self._awaited):
            return None
        return _ratio(math.sqrt(decay), math.sqrt(whole))

    def scalars(self, prefix: str = "wdhook") -> dict[str, float]:
        """The numbers that are known, under names for a logger: ``wdhook/norm/weight``. Waits for the devices."""
        read = self.to_dict()
        found = {f"{prefix}/weight_decay": read["weight_decay"]}
        for key, numbers in read["groups"].items():
            found |= {
                f"{prefix}/{name}/{key}": n
                for name, n in numbers.items()
                if name != "numel" and is_number(n)
            }
        return found

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
        return f"Snapshot(step={self.step}, weight_decay={self.weight_decay:g}, groups={list(self._numel)})"


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _key(by: By, decision: Decision) -> str:
    if callable(by):
        return str(by(decision))
    if by not in ("role", "name"):
        raise ArgumentError(
            f"`by` must be 'role', 'name' or a function of a Decision.\n  got: {by!r}"
        )
    return str(decision.role) if by == "role" else decision.name


def _holds_decay(entry: Entry, grad: Tensor | None) -> bool:
    """Whether the coupled decay is in the gradient: of this window, or, stepped and not zeroed, of the last one."""
    return entry.decayed or (
        grad is not None
        and entry.buffer is not None
        and entry.buffer() is grad
        and entry.version == grad._version
    )


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds, dense and real."""
    here: Tensor = tensor.detach()
    here = here.to_local() if hasattr(here, "to_local") else here
    here = here.to_dense() if here.layout is not torch.strided else here
    return torch.view_as_real(here) if here.is_complex() else here


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """⟨one, other⟩, 0-dim, in float32 at least. In pieces: what is cast is copied, and torch.dot counts in 32 bits."""
    wide = torch.promote_types(one.dtype, torch.float32)
    pairs = zip(
        torch.split(one.reshape(-1), _PIECE), torch.split(other.reshape(-1), _PIECE), strict=True
    )
    return torch.stack([torch.dot(a.to(wide), b.to(wide)) for a, b in pairs]).sum()


_PIECE = 2**24  # elements
