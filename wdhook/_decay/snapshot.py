"""What a training looks like now: norms, angles and the share of the decay. Nothing is waited for
until it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._base.errors import ArgumentError
from .._base.text import did_you_mean, short
from .._base.torch_private import version
from .._base.validate import is_number
from .._plan.decision import Decision
from . import tensors
from .engine import Engine
from .entry import Entry
from .formulas import Formula
from .memory import Memo
from .optimizers import persistence, sgd_gain
from .ownership import View
from .state import State
from .tensors import Number
from .window import Clock

By = str | Callable[[Decision], str]

# ‖p‖², ‖p‖² of those with a gradient, ‖g‖², ⟨p, g⟩, ‖decay‖², ‖what the decay is a part of‖²
_COLUMNS = 6
# Of parameters that a step has moved by Δ = before − after: ‖p‖², ⟨p, Δ⟩, ‖Δ‖²; of the decayed ones
# among them ‖p‖², and ‖p‖² times the square of the angle in equilibrium.
_MOVES = 5
_Row = tuple[str, Tensor]
"""A group, and what one parameter adds to its columns: 1-D, on the parameter's device."""


class _Awaited(NamedTuple):
    """A parameter that waits for its step."""

    state: State
    key: str
    param: Tensor
    before: Tensor
    decayed: bool
    target: Tensor | None

    @property
    def shares(self) -> bool:
        """The share of the decay waits for the step too."""
        return self.decayed and not self.state.config.in_gradient


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
        self._moves: list[_Row] = []
        self._awaited: list[_Awaited] = []
        self._with_gradient: set[str] = set()
        self._unknown: set[str] = set()  # groups with a gradient that decay cannot be told from
        self._unseen: set[str] = set()  # groups of which another tensor was stepped
        self._restless: set[str] = set()  # groups whose equilibrium cannot be told
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
        target = _target(state, param, entry, decision) if decayed else None
        self._await(state, param, p, key, decayed, target)
        added = _added(entry, param.grad, state) if entry is not None else 0.0
        if added is None:
            self._unknown.add(key)
            self._add(key, squared, squared, gradient, product)
            return
        away, steep, along = squared, product, squared  # ‖d‖², ⟨d, g⟩, ⟨p, d⟩ of d = p − target
        if target is not None:
            d = p - target
            away, steep, along = _dot(d, d), _dot(d, g), _dot(p, d)
        if added:  # the gradient is g + added·d: back to what the loss gave
            gradient = (gradient - 2 * added * steep + added**2 * away).clamp(min=0)
            product = product - added * along
            steep = steep - added * away
        α = added
        if not decayed or not state.config.in_gradient:
            α = 0.0
        elif entry is None or not entry.paid:
            α = 0.0 if state.pauses else λ
        zero = torch.zeros_like(squared)
        whole = (gradient + 2 * α * steep + α**2 * away).clamp(min=0) if α else zero
        self._add(key, squared, squared, gradient, product, α**2 * away, whole)

    def _await(
        self,
        state: State,
        param: Tensor,
        p: Tensor,
        key: str,
        decayed: bool,
        target: Tensor | None,
    ) -> None:
        """Keep the values of a parameter from before its decay, until its step has ended."""
        entry = state.parameters.entry(param)
        was = None
        if entry is not None and entry.paid and not state.config.in_gradient:
            was = _written(entry)
        before = p.clone()
        if was is not None:
            before = p / was if target is None else target + (p - target) / was
        self._awaited.append(_Awaited(state, key, param, before, decayed, target))

    def _add(self, key: str, *columns: Tensor) -> None:
        """Add one parameter to its group; the columns that are missing are 0."""
        zeros = [torch.zeros_like(columns[0])] * (_COLUMNS - len(columns))
        self._rows.append((key, torch.stack([*columns, *zeros])))

    def note_step(self, view: View) -> None:
        """A step of an optimizer has ended; the engine says so."""
        stepped = {id(param) for params in view.params for param in params}
        rest = []
        with torch.no_grad():
            for awaited in self._awaited:
                entry = awaited.state.parameters.entry(awaited.param)
                mine = id(awaited.param) in stepped if entry is None else entry.clock is view.clock
                if not mine:
                    rest.append(awaited)
                    continue
                if id(awaited.param) not in stepped:
                    self._unseen.add(awaited.key)  # the engine copies a stand-in back later
                self._note(awaited, entry, view.clock)
        self._awaited = rest

    def _note(self, awaited: _Awaited, entry: Entry | None, clock: Clock) -> None:
        paid = entry if entry is not None and entry.stamp == clock.steps - 1 else None
        change = awaited.before - _local(awaited.param)
        if awaited.shares:
            change = self._note_share(awaited, paid, change)
        self._note_move(awaited, paid, change)

    def _note_share(self, awaited: _Awaited, paid: Entry | None, change: Tensor) -> Tensor:
        """Note the decay's part of a change. Gives the change with the decay that was counted in
        place of the decay that was written."""
        before = awaited.before
        if awaited.target is not None:
            before = before - awaited.target
        taken = torch.zeros_like(before)
        if paid is not None:
            number = paid.receipt.number
            if paid.memo is not None and paid.memo.written is not None:
                change = change + before * (paid.memo.written - number)
            taken = awaited.state.config.formula.taken(before, change, number)
        decay = _dot(taken, taken)
        zero = torch.zeros_like(decay)
        self._add(awaited.key, zero, zero, zero, zero, decay, _dot(change, change))
        return change

    def _note_move(self, awaited: _Awaited, paid: Entry | None, change: Tensor) -> None:
        before, key = awaited.before, awaited.key
        squared = _dot(before, before)
        of_decayed = squared_angle = torch.zeros_like(squared)
        if awaited.decayed:
            square = None
            if paid is not None and awaited.target is None:
                square = _equilibrium(awaited.state.config.formula, paid)
            if square is None:
                self._restless.add(key)
            else:
                of_decayed, squared_angle = squared, squared * square
        columns = squared, _dot(before, change), _dot(change, change), of_decayed, squared_angle
        self._moves.append((key, torch.stack(columns)))

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
              all that the next step changes; None before that step. With a target p − t in place
              of p.

            and, None before the next step has ended, of the parameters with a gradient:

            - ``change``: ‖Δp‖ / ‖p‖, the relative size of that step, decay and update;
            - ``angle``: between p before and p after that step, in radians;
            - ``equilibrium``: the angle at which growth by updates and decay would balance for
              weights before a normalization, √(2·lr·λ) of plain SGD and
              √(2·lr·λ·(1 − β₁)/(1 + β₁)) of AdamW, in radians (Kosson et al. 2023,
              arXiv:2305.17212): a root mean square over the decayed parameters. None of exempt
              parameters, of cautious decay, of a target, and of optimizers other than
              `torch.optim.SGD`, AdamW and, unless decay is coupled, Adam.
        """
        sums, moves = self._sums(self._rows, _COLUMNS), self._sums(self._moves, _MOVES)
        groups = {
            key: self._numbers(key, sums[key]) | self._rotation(key, moves[key])
            for key in self._numel
        }
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
        if key in self._unknown or any(a.shares and a.key == key for a in self._awaited):
            return None
        if key not in self._with_gradient:
            return None
        return _ratio(math.sqrt(decay), math.sqrt(whole))

    def _rotation(self, key: str, moves: list[float]) -> dict[str, Any]:
        squared, product, change, of_decayed, squared_angle = moves
        numbers: dict[str, Any] = dict.fromkeys(("change", "angle", "equilibrium"))
        if not squared or key in self._unseen or any(a.key == key for a in self._awaited):
            return numbers
        norm = math.sqrt(squared)
        across = math.sqrt(max(change - product**2 / squared, 0.0))
        numbers["change"] = math.sqrt(change) / norm
        numbers["angle"] = math.atan2(across, norm - product / norm)
        if of_decayed and key not in self._restless:
            numbers["equilibrium"] = math.sqrt(squared_angle / of_decayed)
        return numbers

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
        from .._base.markup import html_paragraph, html_table

        read = self.to_dict()
        head = f"step {read['step']}, weight decay {short(read['weight_decay'])}"
        groups: dict[str, dict[str, Any]] = read["groups"]
        columns = list(dict.fromkeys(key for numbers in groups.values() for key in numbers))
        rows = [("group", *columns)]
        for name, numbers in groups.items():
            rows.append((name, *(_cell(numbers[column]) for column in columns)))
        return f"{html_paragraph(head)}\n{html_table(rows)}"

    def _sums(self, rows: list[_Row], columns: int) -> dict[str, list[float]]:
        """The columns of each group, read with one wait for each device."""
        sums = {key: [0.0] * columns for key in self._numel}
        for device in {row.device for _, row in rows}:
            here = [(key, row) for key, row in rows if row.device == device]
            read = torch.stack([row for _, row in here]).tolist()
            for (key, _), row in zip(here, read, strict=True):
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


def _target(state: State, param: Tensor, entry: Entry | None, decision: Decision) -> Tensor | None:
    """The values to which decay draws a parameter in its next step, as this rank holds them; None
    for 0."""
    formula = state.config.formula
    if not decision.toward:
        return None
    memo = Memo(decision)
    if entry is not None and entry.memo is not None:
        memo.target = entry.memo.target
    formula.begin_(param, memo)
    return None if memo.target is None else _local(tensors.here(memo.target, param))


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


def _equilibrium(formula: Formula, entry: Entry) -> Number | None:
    """The square of the angle per step in equilibrium, 2·a·Σc²/(Σc)², where a is the share that
    decay takes and c are the weights of earlier gradients in an update; None where either cannot
    be told.

    Independent updates lengthen ‖p‖² by (Σc)² each in the end, decay shortens it by 2·a·‖p‖²; a
    step by itself turns p by Σc² (Kosson et al. 2023, arXiv:2305.17212, for SGD and AdamW).
    """
    known = entry.terms.owner_group()
    alike = None if known is None or formula.at_step_only else persistence(*known)
    if known is None or alike is None:
        return None
    kept = formula.kept(entry.receipt.number, sgd_gain(*known) if formula.in_gradient else None)
    return None if kept is None else 2 * (1 - kept) * alike


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
