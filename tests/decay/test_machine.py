"""An attack on the promise: hypothesis mixes the events of training loops, and a slow twin keeps
the books."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from machine_draws import CONFIGS, Config
from machine_twin import Twin
from machine_world import Subject, World

import wdhook
from wdhook._decay import passes, payment, rate, steps, tensors, window
from wdhook._decay.rules import base as rules

# A long run: WDHOOK_EXAMPLES=20000 python -m pytest tests/decay/test_machine.py -k mix
# --hypothesis-seed=1
EXAMPLES = int(os.environ.get("WDHOOK_EXAMPLES", "0"))
RUNS = {"max_examples": EXAMPLES or 100, "stateful_step_count": 25, "derandomize": not EXAMPLES}
PROFILE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **RUNS)
PHRASES = {
    "second gradient": "got a second gradient before the optimizer stepped",
    "replaced": "A gradient was replaced between its decay",
    "alone": "and no other gradient tells whether it was zeroed",
    "changed": "was changed in place (clipped, scaled) before another backward",
    "again": "A gradient was stepped again",
}
FIRST_OR_LAST = st.sampled_from([0, -1])
BATCHES = st.integers(0, 4)
REACHES = st.sampled_from(["both", "one", "two"])
ITERATIONS = {
    "batch": BATCHES,
    "reach": st.lists(REACHES, min_size=1, max_size=3),  # of each micro-batch
    "clip": st.sampled_from([None, None, "last", "each"]),
    "to_none": st.booleans(),
}


class Machine(RuleBasedStateMachine):
    """Each rule is an event in both worlds; after each, parameters, gradients and buffers are the
    same bits."""

    @initialize(config=CONFIGS)
    def start(self, config: Config) -> None:
        model = config.build()
        self.config = config
        self.twin = Twin(copy.deepcopy(model), config)
        for prefix in (
            "one.",
            "two.",
        ):  # exceptions that leave nothing to decay are an error, tested elsewhere
            if not any(self.twin.eligible(n) for n in self.twin.params() if n.startswith(prefix)):
                self.twin.own = {n: v for n, v in self.twin.own.items() if not n.startswith(prefix)}
        self.subject = Subject(model, config, self.twin.own)
        self.in_backward = config.mode != "coupled" and config.at == "backward"
        self.spoiled: set[str] = set()  # gradients that were un-scaled, and have to be zeroed
        self.saved: Any = None
        self.attached()

    def attached(self) -> None:
        self.found = Counter[str]()  # warnings
        self.pausing = [ExitStack() for _ in self.config.λ]
        self.must = {
            n for n in self.trained() if self.config.at == "backward" and self.twin.eligible(n)
        }

    def trained(self) -> set[str]:
        return {n for n, p in self.subject.params().items() if p.requires_grad}

    def teardown(self) -> None:
        for handle in self.subject.handles if hasattr(self, "subject") else ():
            handle.remove()

    def do(self, event: Callable[[World], object]) -> None:
        """One event, in both worlds."""
        self.twin.hooked = self.subject.hooked()
        self.twin.theirs = self.subject.grads
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            event(self.subject)
        self.found.update(
            str(w.message) for w in caught if issubclass(w.category, wdhook.WdhookWarning)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            event(self.twin)
        self.compare()

    def compare(self) -> None:
        """Raise unless bits, warnings and hooks are what they have to be."""
        assert_same(self.subject.model.state_dict(), self.twin.model.state_dict(), set())
        assert_same(self.subject.grads(), self.twin.grads(), self.spoiled)
        promised = Counter(which for which, _ in self.twin.warnings)
        heard = {
            which: sum(n for text, n in self.found.items() if phrase in text)
            for which, phrase in PHRASES.items()
        }
        assert +Counter(heard) == promised, f"{self.found} where {promised} is promised"
        assert sum(self.found.values()) == sum(heard.values()), f"not promised: {self.found}"
        assert self.must & self.trained() <= self.subject.hooked(), "a parameter without a hook"

    def index(self, index: int | None) -> int | None:
        return None if index is None else index % len(self.twin.optimizers)

    def name(self, which: int) -> str:
        names = list(self.twin.params())
        return names[which % len(names)]

    # ---------------------------------------------------------------- the loop

    @rule(batch=BATCHES, reach=REACHES)
    def backward(self, batch: int, reach: str, how: str = "plain") -> None:
        self.zero_what_is_refused()
        self.do(lambda world: world.backward(batch, reach, how))

    def zero_what_is_refused(self) -> None:
        """Adding to a gradient that was put there is refused by the step, as test_rules shows."""
        accounts = self.twin.accounts.values()
        # Each is judged by its neighbours, who may have fared otherwise.
        if self.twin.is_mixed() or any(account.derived for account in accounts):
            self.zero(None, True)

    @rule(batch=BATCHES, reach=REACHES, how=st.sampled_from(["twice", "create_graph", "raises"]))
    def odd_backward(self, batch: int, reach: str, how: str) -> None:
        if self.config.mode != "coupled" and (
            how == "create_graph" or (how == "twice" and self.in_backward)
        ):
            return  # errors of the step and of autograd, tested elsewhere
        if how == "create_graph" and any(
            a.derived or a.changed for a in self.twin.accounts.values()
        ):
            return  # autograd adds out of place: nobody can tell what became of the older buffer
        self.backward(batch, reach, how)

    @rule(index=st.sampled_from([None, 0, -1]), to_none=st.booleans())
    def zero(self, index: int | None, to_none: bool) -> None:
        self.do(lambda world: world.zero(self.index(index), to_none))
        self.spoiled -= set(self.twin.params() if index is None else self.twin.places[index])

    @rule(index=st.sampled_from([None, 0, -1]), how=st.sampled_from(["norm", "value"]))
    def clip(self, index: int | None, how: str) -> None:
        self.do(lambda world: world.clip(self.index(index), how))

    @precondition(lambda self: self.twin.scaler is None)
    @rule(
        index=FIRST_OR_LAST,
        batch=BATCHES,
        closure=st.sampled_from([None, None, "to_none", "in place", "goes on"]),
    )
    def step(self, index: int, batch: int, closure: str | None) -> None:
        def evaluate(world: World) -> None:
            if closure != "goes on":
                world.zero(self.index(index), closure == "to_none")
            world.backward(batch, "both", "plain")

        if closure:
            self.zero_what_is_refused()
        if closure == "in place" and any(a.changed for a in self.twin.accounts.values()):
            self.zero(None, True)  # some would be zeroed and others not, of one handle
        if self.config.at == "backward":  # from its first step on a parameter has a hook
            self.must |= {n for n in self.twin.due(self.index(index)) if n in self.trained()}
        self.do(lambda world: world.step(self.index(index), evaluate if closure else None))

    @rule(**ITERATIONS)
    def iterate(
        self, batch: int, reach: list[str], clip: str | None, to_none: bool, how: str = "plain"
    ) -> None:
        """The loop that everybody writes; with an overflow in the last of the micro-batches,
        perhaps."""
        self.accumulate(batch, reach, clip, to_none, how)
        if self.twin.scaler is not None:
            self.scaled_step([0, -1], clip == "last")
        for index in range(len(self.twin.optimizers)) if self.twin.scaler is None else ():
            self.step(index, batch, None)

    def accumulate(
        self, batch: int, reach: list[str], clip: str | None, to_none: bool, how: str
    ) -> None:
        self.zero(None, to_none)
        for i, part in enumerate(reach, start=1):
            self.backward((batch + i) % 5, part, how if i == len(reach) else "plain")
            if clip == "each" or (clip and i == len(reach) and self.twin.scaler is None):
                self.clip(None, "value")

    @rule(**ITERATIONS)
    def skip(self, batch: int, reach: list[str], clip: str | None, to_none: bool) -> None:
        """An iteration whose step is not taken."""
        if self.config.scale:
            self.iterate(batch, reach, clip, True, "overflow")
            self.zero(None, to_none)
        else:
            self.accumulate(batch, reach, clip, to_none, "plain")

    @precondition(lambda self: self.twin.scaler is None)
    @rule(index=FIRST_OR_LAST, which=st.none() | st.integers(0, 30))
    def hooked_step(self, index: int, which: int | None) -> None:
        """The user has a step pre-hook, which clips the gradients or brings one."""
        brought = None if which is None else self.name(which)
        if brought and self.twin.accounts[brought].payments > 1:
            return  # refused by the step, as test_rules shows
        if self.config.at == "backward":
            self.must |= {n for n in self.twin.due(self.index(index)) if n in self.trained()}
        self.do(lambda world: world.hooked_step(self.index(index), brought))

    @precondition(lambda self: self.twin.scaler is None)
    @rule(index=FIRST_OR_LAST)
    def wrapped_step(self, index: int) -> None:
        if self.config.at == "backward":
            self.must |= {n for n in self.twin.due(self.index(index)) if n in self.trained()}
        self.do(lambda world: world.wrapped_step(self.index(index)))

    @precondition(lambda self: self.twin.scaler is None)
    @rule(
        index=FIRST_OR_LAST,
        then=st.sampled_from(["again", "zero", "to_none", "go on"]),
        wrapped=st.booleans(),
    )
    def step_that_raises(self, index: int, then: str, wrapped: bool) -> None:
        accounts = [self.twin.accounts[n] for n in self.twin.places[index]]
        if any(account.kept or account.lost for account in accounts):
            return  # a step that reads nothing new
        self.do(lambda world: world.fail(self.index(index), wrapped))
        if then == "again" or (then == "go on" and self.config.at == "step"):
            self.step(index, 0, None)  # at "step" what is added to these gradients cannot be seen
        elif then != "go on":
            self.zero(index, then == "to_none")

    @precondition(lambda self: self.twin.scaler is not None)
    @rule(which=st.sampled_from([[0], [-1], [0, -1]]), clip=st.booleans())
    def scaled_step(self, which: list[int], clip: bool) -> None:
        waiting = set(self.twin.grads())
        owned = {self.index(i): waiting & set(self.twin.places[i]) for i in which}
        indices = [i for i, names in owned.items() if names and not names & self.spoiled]
        for index in indices:
            if not all(
                grad.isfinite().all() for n, grad in self.twin.grads().items() if n in owned[index]
            ):
                self.spoiled |= owned[
                    index
                ]  # a fused optimizer skips the step on the device, after the decay
            self.do(lambda world, index=index: world.scaled_step(index, clip))
        if indices:
            self.do(lambda world: world.scaler.update())
            self.spoiled |= waiting if self.config.scale else set()

    @rule(index=FIRST_OR_LAST, factor=st.sampled_from([None, 0.5, 1.5, 1.0]), by_hand=st.booleans())
    def change_optimizer(self, index: int, factor: float | None, by_hand: bool) -> None:
        """A scheduler, or a checkpoint."""
        if factor is None:
            self.do(lambda world: world.reload(self.index(index)))
        else:
            self.do(lambda world: world.schedule(self.index(index), factor, by_hand))

    @rule(index=FIRST_OR_LAST, how=st.sampled_from(["reverse", "delete and add"]))
    def reorder(self, index: int, how: str) -> None:
        groups = self.twin.optimizers[index].param_groups
        if len({group.get("maximize") for group in groups}) > 1:
            return  # a backward pass would take the sign of another group, and the step refuse it
        self.do(lambda world: world.reorder(self.index(index), how))

    @precondition(lambda self: self.config.given)
    @rule(index=FIRST_OR_LAST)
    def turn(self, index: int) -> None:
        """The optimizer maximizes from now on, or no longer."""
        if "maximize" not in self.twin.optimizers[index].param_groups[0]:
            return
        if self.config.shared:
            return  # nobody can say whose sign counts
        self.zero(None, True)  # a decay with the old sign is an error of the step, tested elsewhere
        self.do(lambda world: world.turn(self.index(index)))

    @rule(part=st.sampled_from(["one", "two"]), how=st.sampled_from(["insert", "wrap", "delete"]))
    def operate(self, part: str, how: str) -> None:
        """Layers are inserted, wrapped, deleted: other parameters have the names that some had."""
        before = {id(p): n for n, p in self.subject.params().items()}
        must, spoiled, self.must = self.must, self.spoiled, set()
        self.do(lambda world: world.operate(part, how))
        names = {before[id(p)]: n for n, p in self.subject.params().items()}
        self.must = {names[n] for n in must}
        self.spoiled = {names[n] for n in spoiled}
        self.compare()

    @rule(batch=BATCHES, copied=st.booleans())
    def look_elsewhere(self, batch: int, copied: bool) -> None:
        """autograd.grad accumulates nothing; a copy of the model has no hooks, and its steps are
        none of ours."""
        model = copy.deepcopy(self.subject.model) if copied else self.subject.model
        model.eval()
        loss = model(torch.full((4, 4), float(batch)).to(model.mix), "both", False).sum()
        model.train()
        params = [p for p in model.parameters() if p.requires_grad]
        grads = (
            torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
            if params
            else ()
        )
        if params and copied:
            expected = [
                p.detach() if g is None else p.detach() - 0.5 * g
                for p, g in zip(params, grads, strict=True)
            ]
            loss.backward()
            torch.optim.SGD(params, lr=0.5).step()
            assert_same(dict(enumerate(params)), dict(enumerate(expected)), set())
        self.compare()

    # ---------------------------------------------------------------- parameters

    @rule(
        which=st.sampled_from(["one.", "two."]) | st.integers(0, 30),
        frozen=st.sampled_from([False, False, True]),
    )
    def freeze(self, which: str | int, frozen: bool) -> None:
        start = which if isinstance(which, str) else self.name(which)
        names = [n for n in self.twin.params() if n.startswith(start)]
        self.do(lambda world: world.freeze(names, frozen))

    @precondition(lambda self: not self.twin.scaler)
    @rule(which=st.integers(0, 30), derived=st.booleans())
    def set_grad(self, which: int, derived: bool) -> None:
        if self.twin.accounts[self.name(which)].payments > 1:
            return  # refused by the step, as test_rules shows
        self.do(lambda world: world.set_grad(self.name(which), derived))

    @rule(how=st.sampled_from(["replace", "assign", "grow"]), which=st.integers(0, 30))
    def change_parameters(self, how: str, which: int) -> None:
        name = self.name(which)
        if how == "replace":
            self.zero(None, True)  # gradients of the older one could still tell what was zeroed
            self.must.discard(name)
            self.do(lambda world: world.replace(name))
        elif how == "assign":
            self.must, self.saved = set(), None
            self.do(lambda world: world.assign())
            if (
                self.in_backward or self.config.mode == "independent"
            ):  # lr is that of another optimizer now
                self.reattach(False)
        elif len(self.twin.model.two) < 4:
            self.do(lambda world: world.grow(which))

    # ---------------------------------------------------------------- the handle

    @precondition(lambda self: not self.config.scheduled)
    @rule(which=FIRST_OR_LAST, λ=st.sampled_from([0.0, 0.1, 0.3]))
    def set_weight_decay(self, which: int, λ: float) -> None:
        self.subject.handles[which].weight_decay = self.twin.λ[which] = λ

    @rule(which=FIRST_OR_LAST, on=st.booleans())
    def pause(self, which: int, on: bool) -> None:
        if on:
            self.pausing[which].enter_context(self.subject.handles[which].paused())
        else:
            self.pausing[which].close()
        self.twin.paused[which] = on

    def in_window(self) -> bool:
        """Whether something was decayed since the last step, or is in a gradient still."""
        return any(account.paid or account.kept for account in self.twin.accounts.values())

    @rule(load=st.booleans())
    def checkpoint(self, load: bool) -> None:
        handles, twin = self.subject.handles, self.twin
        if not load:
            self.saved = (
                [pickle.dumps(h.state_dict()) for h in handles],
                copy.deepcopy((twin.λ, twin.finished, twin.peaks)),
            )
        elif self.saved is not None and (self.config.mode == "coupled" or not self.in_window()):
            states, (twin.λ, twin.finished, peaks) = copy.deepcopy(self.saved)
            for handle, state, now, then in zip(handles, states, twin.peaks, peaks, strict=True):
                handle.load_state_dict(pickle.loads(state))
                now.update(then)

    @precondition(lambda self: not self.in_window())
    @rule(meanwhile=st.booleans())
    def reattach(self, meanwhile: bool) -> None:
        """Between two windows: in mid-window a new handle cannot know what the old one did."""
        for handle in self.subject.handles * 2:
            handle.remove()
        assert not self.subject.hooked()
        self.must, self.twin.paused = set(), [True for _ in self.twin.paused]
        if meanwhile:
            self.iterate(0, ["both"], None, True)
        self.subject.attach()
        self.twin.attach()
        self.attached()


def assert_same(
    one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor], but: set[str]
) -> None:
    """Bit for bit; an overflow leaves NaN in both."""
    assert list(one) == list(other)
    for name in one.keys() - but:
        assert one[name].dtype == other[name].dtype
        same = torch.allclose(one[name], other[name], rtol=0.0, atol=0.0, equal_nan=True)
        assert same, f"{name}: {one[name]} is not {other[name]}"


def test_any_mix_of_events() -> None:
    """No mix of events makes a decay happen twice or not at all, or a warning that is not
    promised."""
    run_state_machine_as_test(Machine, settings=PROFILE)


def _ends_all_windows(part: steps.Part, nested: bool, again: bool) -> None:
    part.engine.state.rate.close_windows()


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "windows never close": (steps.Part, "end", lambda *args, **kwargs: None),
    "a step closes the windows of every optimizer": (steps.Part, "end", _ends_all_windows),
    "each micro-batch decays": (
        window.Window,
        "when_gradient_comes",
        lambda self, grad, **kwargs: window.Evidence.FRESH,
    ),
    "fresh buffers are not known": (
        window.Window,
        "when_gradient_comes",
        lambda self, grad, **kwargs: window.Evidence.SAME,
    ),
    "no net": (steps.Part, "decay", lambda *args, **kwargs: None),
    "no hooks": (passes.Passes, "pay", lambda *args, **kwargs: None),
    "scaled too weakly": (tensors, "loss_scale", lambda scaler, device: None),
    "schedules stand still": (rate.Rate, "advance", lambda self, clock: None),
    "silent": (rules.Rules, "tell", lambda self, rule, facts: None),
    "nothing is marked": (payment, "_mark", lambda due, receipt: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a broken engine the machine finds a mix of events that shows it."""
    monkeypatch.setattr(*FAULTS[fault])
    found = settings(
        PROFILE,
        max_examples=2000,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    # A refusal where the twin has none is seen too: the engine checks itself at the end of a step.
    seen = (AssertionError, wdhook.WdhookError)
    with pytest.raises(seen, match=r"is not|promised|no decay has reached"):
        run_state_machine_as_test(Machine, settings=found)
