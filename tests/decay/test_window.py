"""The window as a state machine: every string of events, without a model."""

from __future__ import annotations

import itertools

import pytest
import torch

from wdhook._decay.window import Owner, Window

DECAY, GRADIENT = 1000.0, 1.0
BACKWARD, STEP, NONE, ZERO = "bsn0"


class Machine:
    """A parameter's gradient under events, decayed by a `Window` as the hook and the net at the step do it.

    Where the buffer alone cannot tell (`None`), the machine answers from what really happened, as the engine
    does from the content of the other gradients.
    """

    def __init__(self) -> None:
        self.owner = Owner()
        self.window = Window(self.owner)
        self.grad: torch.Tensor | None = None
        self.zeroed = False
        self.read: list[float | None] = []

    def decay(self) -> None:
        self.grad.add_(DECAY)
        self.window.mark(self.grad)

    def feed(self, event: str) -> None:
        if event == BACKWARD:
            self.grad = torch.tensor(GRADIENT) if self.grad is None else self.grad.add_(GRADIENT)
            held = self.window.holds(self.grad)
            if not (not self.zeroed if held is None else held):
                self.decay()
            self.zeroed = False
        elif event == STEP:
            if self.grad is not None and not self.window.decayed:
                self.decay()
            self.read.append(None if self.grad is None else self.grad.item())
            self.owner.steps += 1
        elif event == NONE:
            self.grad = None
        elif self.grad is not None:
            self.grad.zero_()
            self.zeroed = True


def oracle(events: str) -> list[float | None]:
    """What the optimizer reads at each step if ½λ‖p‖² is part of the loss once per step. Numbers only."""
    read: list[float | None] = []
    grad: float | None = None
    paid = False  # the penalty of this window is in the buffer
    touched = False  # some penalty was paid in this window, whatever became of the buffer
    for event in events:
        if event == BACKWARD:
            grad = (grad or 0.0) + GRADIENT
            if not paid:
                grad += DECAY
            paid = touched = True
        elif event == STEP:
            if grad is not None and not touched:
                grad += (
                    DECAY  # the net: a gradient that no backward pass of this window has decayed
                )
            read.append(grad)
            paid = touched = False
        else:
            grad = None if event == NONE or grad is None else 0.0
            paid = False
    return read


def strings(longest: int) -> list[str]:
    return ["".join(s) for n in range(1, longest + 1) for s in itertools.product("bsn0", repeat=n)]


def test_every_string_of_events_up_to_length_seven() -> None:
    """What the optimizer reads holds λ·p exactly once, whatever the order of events."""
    assert len(strings(7)) == sum(4**n for n in range(1, 8))
    for events in strings(7):
        machine = Machine()
        for event in events:
            machine.feed(event)
        assert machine.read == oracle(events), events


@pytest.mark.parametrize("fault", ["never marks", "never closes", "ignores fresh buffers"])
def test_a_faulty_window_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails for a window that forgets, one that never ends and one without identity."""
    if fault == "never marks":
        monkeypatch.setattr(Window, "mark", lambda self, grad: None)
    elif fault == "never closes":
        monkeypatch.setattr(Owner, "__init__", lambda self: setattr(self, "steps", 0))
        monkeypatch.setattr(Window, "decayed", property(lambda self: self.stamp >= 0))
    else:
        monkeypatch.setattr(Window, "holds", lambda self, grad: self.decayed)
    with pytest.raises(AssertionError):
        test_every_string_of_events_up_to_length_seven()


def test_a_window_moves_with_its_state() -> None:
    """Another optimizer takes over a parameter in mid-window without a second decay."""
    first, second = Owner(), Owner()
    second.steps = 7
    window = Window(first)
    window.move(second)
    assert not window.decayed
    window.mark(torch.zeros(1))
    window.move(first)
    assert window.decayed
    first.steps += 1
    assert not window.decayed


def test_a_plain_sum_is_told_from_a_change_in_place() -> None:
    """One change is autograd's own accumulation; more than one is somebody else's, and is not guessed at."""
    window, grad = Window(Owner()), torch.zeros(2)
    window.mark(grad)
    grad.add_(1)
    assert window.holds(grad) is True
    grad.mul_(0.5)
    grad.add_(1)
    assert window.holds(grad) is None
    assert window.holds(grad) is True


def test_a_slice_of_a_flat_buffer_is_not_guessed_at() -> None:
    """DDP replaces a gradient by a slice of its bucket, whose version counter the whole bucket shares."""
    window, flat = Window(Owner()), torch.zeros(4)
    window.mark(torch.zeros(2))
    assert window.holds(flat[:2]) is None
    assert window.holds(torch.zeros(2)) is False
