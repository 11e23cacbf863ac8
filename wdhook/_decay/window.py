"""Exactly once: has the decay of this optimizer step been paid for one parameter?

A *window* runs from one finished ``optimizer.step()`` to the next. Two questions are asked in it:
when a gradient has come (by the hook: `GRADIENT_COMES`), and when a step begins
(`STEP_AFTER_HOOK`, `STEP_ALONE`). Decay that lives in a gradient buffer shares the buffer's fate;
decay that lives in the parameter cannot be lost, and has short tables (`SHRUNK_GRADIENT_COMES`,
`SHRUNK_UNANNOUNCED`). Nothing here knows models, hooks or arithmetic.
"""

from __future__ import annotations

import enum
import weakref

from torch import Tensor

from .._base.torch_private import is_view, local_version, version


class Clock:
    """Counts the finished steps of one optimizer, and holds the λ of its next one.

    Closing the windows of all its parameters is one addition, not one write for each.

    Attributes:
        steps: finished steps; a change ends every window of the clock.
        finished: finished steps of the whole training, which a schedule of λ is a function of.
        announced: False for an object whose steps torch does not announce.
        weight_decay: λ of the parameters that have none of their own.
    """

    __slots__ = ("__weakref__", "announced", "finished", "steps", "weight_decay")

    def __init__(self, weight_decay: float = 0.0, announced: bool = True, finished: int = 0):
        self.steps = 0
        self.finished = finished
        self.announced = announced
        self.weight_decay = weight_decay


class Evidence(enum.Enum):
    """Facts about a window and the gradient that is there now."""

    UNPAID = "no decay in this window"
    CARRIED = "no decay in this window; the gradient and its version are those of the last payment"
    SAME = "paid; the same buffer, changed by nothing but autograd's additions"
    CHANGED = "paid; the same buffer, changed in another way, or in a way that leaves no version"
    SUM = "paid; another buffer, which autograd made by adding to the one before"
    FRESH = "paid; another buffer, which autograd has just made"
    REPLACED = "paid once; another buffer, which somebody put there"
    SEVERAL = "paid more than once, into several buffers; another one is there"
    UNKNOWN = "somebody replaced the gradient, and autograd has added to the new one"


class Answer(enum.Enum):
    """Answers to both questions."""

    PAY = "decay now"
    PAID = "the decay is there"
    ASK = "zeroed, or changed? look at other gradients"
    TELL = "taken to be there; warn"
    REFUSE = "nobody can tell: raise before the update"


E, A = Evidence, Answer

GRADIENT_COMES = {
    E.UNPAID: A.PAY,
    E.CARRIED: A.PAY,
    E.SAME: A.PAID,
    E.CHANGED: A.ASK,
    E.SUM: A.PAID,
    E.FRESH: A.PAY,
    E.REPLACED: A.REFUSE,
    E.SEVERAL: A.REFUSE,
    E.UNKNOWN: A.REFUSE,
}
"""A hook has been called. The hook's own short cut agrees: tests/decay/test_window.py."""

STEP_AFTER_HOOK = {
    E.UNPAID: A.PAY,
    E.CARRIED: A.TELL,
    E.SAME: A.PAID,
    E.CHANGED: A.PAID,
    E.REPLACED: A.TELL,
    E.SEVERAL: A.REFUSE,
    E.UNKNOWN: A.REFUSE,
}
"""A step begins, and the parameter has a hook, which has seen its gradients."""

STEP_ALONE = {
    E.UNPAID: A.PAY,
    E.CARRIED: A.TELL,
    E.SAME: A.PAID,
    E.CHANGED: A.PAY,
    E.REPLACED: A.PAY,
    E.SEVERAL: A.PAY,
    E.UNKNOWN: A.REFUSE,
}
"""A step begins, and no hook has seen the gradients. Paid means: by a step that raised or still
runs."""


SHRUNK_GRADIENT_COMES = dict.fromkeys(E, A.PAID) | {E.UNPAID: A.PAY, E.CARRIED: A.PAY}
"""A hook has been called; the decay lives in the parameter."""

SHRUNK_UNANNOUNCED = SHRUNK_GRADIENT_COMES | {E.FRESH: A.PAY, E.CHANGED: A.ASK}
"""As above, for an optimizer whose steps nobody announces: a fresh or zeroed gradient tells of
one."""


