"""Exactly once: the state of one parameter between two optimizer steps.

A *window* runs from one finished ``optimizer.step()`` to the next. A `Window` remembers
whether its parameter was decayed in the window and, for coupled decay, which gradient
buffer holds that decay. It knows nothing of models, hooks or arithmetic.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Owner:
    """Counts the finished steps of one optimizer.

    Closing the windows of all its parameters is one addition, not one write per parameter.
    """

    __slots__ = ("finished", "heard", "steps")

    def __init__(self, heard: bool = True, finished: int = 0) -> None:
        self.steps = 0  # changes at the end of each window
        self.finished = finished  # those of the whole training, for a schedule of λ
        self.heard = heard  # False for an object whose steps nobody tells us of


class Window:
    """Whether one parameter still has to be decayed before the next step of its owner."""

    __slots__ = ("__weakref__", "blind", "buffer", "local", "owner", "rows", "stamp", "version")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.stamp = -1  # the value of `owner.steps` when the decay happened
        self.buffer: Any = None  # weak reference to the gradient that holds the decay
        self.version = 0  # of that gradient, when it was last looked at
        self.local = 0  # the version of its local shard, if it is sharded
        self.blind = False  # zeroing it may leave no trace in its version
        self.rows: Tensor | None = None  # sparse gradients: the rows that were decayed

    @property
    def decayed(self) -> bool:
        """Whether the decay of this window has happened."""
        return self.stamp == self.owner.steps

    def mark(self, grad: Tensor) -> None:
        """Note that the decay of this window has happened, and (if coupled) is in `grad`."""
        self.stamp = self.owner.steps
        self.buffer = weakref.ref(grad)
        self.version = grad._version
        self.local = local_version(grad)

    def reopen(self) -> None:
        """Forget the decay of this window: the buffer that held it was thrown away."""
        self.stamp = -1
        self.buffer = None
        self.rows = None

    def move(self, owner: Owner) -> None:
        """Let another optimizer close this window from now on."""
        if owner is not self.owner:
            self.stamp = owner.steps if self.decayed else -1
            self.owner = owner

    def holds(self, grad: Tensor) -> bool | None:
        """Whether `grad`, just accumulated by autograd, already holds this window's decay.

        Returns:
            True if it does, False if it is fresh, and None if the buffer is the marked one but
            something else changed it since: ``zero_grad(set_to_none=False)`` threw the decay
            away, clipping or an all-reduce did not, and the buffer alone cannot tell.
        """
        if not self.decayed:
            return False
        marked = self.buffer()
        if grad._is_view():
            # A slice of a flat buffer (DDP's bucket, FSDP's shard). All slices share one version
            # counter, so it tells nothing, and DDP swaps a plain gradient for its slice unseen.
            self.mark(grad)
            return None
        if marked is not grad:
            if not _is_sum(grad):
                return False
            self.mark(grad)  # the step looks for this one
            return True
        changes, self.version = grad._version - self.version, grad._version
        # Autograd's own accumulation is one change. FSDP2's is none: it is one of the local shard, which counts apart.
        known, self.local = self.local, local_version(grad)
        return True if changes <= (self.local == known) and not self.blind else None

    def was_touched(self, grad: Tensor) -> bool:
        """Whether the marked buffer is still in place but was changed since it was looked at."""
        marked = self.buffer() if self.decayed else None
        if grad._is_view():
            return self.decayed
        return marked is grad and (self.blind or grad._version != self.version)


def local_version(grad: Tensor) -> int:
    """The version of what this rank holds of a sharded gradient (DTensor); 0 for any other."""
    local = getattr(grad, "_local_tensor", None)
    return 0 if local is None else local._version


def _is_sum(grad: Tensor) -> bool:
    """Whether autograd made `grad` by adding to an older one out of place.

    It does so under ``backward(create_graph=True)``, where a *first* gradient is a copy instead.
    """
    return grad.grad_fn is not None and grad.grad_fn.name() == "AddBackward0"
