"""Decay in the backward pass: hooks note parameters, and one payment for all of them comes at the
end.

A hook does not write. Its first call in a pass lets autograd make a call at the end, after the
calls of DistributedDataParallel and FSDP, which write averaged gradients: so decay is added once,
after averaging, as `torch.optim` does it. Where the end would be too late the hook pays at once:
where another post-accumulate hook of the parameter may step it, under compiled autograd, and
outside of a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from .._base.torch_private import (
    at_the_end_of_the_pass,
    graph_task_id,
    hooks_on,
    in_compiled_autograd,
    is_view,
    never_compiled,
    register_first,
    steps_in_communication_hook,
    version,
)
from . import tensors
from .entry import Due, Entry, Terms
from .formulas import How
from .living import living
from .optimizers import decays_itself, is_capturable
from .payment import begin, pay
from .rules.base import Facts, Rules
from .stand_ins import engine_of
from .state import State
from .unannounced import Unannounced
from .window import (
    GRADIENT_COMES,
    SHRUNK_GRADIENT_COMES,
    SHRUNK_UNANNOUNCED,
    Answer,
    Clock,
    Evidence,
)
from .zeroing import Witness, is_distributed

Note = tuple[Tensor, "Hook", Clock, int]
"""A parameter, its hook, and its clock with the steps that it had when the gradient came."""


class Hook(Entry):
    """An entry that is itself the hook of its parameter, which owns it. Keeps the passes alive.

    Attributes:
        alone_at: torch's count of registered hooks when the parameter was seen to have no other.
    """

    __slots__ = ("alone_at", "passes")

    def __init__(self, name: str, own: float | None, clock: Clock, passes: Passes) -> None:
        super().__init__(name, own, clock)
        self.passes = passes
        self.alone_at = -1

    @never_compiled
    def __call__(self, param: Tensor) -> None:
        """Note `param`, into whose gradient autograd has just accumulated."""
        passes = self.passes
        try:
            notes = passes.notes[graph_task_id()]
        except KeyError:
            notes = passes.begin(param, self)
        clock = self.clock
        steps = clock.steps
        if self.stamp == steps:
            passes.look(self, param)
        notes.append((param, self, clock, steps))
        if self.alone_at != RemovableHandle.next_id and passes.others and self._has_others(param):
            passes.pay_now(notes)

    def _has_others(self, param: Tensor) -> bool:
        """Other hooks are on the parameter, which may step it. Looked for again once anybody has
        registered a hook anywhere."""
        registered = RemovableHandle.next_id
        of_gradient, accumulated = hooks_on(param)
        if of_gradient or len(accumulated) > 1:
            return True
        self.alone_at = registered
        return False


class Sentinel:
    """A hook on one of a few parameters, where decay waits for a step.

    Notices that no step is announced, and that an engine takes the gradient away.
    """

    __slots__ = ("__weakref__", "handle", "name", "state", "unannounced")

    def __init__(self, name: str, state: State, unannounced: Unannounced) -> None:
        self.name = name
        self.state = state
        self.unannounced = unannounced
        self.handle: Any = None

    @never_compiled
    def __call__(self, param: Tensor) -> None:
        """Look at the parameter."""
        self.unannounced.look(self, param)
        self.unannounced.remember(self, param)
        self.state.seen.add(self.name)
        if graph_task_id() >= 0 and not in_compiled_autograd():
            at_the_end_of_the_pass(partial(self.look_again, param))

    @never_compiled
    def look_again(self, param: Tensor) -> None:
        """Note that the gradient is gone at the end of the pass, and no step has taken it."""
        if param.grad is None and not self.state.announced:
            self.state.taken.add(self.name)


class Passes:
    """The backward passes of one handle.

    Attributes:
        notes: for each backward pass that runs, what its hooks have noted.
        others: parameters may have post-accumulate hooks of others, which may step them.
        unannounced: notices steps that torch's hooks do not announce.
        waiting: backward passes since the last announced step.
    """

    def __init__(self, state: State, rules: Rules) -> None:
        self._state = state
        self._rules = rules
        self._witness = Witness(state, rules)
        self._sentinels: list[Sentinel] = []
        self._steps_in_hooks: bool | None = None  # once looked for
        self.notes: dict[int, list[Note]] = {}
        self.others = True
        self.unannounced = Unannounced(state, rules)
        self.waiting = 0

    # ---------------------------------------------------------------- hooks

    def cover(self, param: Tensor, entry: Entry) -> None:
        """Register the hook of a parameter that has none and can have one."""
        if not isinstance(entry, Hook) or entry.handle is not None:
            return  # others are decayed at their first step, then hooked
        if param.requires_grad and param.is_leaf and not is_lazy(param):
            entry.handle = register_first(param, entry)

    def watch(self, name: str, param: Tensor) -> None:
        """Put a sentinel on a parameter."""
        sentinel = Sentinel(name, self._state, Unannounced(self._state, self._rules))
        sentinel.handle = register_first(param, sentinel)
        self._sentinels.append(sentinel)

    def dismiss(self) -> None:
        """Remove the sentinels: a step was announced, or the handle is closed."""
        self.unannounced.forget()
        while self._sentinels:
            self._sentinels.pop().handle.remove()

    # ---------------------------------------------------------------- in a pass

    def begin(self, param: Tensor, hook: Hook) -> list[Note]:
        """A list for the notes of a pass that has just called its first hook."""
        self.waiting += 1
        if engine_of(param) is not None:
            self._tell("gradient-taken-by-engine", hook)
        if not self._state.announced and not self._is_stepped_in_hooks():
            self.unannounced.look(hook, param)
        if self.waiting > _PATIENCE and self._state.config.schedule is not None:
            self._rules.tell("schedule-waits", Facts(self._state))
        task = graph_task_id()
        self.others = not is_distributed()
        if task < 0 or in_compiled_autograd() or self._is_stepped_in_hooks():
            return _AtOnce(self)
        notes = self.notes.setdefault(task, [])
        first = param, hook, hook.clock, hook.clock.steps
        at_the_end_of_the_pass(partial(self.end, task, first, version(param)))
        return notes

    def _is_stepped_in_hooks(self) -> bool:
        """A communication hook of DistributedDataParallel steps parameters in the backward pass."""
        if self._steps_in_hooks is None:
            replicas = living(DistributedDataParallel) if is_distributed() else ()
            self._steps_in_hooks = any(map(steps_in_communication_hook, replicas))
        return self._steps_in_hooks

    def look(self, hook: Hook, param: Tensor) -> None:
        """A gradient has come to a parameter that is paid: reopen its window if that decay is
        gone."""
        grad = param.grad
        if grad is None:
            return
        evidence = hook.when_gradient_comes(
            grad, in_buckets=is_distributed(), out_of_place=torch.is_grad_enabled()
        )
        answer = self._table(hook)[evidence]
        if answer is Answer.ASK and self._witness.says_zeroed(hook, grad):
            self._reopen(hook, grad, zeroed_in_place=True)
        elif answer is Answer.PAY:
            self._reopen(hook, grad, zeroed_in_place=False)
        elif answer is Answer.REFUSE:
            hook.doubt()
        else:
            self._keep(hook, grad, changed=answer is Answer.ASK)

    def _reopen(self, hook: Hook, grad: Tensor, zeroed_in_place: bool) -> None:
        """The decay of this window is gone, and is due again."""
        if hook.rows is not None and not grad.is_sparse:
            self._tell("sparse-then-dense", hook)
        no_graph = torch.is_grad_enabled() and not grad.requires_grad
        if no_graph and self._state.config.in_gradient and not zeroed_in_place:
            self._tell("sums-without-graph", hook)
        hook.reopen(zeroed_in_place)

    def _keep(self, hook: Hook, grad: Tensor, changed: bool) -> None:
        """The decay of this window is there."""
        if not self._state.config.in_gradient:
            if not self._state.taken:  # the step of an engine that takes gradients is refused
                self._tell("second-gradient", hook)
            return
        hook.look(grad)  # now: a pass that raises has no end
        if changed and _is_change_by_user(hook, grad):
            self._tell("changed-between", hook)

    def _table(self, hook: Hook) -> dict[Evidence, Answer]:
        if self._state.config.in_gradient:
            return GRADIENT_COMES
        return SHRUNK_GRADIENT_COMES if hook.clock.announced else SHRUNK_UNANNOUNCED

    def _tell(self, rule: str, hook: Hook) -> None:
        self._rules.tell(rule, Facts(self._state, entry=hook))

    # ---------------------------------------------------------------- payment

    @never_compiled
    def end(self, task: int, first: Note, seen: int) -> None:
        """Pay for what a pass has noted.

        Args:
            task: the pass.
            first: what its first hook has noted, which may have been paid for at once.
            seen: version of that parameter then.
        """
        notes = self.notes.pop(task, [])
        param, hook, clock, steps = first
        waits = bool(notes) and notes[0][1] is hook
        # A pass inside this one may have paid for the parameter, which changes it too.
        due = waits and not hook.paid and _is_now(hook, clock, steps)
        if due and version(param) != seen:
            self._tell("moved-in-the-pass", hook)
        if notes:
            self.pay(notes)
        if not waits:
            self._look_for_takers(first)

    def _look_for_takers(self, first: Note) -> None:
        """Notice a gradient that was paid for at once, and taken away by a later hook."""
        state = self._state
        param, hook, clock, steps = first
        if state.pauses or param.grad is not None or not _is_now(hook, clock, steps):
            return
        if self.unannounced.has_moved(hook, param):
            return  # that hook has stepped the parameter
        if not state.config.in_gradient or hook.name in state.carried:
            state.taken.add(hook.name)
        state.carried.add(hook.name)

    def pay_now(self, notes: list[Note]) -> None:
        """Pay for the last note: another hook of the parameter comes next, and may step it."""
        if notes:
            self.pay([notes.pop()])

    def forget(self) -> None:
        """Forget the notes of passes that raised, which would keep parameters alive.

        The step pays what a pass of another thread has noted.
        """
        if graph_task_id() < 0:
            self.notes.clear()

    def pay(self, notes: list[Note]) -> None:
        """Pay for noted parameters whose gradient is there and holds no decay."""
        state = self._state
        dues: dict[Terms, Due] = {}
        terms: Terms | None = None
        for param, hook, clock, steps in reversed(notes):  # the last are in the cache still
            if hook.clock is not clock or clock.steps != steps:
                continue  # stepped meanwhile, and decayed by that step
            grad = param.grad
            if grad is None:
                state.taken.add(hook.name)
                continue
            if hook.stamp == steps and not grad.is_sparse:
                hook.look(grad)  # averaged since, or moved into a bucket
                continue
            if hook.buffer is None:
                hook.born = min(hook.born, version(grad))
            if hook.terms is not terms:  # neighbours mostly share their terms
                terms = hook.terms
                due = dues.setdefault(terms, Due(terms))
            due.params.append(param)  # `Due.add`, without a frame for each tensor
            due.grads.append(grad)
            due.entries.append(hook)
        begin(state, ((param, entry.memo) for due in dues.values() for param, _, entry in due))
        if dues and not state.pauses:
            pay(state, self._payable(dues), self._how)
        if not state.announced:
            param, hook, *_ = notes[0]
            self.unannounced.remember(hook, param)

    def _payable(self, dues: dict[Terms, Due]) -> list[Due]:
        """What can be paid now. A group that the optimizer decays itself is refused by its step."""
        if self._state.config.in_gradient:
            return list(dues.values())
        if self._refresh():
            dues = _sorted_anew(dues.values())
        payable = []
        for due in dues.values():
            known = due.terms.owner_group()
            if known is None or not decays_itself(known[1]):
                payable.append(due)
        return payable

    def _refresh(self) -> bool:
        """Look again at optimizers whose groups have changed: a learning rate belongs to a
        group."""
        before = [view.changes for view in self._state.optimizers.views()]
        for optimizer in self._state.optimizers.met():
            self._state.optimizers.meet(optimizer)
        return before != [view.changes for view in self._state.optimizers.views()]

    def _how(self, due: Due) -> How:
        config = self._state.config
        scale = None
        if config.in_gradient:
            scale = tensors.loss_scale(config.scaler, due.grads[0].device)
        capturable = is_capturable(due.terms.owner_group())
        capturing = tensors.is_capturing()
        return How(config.foreach, scale, None, capturable, capturing, by_autograd=True)


def _is_now(hook: Hook, clock: Clock, steps: int) -> bool:
    """No step of the parameter has ended since its gradient came."""
    return hook.clock is clock and clock.steps == steps


def _is_change_by_user(hook: Hook, grad: Tensor) -> bool:
    """A change that is seen for certain, and that torch's own machinery has not made."""
    by_torch = is_distributed() or in_compiled_autograd()
    return not (is_view(grad) or hook.blind or by_torch)


def _sorted_anew(dues: Iterable[Due]) -> dict[Terms, Due]:
    """The same parameters by the terms that they have now."""
    again: dict[Terms, Due] = {}
    for due in dues:
        for param, grad, entry in due:
            again.setdefault(entry.terms, Due(entry.terms)).add(param, grad, entry)
    return again


class _AtOnce(list[Note]):
    """Notes that are paid for as they come."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self._passes = passes

    def append(self, note: Note) -> None:
        self._passes.pay([note])


_PATIENCE = 1000  # passes: more than anybody accumulates, or looks at before training
