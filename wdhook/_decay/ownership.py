"""Which parameters of an optimizer are decayed: making its view."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import formulas as arithmetic
from .optimizers import inner_optimizers, maximizes, owned_ids, zeroes_by_foreach
from .tracked import Pair, View

if TYPE_CHECKING:
    from .engine import Engine


def fill(engine: Engine, view: View, optimizer: Any) -> None:
    """Look at the param groups of an optimizer, and let it close the windows of what it owns."""
    names = engine.names()
    # A wrapper (SAM, Lookahead) lets the optimizer inside step: that one's step is the real one.
    inner = owned_ids(inner_optimizers(optimizer))
    view.params = [list(group["params"]) for group in optimizer.param_groups]
    view.wraps = any(key in names for key in inner)
    wrapped = (p for params in view.params for p in params if id(p) in inner)
    decayed = (p for p in wrapped if engine.is_eligible(names.get(id(p), "")))
    view.sample = min(decayed, key=Tensor.numel, default=None)
    view.buckets = [
        _buckets(
            engine,
            view,
            optimizer,
            index,
            {names[id(p)]: p for p in params if id(p) in names and id(p) not in inner},
        )
        for index, params in enumerate(view.params)
    ]
    given = engine.was_given(optimizer)
    for index, params in enumerate(view.params) if given else ():
        # The schedule is the wrapper's: ZeroRedundancyOptimizer hands it on at the step, after the backward pass.
        for param in params:
            entry = (
                engine.track(names[id(param)], param)
                if id(param) in inner and id(param) in names
                else None
            )
            if entry is not None:
                entry.place = weakref.ref(optimizer), index
    view.strays = list(_strays(engine)) if given else []
    view.checked = False
    view.dtypes = [bucket[0][0].dtype for buckets in view.buckets for bucket in buckets]


def _buckets(
    engine: Engine, view: View, optimizer: Any, index: int, named: Mapping[str, Tensor]
) -> list[list[Pair]]:
    """The decayed parameters of one param group, by what one foreach call can take."""
    sign = -1.0 if maximizes(optimizer, optimizer.param_groups[index]) else 1.0
    foreach = zeroes_by_foreach(optimizer)
    given = engine.was_given(optimizer)
    place = weakref.ref(optimizer), index
    buckets: dict[Any, list[Pair]] = {}
    for name, param in named.items():
        entry = engine.track(name, param)
        if entry is None:
            continue
        if entry.place is None or entry.place[0]() is None or given:
            entry.place = place
        if entry.decayed and entry.sign != sign:
            view.turned = name
        entry.sign = sign
        entry.blind = foreach and hasattr(param, "to_local")
        entry.set(entry.weight_decay)
        entry.move(view.owner)
        kind = (
            entry.weight_decay,
            entry.follows,
            param.device,
            param.dtype,
            arithmetic.is_plain(param),
        )
        buckets.setdefault(kind, []).append((param, entry))
    return list(buckets.values())


def _strays(engine: Engine) -> Iterator[Pair]:
    """What is decayed, and in no group of any optimizer that was given."""
    owned = engine.owned_ids()
    for _, param in engine.parameters():
        entry = engine.entry(param)
        if entry is not None and id(param) not in owned:
            yield param, entry
