"""Attach, copy, pickle, collect, remove: nothing is left on anybody, and nothing is kept alive."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from twins import (
    LR,
    assert_bit_equal,
    batches,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    weights,
    λ,
)

import wdhook
from wdhook._decay import step_listener as _listener

SGD = torch.optim.SGD


def traces(model: nn.Module) -> list[str]:
    """Everything of ours that could be left: hooks, process-wide hooks, attributes."""
    found = [f"hook on {n}" for n, p in model.named_parameters() if p._post_accumulate_grad_hooks]
    found += [f"attribute on {n}" for n, p in model.named_parameters() if vars(p)]
    process = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return found + ["process-wide hook" for hooks in process if hooks]


def attributes(model: nn.Module) -> list[list[str]]:
    return [sorted(vars(m)) for m in model.modules()]


@pytest.mark.parametrize("at", ["backward", "step"])
def test_remove_leaves_nothing(at: str) -> None:
    """After remove(), called twice, nothing of ours is anywhere, and training is what it was."""
    model, twin = twins(perceptron())
    before = attributes(model)
    handle = wdhook.attach(model, λ, at=at)
    assert traces(model)
    train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
    assert attributes(model) == before
    assert not any(vars(p) for p in model.parameters())
    handle.remove()
    handle.remove()
    assert traces(model) == []
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 2))
    for m in (model, twin):
        train(m, SGD(m.parameters(), lr=LR), batches(m, 2))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_step_that_raised_keeps_no_hook_of_a_removed_handle(at: str) -> None:
    """A step pre-hook raises before the decay; after remove() the optimizer decays no more.

    Decay waits in a hook of the optimizer until its other step pre-hooks have run.
    """

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    model, twin = twins(perceptron())
    optimizer, reference = SGD(model.parameters(), lr=LR), SGD(twin.parameters(), lr=LR)
    data = batches(model, 3)
    hook = optimizer.register_step_pre_hook(fail)
    with wdhook.attach(model, λ, at=at):
        loss_of(model, data[0]).backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert len(optimizer._optimizer_step_pre_hooks) == 2
    hook.remove()
    assert not optimizer._optimizer_step_pre_hooks
    other = perceptron()
    with wdhook.attach(other, λ):
        optimizer.zero_grad()
        train(model, optimizer, data[1:])
    train(twin, reference, data[1:])
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_others_hooks_stay() -> None:
    """Removing ours leaves the hooks of others, and their handles work."""
    model = perceptron()
    seen: list[str] = []
    first = model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("first"))
    handle = wdhook.attach(model, λ)
    second = model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("second"))
    loss_of(model, batches(model, 1)[0]).backward()
    assert seen == ["first", "second"]
    handle.remove()
    assert len(model[0].weight._post_accumulate_grad_hooks) == 2
    first.remove()
    second.remove()
    assert traces(model) == []


def test_our_hook_comes_first() -> None:
    """Whoever registered before us sees the decayed gradient. If torch renames what we reorder,
    this fails."""
    model = nn.Linear(2, 1, bias=False)
    seen: list[torch.Tensor] = []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with wdhook.attach(model, 0.5):
        model(torch.zeros(1, 2)).sum().backward()
    assert torch.equal(seen[0], 0.5 * model.weight)


def test_a_context_manager_removes_also_after_an_error() -> None:
    """`with attach(...)` ends the decay, whatever happened inside."""
    model = perceptron()
    with pytest.raises(ZeroDivisionError), wdhook.attach(model, λ):
        raise ZeroDivisionError
    assert traces(model) == []


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("keep", [True, False])
def test_an_attached_model_can_be_collected(at: str, keep: bool) -> None:
    """Neither a handle nor the process keeps a model alive; when it is gone, so is the listener."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR)
    handle = wdhook.attach(model, λ, at=at, optimizer=optimizer)
    train(model, optimizer, batches(model, 2))
    gone = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0].weight)]
    if not keep:
        del handle
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    assert not _listener._registered
    if keep:
        assert "removed" in repr(handle)
        assert len(handle.plan) == 8
        handle.weight_decay = 0.5
        assert handle.plan["0.weight"].weight_decay == 0.5
        handle.remove()


