"""The window as a state machine: every string of events, without a model, by the table of
transitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from wdhook._decay import window as rules
from wdhook._decay.window import Answer, Clock, Evidence, Window

DECAY, GRADIENT = 1000.0, 1.0
BACKWARD, STEP, NONE, ZERO = "bsn0"


class Machine:
    """A parameter's gradient under events, decayed as a `Window` and the tables say.

    Where the answer is to ask, the machine answers from what really happened, as the engine does
    from the content of the other gradients.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.window = Window(self.clock)
        self.grad: torch.Tensor | None = None
        self.zeroed = False
        self.read: list[float | None] = []
        self.seen: set[Evidence] = set()

    def pay(self) -> None:
        self.grad.add_(DECAY)
        self.window.pay(self.grad)

    def backward(self) -> None:
        self.grad = torch.tensor(GRADIENT) if self.grad is None else self.grad.add_(GRADIENT)
        evidence = self.window.when_gradient_comes(self.grad)
        self.seen.add(evidence)
        answer = rules.GRADIENT_COMES[evidence]
        if answer is Answer.ASK:
            answer = Answer.PAY if self.zeroed else Answer.PAID
        if answer is Answer.PAY:
            self.window.reopen()
            self.pay()
        else:
            self.window.look(self.grad)
        self.zeroed = False

    def step(self) -> None:
        if self.grad is not None:
            evidence = self.window.when_step_begins(self.grad)
            self.seen.add(evidence)
            answer = rules.STEP_AFTER_HOOK[evidence]
            assert answer is not Answer.REFUSE
            if answer is Answer.PAY:
                self.pay()
            self.window.look(self.grad)
        self.read.append(None if self.grad is None else self.grad.item())
        self.clock.steps += 1

    def feed(self, event: str) -> None:
        if event == BACKWARD:
            self.backward()
        elif event == STEP:
            self.step()
        elif event == NONE:
            self.grad = None
        elif self.grad is not None:
            self.grad.zero_()
            self.zeroed = True


def oracle(events: str) -> list[float | None]:
    """What the optimizer reads at each step if ½λ‖p‖² is part of the loss once per step. Numbers
    only."""
    read: list[float | None] = []
    grad: float | None = None
    paid = False  # the penalty of this window is in the buffer
    touched = False  # some penalty was paid in this window, whatever became of the buffer
    carried = False  # the buffer is the one that was stepped last, and nobody has changed it since
    for event in events:
        if event == BACKWARD:
            grad = (grad or 0.0) + GRADIENT
            if not paid:
                grad += DECAY
            paid = touched = True
            carried = False
        elif event == STEP:
            if grad is not None and not touched and not carried:
                grad += DECAY  # a gradient that no backward pass of this window has decayed
            read.append(grad)
            paid = touched = False
            carried = grad is not None
        else:
            carried = carried and grad is None
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


def test_the_strings_meet_the_evidence() -> None:
    """The strings above meet each kind of evidence that one parameter and these events can make."""
    seen: set[Evidence] = set()
    for events in strings(6):
        machine = Machine()
        for event in events:
            machine.feed(event)
        seen |= machine.seen
    assert seen == set(Evidence) - {
        Evidence.SUM,
        Evidence.REPLACED,
        Evidence.SEVERAL,
        Evidence.UNKNOWN,
    }


FAULTS = ["never marks", "never closes", "ignores fresh buffers", "pays for each gradient"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_window_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails for a window that forgets, one that never ends and one without
    identity."""
    if fault == "never marks":
        monkeypatch.setattr(Window, "pay", lambda self, grad: None)
    elif fault == "never closes":
        monkeypatch.setattr(Window, "paid", property(lambda self: self.stamp >= 0))
    elif fault == "ignores fresh buffers":
        monkeypatch.setitem(rules.GRADIENT_COMES, Evidence.FRESH, Answer.PAID)
    else:
        monkeypatch.setitem(rules.GRADIENT_COMES, Evidence.SAME, Answer.PAY)
    with pytest.raises(AssertionError):
        test_every_string_of_events_up_to_length_seven()


def test_every_evidence_has_an_answer() -> None:
    """No table lacks a row that its question can lead to."""
    at_the_step = set(Evidence) - {Evidence.SUM, Evidence.FRESH}
    assert set(rules.GRADIENT_COMES) == set(Evidence)
    assert set(rules.SHRUNK_GRADIENT_COMES) == set(rules.SHRUNK_UNANNOUNCED) == set(Evidence)
    assert set(rules.STEP_AFTER_HOOK) == set(rules.STEP_ALONE) == at_the_step


def test_a_window_moves_with_its_state() -> None:
    """Another optimizer takes over a parameter in mid-window without a second decay."""
    first, second = Clock(), Clock()
    second.steps = 7
    window = Window(first)
    window.move(second)
    assert not window.paid
    window.pay(torch.zeros(1))
    window.move(first)
    assert window.paid
    first.steps += 1
    assert not window.paid


def test_a_plain_sum_is_told_from_a_change_in_place() -> None:
    """One change is autograd's own accumulation; more than one is somebody else's, and is not
    guessed at."""
    window, grad = Window(Clock()), torch.zeros(2)
    window.pay(grad)
    grad.add_(1)
    assert window.when_gradient_comes(grad) is Evidence.SAME
    grad.mul_(0.5)
    grad.add_(1)
    assert window.when_gradient_comes(grad) is Evidence.CHANGED
    window.look(grad)
    grad.add_(1)
    assert window.when_gradient_comes(grad) is Evidence.SAME


def test_a_slice_of_a_flat_buffer_is_not_guessed_at() -> None:
    """All slices of a buffer share one version, so that it tells nothing of one of them."""
    window, part = Window(Clock()), torch.zeros(4)[:2]
    window.pay(part)
    assert window.when_gradient_comes(part) is Evidence.CHANGED
    assert window.when_gradient_comes(torch.zeros(2)) is Evidence.FRESH


def test_a_gradient_that_somebody_put_there() -> None:
    """Autograd adds in place to such a gradient, which shows; in a new one nothing was changed in
    place."""
    window = Window(Clock())
    window.pay(torch.zeros(2))
    assert window.when_gradient_comes(torch.zeros(2)) is Evidence.FRESH
    assert window.when_gradient_comes(torch.zeros(2).add_(1)) is Evidence.UNKNOWN
    compiled = Window(Clock())
    made = torch.zeros(2).add_(1)  # torch.compile makes gradients of version 1
    compiled.born = 1
    compiled.pay(made)
    assert compiled.when_gradient_comes(torch.zeros(2).add_(1)) is Evidence.FRESH


def test_a_gradient_that_was_replaced_before_the_step() -> None:
    """After one payment it may be derived from the decayed one; after several nobody can tell."""
    window, first, second = Window(Clock()), torch.zeros(2), torch.zeros(2)
    window.pay(first)
    assert window.when_step_begins(torch.zeros(2)) is Evidence.REPLACED
    window.reopen(zeroed_in_place=True)
    window.pay(first)
    assert window.when_step_begins(torch.zeros(2)) is Evidence.REPLACED
    window.reopen()
    window.pay(second)
    assert window.when_step_begins(second) is Evidence.SAME
    assert window.when_step_begins(torch.zeros(2)) is Evidence.SEVERAL