class Window:
    """The state of one parameter between two steps of its optimizer."""

    __slots__ = (
        "__weakref__",
        "blind",
        "born",
        "buffer",
        "clock",
        "doubted",
        "local",
        "lost",
        "rows",
        "stamp",
        "version",
    )

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stamp = -1  # the value of `clock.steps` at the last payment
        self.buffer: weakref.ref[Tensor] | None = None  # the gradient of the last payment
        self.version = 0  # of that gradient, when it was last looked at
        self.born = _NEVER  # the lowest version that a new gradient had
        self.local = 0  # the version of its local shard, if it is a DTensor
        # The values of `clock.steps` when a paid buffer was given up, and may have been moved; and
        # when autograd added to a gradient that somebody had put there.
        self.lost = -1
        self.doubted = -1
        self.blind = False  # zeroing may leave no version: a foreach kernel on a DTensor
        self.rows: Tensor | None = None  # sparse gradients: the rows that were decayed

    @property
    def paid(self) -> bool:
        """The decay of this window has been paid."""
        return self.stamp == self.clock.steps

    @property
    def unknown(self) -> bool:
        """Nobody can tell how often the gradient holds the decay of this window."""
        return self.doubted == self.clock.steps

    def pay(self, grad: Tensor) -> None:
        """Note a payment; `grad` is the gradient that was there."""
        self.stamp = self.clock.steps
        self.look(grad)

    def holds(self, grad: Tensor) -> bool:
        """The last payment was made into this very gradient."""
        return self.buffer is not None and self.buffer() is grad

    def doubt(self) -> None:
        """Note that nobody can tell how often the gradient holds the decay of this window."""
        self.doubted = self.clock.steps

    def look(self, grad: Tensor) -> None:
        """Note the gradient and its version, so that later changes can be told."""
        if not self.holds(grad):
            self.buffer = weakref.ref(grad)
        self.version = version(grad)
        self.local = local_version(grad)

    def reopen(self, zeroed_in_place: bool = False) -> None:
        """Forget the payment of this window: the decay was thrown away with the gradient.

        Args:
            zeroed_in_place: the decay is gone for certain. A buffer that autograd replaced may
                have been moved.
        """
        if not zeroed_in_place and self.paid:
            self.lost = self.clock.steps
        self.stamp = self.doubted = -1
        self.buffer = None
        self.rows = None

    def move(self, clock: Clock) -> None:
        """Let another optimizer close this window from now on."""
        if clock is not self.clock:
            for name in ("stamp", "lost", "doubted"):
                holds = getattr(self, name) == self.clock.steps
                setattr(self, name, clock.steps if holds else -1)
            self.clock = clock

    # ---------------------------------------------------------------- evidence

    def when_gradient_comes(
        self, grad: Tensor, in_buckets: bool = False, out_of_place: bool = False
    ) -> Evidence:
        """Evidence after autograd has added to `grad`, for decay that lives in gradients.

        Args:
            grad: the gradient as it is in the hook.
            in_buckets: views are slices of the buckets of a distributed run, which are made anew
                at times.
            out_of_place: autograd changes no gradient in place, as under
                ``backward(create_graph=True)``.
        """
        if not self.paid:
            return E.UNPAID
        if self.holds(grad):
            return self._of_same(grad)
        if in_buckets and is_view(grad):
            return E.CHANGED
        if _is_sum(grad):
            return E.SUM
        if out_of_place or self._is_fresh(grad):
            return E.FRESH
        return E.UNKNOWN

    def _is_fresh(self, grad: Tensor) -> bool:
        """Tell a gradient that autograd has just made: nothing has changed it in place.

        Autograd adds in place to a gradient that somebody has put there. Versions of new gradients
        start at 0, and at 1 where torch.compile makes them. Sharded gradients (DTensor) are made by
        FSDP, and sparse ones by additions out of place.
        """
        if type(grad) is not Tensor or grad.is_sparse:
            return True
        return version(grad) <= (0 if self.born is _NEVER else self.born)

    def _of_same(self, grad: Tensor) -> Evidence:
        """Evidence where the buffer is the one that was paid into, and autograd has added to it."""
        if self.unknown:
            return E.UNKNOWN
        if is_view(grad) or self.blind:
            return E.CHANGED  # slices of one buffer share a version, which tells nothing of one
        # Autograd's addition is one change. FSDP2's is none: it changes the local shard, which
        # counts apart.
        expected = 1 if local_version(grad) == self.local else 0
        return E.SAME if version(grad) - self.version <= expected else E.CHANGED

    def when_step_begins(self, grad: Tensor, in_buckets: bool = False) -> Evidence:
        """Evidence as a step begins, for decay that lives in gradients; arguments as above."""
        same = self.holds(grad)
        unchanged = same and self.version == version(grad)
        if not self.paid:
            return E.CARRIED if unchanged else E.UNPAID
        if self.unknown:
            return E.UNKNOWN
        if same:
            return E.SAME if unchanged else E.CHANGED
        if in_buckets and is_view(grad):
            return E.CHANGED
        return E.SEVERAL if self.lost == self.clock.steps else E.REPLACED

    def was_touched(self, grad: Tensor) -> bool:
        """The paid buffer is in its place, and was changed since the last look."""
        if not self.paid:
            return False
        if is_view(grad):
            return True
        same = self.holds(grad)
        return same and (self.blind or version(grad) != self.version)


def _is_sum(grad: Tensor) -> bool:
    """Tell a gradient that autograd made by adding to an older one out of place.

    Autograd does so under ``backward(create_graph=True)``, where a *first* gradient is a copy
    instead.
    """
    return grad.grad_fn is not None and grad.grad_fn.name() == "AddBackward0"


_NEVER = 1 << 60  # a version that no gradient has