@pytest.mark.parametrize(("at", "steps_before"), [("backward", 0), ("backward", 1), ("step", 1)])
def test_parameters_that_outlive_their_modules(at: str, steps_before: int) -> None:
    """Functional code and exported graphs may share parameters whose modules are gone: they are
    decayed on."""
    ends = []
    for own in (0.0, λ):
        model = perceptron(seed=3)
        weight = model[0].weight
        optimizer = SGD([weight], lr=LR, weight_decay=own)
        if not own:
            wdhook.attach(model, λ, at=at)
        for step in range(4):
            if step == steps_before:
                model = None
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
        ends.append(weight.detach().clone())
        del weight, optimizer
    gc.collect()
    assert not _listener._registered
    assert torch.equal(*ends)


def test_the_collection_test_can_fail() -> None:
    """The check above sees a model that something keeps."""
    model = perceptron()
    gone = weakref.ref(model)
    keeper = [model]
    del model
    gc.collect()
    assert gone() is keeper[0]


def test_a_handle_that_is_thrown_away_decays_on() -> None:
    """`wdhook.attach(model, λ)` without keeping the handle is enough."""
    model, twin = twins(perceptron())
    wdhook.attach(model, λ)
    gc.collect()
    train(model, SGD(model.parameters(), lr=LR), batches(model, 3))
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_a_container_made_for_the_call_may_die() -> None:
    """attach(nn.ModuleList([a, b]), λ) goes on with a and b, also with parameters replaced
    since."""
    model, twin = twins(perceptron())
    wdhook.attach(nn.ModuleList(model), λ)
    gc.collect()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    train(model, SGD(model.parameters(), lr=LR), batches(model, 3))
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_copies_and_pickles_are_detached(at: str) -> None:
    """A deep copy and a loaded model have no hooks; an attached model that owns its handle can be
    copied too."""
    model = perceptron()
    model.decay = wdhook.attach(model, λ, at=at)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(model),
        torch.load(stream, weights_only=False),
        pickle.loads(pickle.dumps(model)),
    ):
        assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())
        assert "removed (a copy: attach again)" in repr(twin.decay)
        assert twin.decay.plan == dict(model.decay.plan)
        assert_bit_equal(model.state_dict(), twin.state_dict())
        before = copy.deepcopy(twin.state_dict())
        loss_of(twin, batches(twin, 1)[0]).backward()
        SGD(twin.parameters(), lr=0.0).step()
        assert_bit_equal(before, twin.state_dict())
    model.decay.remove()


