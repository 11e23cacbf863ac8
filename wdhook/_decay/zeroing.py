"""Tells a gradient that was zeroed in place from one that was clipped, scaled or averaged."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import takewhile

import torch
from torch import Tensor

from .._base.torch_private import graph_task_id, in_compiled_autograd, is_view, version
from . import tensors
from .entry import Entry, Pair
from .rules.base import Facts, Rules
from .state import State


class Witness:
    """Answers whether gradients were zeroed in place between two backward passes.

    Asked once for each backward pass. The gradients that this pass has not reached yet hold a
    decay, so only zeroing leaves nothing in them. A parameter that is zero has no decay, and is no
    evidence. The answer reads gradients and costs a synchronisation, in loops that change gradients
    in place alone.
    """

    def __init__(self, state: State, rules: Rules) -> None:
        self._state = state
        self._rules = rules
        self._pass: int | None = None
        self._zeroed: weakref.WeakKeyDictionary[Entry, bool] = weakref.WeakKeyDictionary()

    def says_zeroed(self, entry: Entry, grad: Tensor) -> bool:
        """`grad`, the gradient of `entry`'s parameter, was zeroed before this pass added to it."""
        now = graph_task_id()
        if now != self._pass or now < 0:
            self._pass = now
            self._look(entry)
        if entry in self._zeroed:
            return self._zeroed[entry]
        if self._zeroed:
            # No direct evidence: modules are zeroed together, so take the longest common name
            # prefix.
            nearest = max(self._zeroed, key=lambda other: _kinship(entry, other))
            return self._zeroed[nearest]
        self._rules.tell("zeroed-or-changed", Facts(self._state, entry=entry))
        # In a distributed run, in-place changes are most often all-reductions.
        return not (is_view(grad) or is_distributed())

    def _look(self, asking: Entry) -> None:
        self._zeroed.clear()
        others = [(p, e, g) for p, e, g in self._changed() if e is not asking]
        # All reductions are started before the first is waited for.
        contents = [(tensors.content(grad), tensors.content(param)) for param, _, grad in others]
        for (_, entry, grad), (content, decay) in zip(others, contents, strict=True):
            # An empty shard, or a parameter without decay, tells nothing.
            if content is not None and decay is not None and bool(decay):
                self._note(entry, grad, zeroed=not bool(content))
        if not self._zeroed and in_compiled_autograd():
            self._look_at_unchanged(asking)

    def _note(self, entry: Entry, grad: Tensor, zeroed: bool) -> None:
        self._zeroed[entry] = zeroed
        entry.version = version(grad)
        if zeroed:
            entry.reopen(zeroed_in_place=True)  # also where this pass will not reach it

    def _look_at_unchanged(self, asking: Entry) -> None:
        """Compiled code may change a gradient more than once; none was zeroed where one is in
        place."""
        for param, entry in pairs_of(self._state):
            if entry is asking or not entry.paid or param.grad is None:
                continue
            if entry.holds(param.grad):
                self._zeroed[entry] = False

    def _changed(self) -> Iterator[tuple[Tensor, Entry, Tensor]]:
        """Entries whose paid gradient is there, and was changed by something else than this pass.

        Without a hook (frozen when it was decayed) nothing tells whether this pass has reached the
        parameter.
        """
        for param, entry in pairs_of(self._state):
            grad = param.grad
            if grad is not None and entry.handle is not None and entry.was_touched(grad):
                yield param, entry, grad


def pairs_of(state: State) -> Iterator[Pair]:
    """Every parameter that has an entry, with the entry.

    In a backward pass FSDP2 shows the model whole parameters; only the optimizers still have the
    sharded ones.
    """
    found: dict[int, Pair] = {}
    for view in state.optimizers.views():
        found.update((id(param), (param, entry)) for param, entry in view.pairs())
    found.update((id(param), (param, entry)) for param, entry in state.parameters.pairs())
    yield from found.values()


def is_distributed() -> bool:
    """Several processes train together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def _kinship(one: Entry, other: Entry) -> tuple[bool, int]:
    parts = zip(one.name.split("."), other.name.split("."))  # noqa: B905 - as far as the shorter one goes
    common = takewhile(lambda pair: pair[0] == pair[1], parts)
    return one.clock is other.clock, sum(1 for _ in common)