def test_paused() -> None:
    """Inside paused() nothing is decayed; a gradient made inside and stepped outside is decayed at
    that step."""
    model, twin = twins(perceptron())
    optimizer, reference = SGD(model.parameters(), lr=LR), SGD(twin.parameters(), lr=LR)
    decayed = SGD(own_groups(twin), lr=LR)
    first, second, third = batches(model, 3)
    with wdhook.attach(model, λ) as handle:
        with handle.paused(), handle.paused():
            loss_of(model, first).backward()
            optimizer.step()
            model.zero_grad()
            loss_of(model, second).backward()
        optimizer.step()
        model.zero_grad()
        loss_of(model, third).backward()
        optimizer.step()
    for batch, o in ((first, reference), (second, decayed), (third, decayed)):
        twin.zero_grad()
        loss_of(twin, batch).backward()
        o.step()
    assert_bit_equal(model.state_dict(), twin.state_dict())
    with handle.paused():  # of a removed handle: nothing to pause
        pass


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_schedule_of_weight_decay(mode: str, at: str) -> None:
    """Setting `weight_decay` moves every λ that is not absolute, from the next decay on; it may
    start at zero."""
    kind = SGD if mode == "coupled" else torch.optim.AdamW
    model, twin = twins(perceptron())
    optimizer, reference = (
        kind(model.parameters(), lr=LR, weight_decay=0),
        kind(own_groups(twin), lr=LR),
    )
    only = reference.param_groups[0]["params"].pop(0)
    reference.add_param_group({"params": [only], "weight_decay": 0.25})
    schedule = [0.0, 0.1, 0.2, 0.0, 0.3]
    overrides = {"0.weight": 0.25}
    with wdhook.attach(
        model, 0.0, mode=mode, at=at, optimizer=optimizer, overrides=overrides
    ) as handle:
        for value, batch in zip(schedule, batches(model, 5), strict=True):
            handle.weight_decay = value
            assert handle.weight_decay == handle.plan["3.weight"].weight_decay == value
            assert handle.plan["0.weight"].weight_decay == 0.25
            train(model, optimizer, [batch])
    for value, batch in zip(schedule, batches(twin, 5), strict=True):
        reference.param_groups[0]["weight_decay"] = value
        train(twin, reference, [batch])
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_the_state_of_a_handle() -> None:
    """state_dict carries λ and the peak of lr; 3 + load + 3 steps equal 6, bit for bit."""

    def parts(
        m: nn.Module,
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, wdhook.WeightDecay]:
        optimizer = SGD(m.parameters(), lr=LR)
        handle = wdhook.attach(m, λ, mode="independent", at="step")
        return optimizer, handle

    def go(m: nn.Module, o: torch.optim.Optimizer, h: wdhook.WeightDecay, steps: range) -> None:
        for i in steps:
            o.param_groups[0]["lr"] = [0.1, 0.2, 0.1, 0.05, 0.02, 0.01][
                i
            ]  # by hand: no trace in the group
            h.weight_decay = 0.1 * (i + 1)
            train(m, o, [batches(m, 6)[i]])

    model, twin = twins(perceptron())
    optimizer, handle = parts(model)
    go(model, optimizer, handle, range(6))
    handle.remove()

    optimizer, handle = parts(twin)
    go(twin, optimizer, handle, range(3))
    saved = pickle.loads(
        pickle.dumps([twin.state_dict(), optimizer.state_dict(), handle.state_dict()])
    )
    handle.remove()
    peaks = dict.fromkeys(("0.weight", "3.weight", "5.weight"), 0.2)
    dose = pytest.approx(-sum(math.log(1 - λ) for λ in (0.1, 0.2, 0.3 * 0.1 / 0.2)), rel=1e-12)
    assert saved[2] == {
        "weight_decay": pytest.approx(0.3),
        "mode": "independent",
        "lr_peaks": (peaks,),
        "finished_steps": (),
        "memory": (),
        "doses": (dict.fromkeys(peaks, dose),),
    }
    resumed = perceptron(seed=9)
    optimizer, handle = parts(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    assert handle.weight_decay == saved[2]["weight_decay"]
    go(resumed, optimizer, handle, range(3, 6))
    handle.remove()
    assert_bit_equal(model.state_dict(), resumed.state_dict())


def test_repr_is_one_line() -> None:
    """The repr says what is going on, in one line."""
    model = perceptron()
    with wdhook.attach(model, 1e-4) as handle:
        train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
        assert (
            repr(handle)
            == "WeightDecay(0.0001, mode='coupled', at='backward', decayed=3 of 8 tensors, steps=2)"
        )
    assert repr(handle).endswith("removed)")


def test_importing_costs_no_optional_package() -> None:
    """`import wdhook` needs torch alone."""
    code = (
        "import sys, torch; before = set(sys.modules); import wdhook; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    others = set(eval(out)) - {"wdhook", "torch"} - set(sys.stdlib_module_names)
    assert others == set()


def test_moving_and_converting_an_attached_model() -> None:
    """`model.double()` keeps the hooks."""
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ):
        model.double()
        train(model, SGD(model.parameters(), lr=LR), batches(model, 3))
    twin.double()
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_swapping_tensors_of_an_attached_model() -> None:
    """torch's swap on conversion refuses tensors with weak references: we hold none on
    parameters."""
    model, twin = twins(perceptron())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with wdhook.attach(model, λ):
            model.double()
            train(model, SGD(model.parameters(), lr=LR), batches(model, 3))
            model.float()  # its gradients were marked, and are there still
            train(model, SGD(model.parameters(), lr=LR), batches(model, 3))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for dtype in (torch.float64, torch.float32):
        twin.to(dtype)
        train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 3))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_weights_of_the_twin_are_what_wdhook_decays() -> None:
    """The rule of the test models agrees with the plan, so the comparisons compare what they
    say."""
    model = perceptron()
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(w)] for w in weights(model)] == list(wdhook.plan(model, λ).decayed)
