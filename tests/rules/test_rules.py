"""Loud, never silent: every way to go wrong that wdhook can see, what it says, and that nothing
was changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins import assert_bit_equal, batches, loss_of, perceptron, weights

import wdhook
from wdhook._decay import step_listener as _listener
from wdhook._decay.parameters import Parameters

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
MODEL = perceptron()


def plain() -> nn.Module:
    return copy.deepcopy(MODEL)


def two_sequences(params: Any) -> torch.optim.Optimizer:
    """An optimizer like ScheduleFree: it has to be told which of its two sequences the model
    holds."""

    class ScheduleFree(SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    return ScheduleFree(params, lr=0.1)


# (what is called, type of wdhook, builtin, pieces of the message)
AT_ATTACH: dict[
    str, tuple[Callable[[nn.Module], Any], type[Exception], type[Exception], tuple[str, ...]]
] = {
    "negative": (
        lambda m: wdhook.attach(m, -1e-4),
        wdhook.ArgumentError,
        ValueError,
        ("`weight_decay`", "-0.0001"),
    ),
    "nan": (
        lambda m: wdhook.attach(m, float("nan")),
        wdhook.ArgumentError,
        ValueError,
        ("`weight_decay`", "nan"),
    ),
    "infinite": (
        lambda m: wdhook.attach(m, float("inf")),
        wdhook.ArgumentError,
        ValueError,
        ("`weight_decay`", "inf"),
    ),
    "no number": (
        lambda m: wdhook.attach(m, "1e-4"),
        wdhook.ArgumentError,
        ValueError,
        ("must be a number", "str"),
    ),
    "a truth value": (
        lambda m: wdhook.attach(m, True),
        wdhook.ArgumentError,
        ValueError,
        ("must be a number", "bool"),
    ),
    "None": (
        lambda m: wdhook.attach(m, None),
        wdhook.ArgumentError,
        ValueError,
        ("must be a number", "NoneType"),
    ),
    "no module": (
        lambda m: wdhook.attach(m.parameters(), 1e-4),
        wdhook.ArgumentError,
        ValueError,
        ("`model` must be a torch.nn.Module", "generator"),
    ),
    "mode": (
        lambda m: wdhook.attach(m, 1e-4, mode="l2"),
        wdhook.ArgumentError,
        ValueError,
        ("`mode`", "'coupled'", "l2"),
    ),
    "moment": (
        lambda m: wdhook.attach(m, 1e-4, at="forward"),
        wdhook.ArgumentError,
        ValueError,
        ("`at`", "'backward'"),
    ),
    "foreach": (
        lambda m: wdhook.attach(m, 1e-4, foreach="yes"),
        wdhook.ArgumentError,
        ValueError,
        ("`foreach`", "yes"),
    ),
    "optimizer": (
        lambda m: wdhook.attach(m, 1e-4, optimizer=3),
        wdhook.ArgumentError,
        ValueError,
        ("`optimizer`", "3"),
    ),
    "scaler": (
        lambda m: wdhook.attach(m, 1e-4, scaler=128.0),
        wdhook.ArgumentError,
        ValueError,
        ("GradScaler", "float"),
    ),
    "lr of coupled": (
        lambda m: wdhook.attach(m, 1e-4, lr=0.1),
        wdhook.ArgumentError,
        ValueError,
        ("`lr`", "coupled", "0.1"),
    ),
    "lr of a wrong type": (
        lambda m: wdhook.attach(m, 1e-4, mode="decoupled", lr="0.1"),
        wdhook.ArgumentError,
        ValueError,
        ("`lr` must be a number",),
    ),
    "recipe": (
        lambda m: wdhook.attach(m, 1e-4, recipe="mine"),
        wdhook.ArgumentError,
        ValueError,
        ("`recipe`", "'forum'"),
    ),
    "overrides": (
        lambda m: wdhook.attach(m, 1e-4, overrides=["*"]),
        wdhook.ArgumentError,
        ValueError,
        ("mapping", "list"),
    ),
    "lr that is no rate": (
        lambda m: wdhook.attach(m, 1e-4, mode="decoupled", lr=-0.1),
        wdhook.ArgumentError,
        ValueError,
        ("`lr`", "-0.1"),
    ),
    "an override of None": (
        lambda m: wdhook.attach(m, 1e-4, overrides={"*": None}),
        wdhook.ArgumentError,
        ValueError,
        ("overrides['*']", "None"),
    ),
    "a selector that matches nothing": (
        lambda m: wdhook.attach(m, 1e-4, overrides={"layer9.*": 0.0}),
        wdhook.SelectorError,
        ValueError,
        ("'layer9.*'", "matches nothing", "0.weight", "norm", "LayerNorm"),
    ),
    "a class that matches nothing": (
        lambda m: wdhook.attach(m, 1e-4, overrides={nn.Conv2d: 0.0}),
        wdhook.SelectorError,
        ValueError,
        ("Conv2d", "classes there are: LayerNorm, Linear"),
    ),
    "a class that is no module": (
        lambda m: wdhook.attach(m, 1e-4, overrides={int: 0.0}),
        wdhook.ArgumentError,
        ValueError,
        ("torch.nn.Module", "int"),
    ),
    "a selector of no kind": (
        lambda m: wdhook.attach(m, 1e-4, overrides={3: 0.0}),
        wdhook.ArgumentError,
        ValueError,
        ("role", "glob", "predicate", "3"),
    ),
    "an override that is no λ": (
        lambda m: wdhook.attach(m, 1e-4, overrides={"*": -1}),
        wdhook.ArgumentError,
        ValueError,
        ("overrides['*']", "-1"),
    ),
    "nothing eligible": (
        lambda m: wdhook.attach(m[2], 1e-4),
        wdhook.NothingToDecayError,
        ValueError,
        ("no eligible parameter", "norm", "overrides"),
    ),
    "no parameters": (
        lambda m: wdhook.attach(nn.ReLU(), 1e-4),
        wdhook.NothingToDecayError,
        ValueError,
        ("no eligible parameter", "parameters: 0"),
    ),
    "all exempt": (
        lambda m: wdhook.attach(m, 1e-4, overrides={"*": 0.0}),
        wdhook.NothingToDecayError,
        ValueError,
        ("no eligible parameter",),
    ),
    "decoupled without lr": (
        lambda m: wdhook.attach(m, 1e-4, mode="decoupled"),
        wdhook.LearningRateError,
        ValueError,
        ("learning rate", "optimizer=optimizer", "`lr=`", 'at="step"'),
    ),
    "decoupled with a function and no optimizer": (
        lambda m: wdhook.attach(m, 1e-4, mode="decoupled", lr=lambda group: 0.1),
        wdhook.LearningRateError,
        ValueError,
        ("optimizer: not given", "lr: <function"),
    ),
    "two sequences of weights": (
        lambda m: wdhook.attach(m, 1e-4, mode="decoupled", optimizer=two_sequences(m.parameters())),
        wdhook.UnsupportedOptimizerError,
        RuntimeError,
        ("two sequences", "ScheduleFree", "wdhook.param_groups", "coupled"),
    ),
    "at the step of no torch optimizer": (
        lambda m: wdhook.attach(
            m,
            1e-4,
            at="step",
            optimizer=type("Own", (), {"param_groups": [{"params": list(m.parameters())}]})(),
        ),
        wdhook.ArgumentError,
        ValueError,
        ("torch.optim.Optimizer", "Own", 'at="backward"'),
    ),
    "a plan of another model": (
        lambda m: wdhook.attach(m, wdhook.plan(nn.Linear(2, 2), 1e-4)),
        wdhook.ArgumentError,
        ValueError,
        ("not one of this model", "0.weight"),
    ),
    "a plan and overrides": (
        lambda m: wdhook.attach(m, wdhook.plan(m, 1e-4), overrides={"*": 0.0}),
        wdhook.ArgumentError,
        ValueError,
        ("`overrides`", "wdhook.plan"),
    ),
    "nothing to adopt": (
        lambda m: wdhook.adopt(m, SGD(m.parameters(), lr=0.1)),
        wdhook.ArgumentError,
        ValueError,
        ("nothing to adopt", "SGD", "wdhook.attach"),
    ),
    "adopting a formula that is not known": (
        lambda m: wdhook.adopt(
            m, type("Own", (SGD,), {})(m.parameters(), lr=0.1, weight_decay=0.1)
        ),
        wdhook.ArgumentError,
        ValueError,
        ("formula", "Own", 'mode="coupled"'),
    ),
    "one-shot without modules": (
        lambda m: wdhook.apply_weight_decay(weight_decay=1e-4),
        wdhook.ArgumentError,
        ValueError,
        ("at least one module",),
    ),
    "one-shot in a mode that has a memory": (
        lambda m: wdhook.apply_weight_decay(m, weight_decay=1e-4, mode="independent"),
        wdhook.ArgumentError,
        ValueError,
        ("`mode`", "independent"),
    ),
    "one-shot coupled with lr": (
        lambda m: wdhook.apply_weight_decay(m, weight_decay=1e-4, lr=0.1),
        wdhook.ArgumentError,
        ValueError,
        ("`lr`", "coupled"),
    ),
    "one-shot before the backward": (
        lambda m: wdhook.apply_weight_decay(m, weight_decay=1e-4),
        wdhook.NoGradientError,
        RuntimeError,
        ("No eligible parameter has a gradient", "loss.backward()"),
    ),
}


def nothing_registered(model: nn.Module) -> bool:
    return not _listener._registered and all(
        not p._post_accumulate_grad_hooks for p in model.parameters()
    )


@pytest.mark.parametrize("case", AT_ATTACH)
def test_an_argument_without_meaning(case: str) -> None:
    """The error is ours and a builtin, says what and what to do, and nothing was registered or
    changed."""
    call, ours, builtin, pieces = AT_ATTACH[case]
    model = plain()
    with pytest.raises(ours) as caught:
        call(model)
    assert isinstance(caught.value, wdhook.WdhookError)
    assert isinstance(caught.value, builtin)
    for piece in pieces:
        assert piece in str(caught.value)
    assert nothing_registered(model)
    assert_bit_equal(model.state_dict(), MODEL.state_dict())


def test_nothing_registered_can_fail() -> None:
    """The check above sees a hook on a parameter, and one of the process."""
    model = plain()
    assert nothing_registered(model)
    with wdhook.attach(model, 1e-4):
        assert not nothing_registered(model)
    with wdhook.attach(model, 1e-4, at="step"):
        assert not nothing_registered(model)
    assert nothing_registered(model)


def test_attach_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one registration fails, those already made are removed."""
    model = plain()
    calls = []

    def fail_at_third(param: torch.Tensor, hook: Any) -> Any:
        calls.append(param)
        if len(calls) == 3:
            raise MemoryError("no more hooks")
        return register(param, hook)

    from wdhook._decay import passes as _engine

    register = _engine.register_first
    monkeypatch.setattr(_engine, "register_first", fail_at_third)
    with pytest.raises(MemoryError):
        wdhook.attach(model, 1e-4)
    assert len(calls) == 3
    assert nothing_registered(model)


def backward(model: nn.Module) -> None:
    loss_of(model, batches(model, 1)[0]).backward()


def assert_unchanged_by(
    step: Callable[[], Any], model: nn.Module, error: type[Exception], *pieces: str
) -> None:
    """`step` raises `error` and leaves parameters, gradients and optimizer state as they were."""
    before = copy.deepcopy(model.state_dict())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(error) as caught:
        step()
    assert isinstance(caught.value, wdhook.WdhookError)
    for piece in pieces:
        assert piece in str(caught.value)
    assert_bit_equal(before, model.state_dict())
    assert_bit_equal(grads, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_the_optimizers_own_decay(mode: str, at: str) -> None:
    """AdamW's default of 0.01 on a decayed parameter is an error at the step, before anything is
    changed."""
    model = plain()
    optimizer = AdamW(model.parameters(), lr=0.1)
    with wdhook.attach(model, 1e-4, mode=mode, at=at, optimizer=optimizer):
        backward(model)
        if mode == "decoupled":
            assert_bit_equal(model.state_dict(), MODEL.state_dict())  # not even in the backward
        pieces = ("0.weight", "param_groups[0]['weight_decay'] = 0.01", "wdhook.adopt", "0.0001")
        assert_unchanged_by(optimizer.step, model, wdhook.DoubleDecayError, *pieces)
        assert not optimizer.state
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()


def test_the_optimizers_own_decay_of_exempt_parameters_is_their_business() -> None:
    """Only groups with a decayed parameter are guarded."""
    model = plain()
    ids = {id(w) for w in weights(model)}
    rest = [p for p in model.parameters() if id(p) not in ids]
    optimizer = SGD([{"params": weights(model)}, {"params": rest, "weight_decay": 0.1}], lr=0.1)
    with wdhook.attach(model, 1e-4):
        backward(model)
        optimizer.step()


def test_a_checkpoint_that_brings_the_decay_back() -> None:
    """An optimizer built with 0 that loads a checkpoint saved with 0.05 is caught at its next
    step."""
    model = plain()
    saved = SGD(model.parameters(), lr=0.1, weight_decay=0.05).state_dict()
    optimizer = SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 1e-4):
        backward(model)
        optimizer.step()
        optimizer.load_state_dict(saved)
        model.zero_grad()
        backward(model)
        assert_unchanged_by(optimizer.step, model, wdhook.DoubleDecayError, "0.05", "checkpoint")


def test_attached_twice() -> None:
    """A second handle on the same parameters names the λ of the first, and remove()."""
    model = plain()
    with wdhook.attach(model, 1e-4):
        for at in ("backward", "step"):
            with pytest.raises(
                wdhook.AlreadyAttachedError, match=r"0\.0001[\s\S]*remove\(\)"
            ) as caught:
                wdhook.attach(model[3], 1e-3, at=at)
            assert isinstance(caught.value, RuntimeError)
        backward(model)
        with pytest.raises(wdhook.AlreadyAttachedError, match=r"0\.weight"):
            wdhook.apply_weight_decay(model, weight_decay=1e-4)
    wdhook.attach(model[3], 1e-3).remove()


def test_disjoint_handles() -> None:
    """Two handles on disjoint parts of a model, by modules or by overrides, work side by side."""
    model = plain()
    one, two = wdhook.attach(model[0], 0.5), wdhook.attach(model[3], 0.25)
    three = wdhook.attach(model, 0.125, overrides={"0.*": 0.0, "3.*": 0.0})
    for weight in weights(model):
        weight.grad = torch.zeros_like(weight)
    before = [w.detach().clone() for w in weights(model)]
    SGD(model.parameters(), lr=1.0).step()
    for weight, old, λ in zip(weights(model), before, (0.5, 0.25, 0.125), strict=True):
        assert torch.equal(weight, old - λ * old)
    for handle in (two, one, three):
        handle.remove()
    assert nothing_registered(model)


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("given", [True, False])
def test_master_weights(at: str, given: bool) -> None:
    """An optimizer that steps copies of the parameters makes decoupled decay vain: an error names
    coupled mode."""
    model = plain()
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = SGD(masters, lr=0.1)
    arguments: dict[str, Any] = {"optimizer": optimizer} if given else {"lr": 0.1}
    with wdhook.attach(model, 0.1, mode="decoupled", at=at, **arguments):
        backward(model)
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.clone()
        pieces = ("master weights", 'mode="coupled"', "0.weight")
        assert_unchanged_by(optimizer.step, model, wdhook.MasterWeightsError, *pieces)


def test_coupled_decay_travels_to_master_weights() -> None:
    """Coupled decay at "backward" is in the gradient that is copied; at "step" it would be lost,
    and says so."""
    for at in ("backward", "step"):
        model = plain()
        masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        optimizer = SGD(masters, lr=0.1)
        with wdhook.attach(model, 0.1, at=at):
            backward(model)
            for master, p in zip(masters, model.parameters(), strict=True):
                master.grad = p.grad.clone()
            if at == "step":
                assert_unchanged_by(
                    optimizer.step, model, wdhook.MasterWeightsError, "master weights"
                )
            else:
                optimizer.step()
                reference = plain()
                backward(reference)
                SGD(
                    [{"params": [w], "weight_decay": 0.1} for w in weights(reference)], lr=0.1
                ).step()
                assert torch.equal(masters[0], reference[0].weight)


@pytest.mark.parametrize("padding", [0, 5])
def test_flat_master_weights(padding: int) -> None:
    """Copies in one flat buffer, of another precision and padded, are recognised by their
    content."""
    model = plain().bfloat16()
    flat = torch.cat(
        [p.detach().float().flatten() for p in model.parameters()] + [torch.zeros(padding)]
    )
    optimizer = SGD([nn.Parameter(flat)], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.zeros_like(flat)
    with wdhook.attach(model, 0.1, mode="decoupled", at="step"):
        backward(model)
        assert_unchanged_by(
            optimizer.step, model, wdhook.MasterWeightsError, "master weights", "bfloat16"
        )


def test_a_model_of_the_same_size_is_no_copy() -> None:
    """Another network of the same shape, whose optimizer steps first, raises nothing."""
    for seed in (0, 5):  # equal to ours at first, or not
        _steps_beside_ours(plain(), perceptron(seed=seed))


def _steps_beside_ours(model: nn.Module, other: nn.Module) -> None:
    with wdhook.attach(model, 0.1, at="step"):
        backward(model)
        backward(other)
        SGD(other.parameters(), lr=0.1).step()
        SGD(model.parameters(), lr=0.1).step()


def test_steps_that_are_never_ours() -> None:
    """Decay at the step, and twenty steps by optimizers that own nothing of ours while a gradient
    waits: a warning."""
    model, other = plain(), nn.Linear(1, 1)
    optimizer = SGD(other.parameters(), lr=0.1)
    with wdhook.attach(model, 0.1, at="step"):
        backward(model)
        for _ in range(19):
            optimizer.step()
        with pytest.warns(wdhook.WdhookWarning, match=r"none of the[\s\S]*0\.weight"):
            optimizer.step()
        optimizer.step()


def test_a_parameter_that_no_given_optimizer_steps() -> None:
    """Decoupled: a trained parameter outside every optimizer given is named, and what to do."""
    model = plain()
    optimizer = SGD(model[3].parameters(), lr=0.1)
    with wdhook.attach(model, 0.1, mode="decoupled", at="backward", optimizer=optimizer):
        backward(model)
        with pytest.raises(
            wdhook.MasterWeightsError, match=r"0\.weight[\s\S]*requires_grad_\(False\)"
        ):
            optimizer.step()


def test_a_foreign_optimizer_is_none_of_our_business() -> None:
    """Another model's optimizer, stepping while ours waits with gradients, raises nothing."""
    model, other = plain(), nn.Linear(3, 3)
    optimizer, foreign = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    with wdhook.attach(model, 0.1, mode="decoupled", at="step"):
        backward(model)
        other(torch.ones(1, 3)).sum().backward()
        foreign.step()
        optimizer.step()


def test_a_scaler_that_was_not_given() -> None:
    """A GradScaler that steps the optimizer makes coupled decay 65,536 times too weak: error at
    the first step."""
    model = plain()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, 0.1):
        scaler.scale(loss_of(model, batches(model, 1)[0])).backward()
        scaler.unscale_(optimizer)
        pieces = ("GradScaler", "scaler=scaler", "65536")
        assert_unchanged_by(lambda: scaler.step(optimizer), model, wdhook.LossScaleError, *pieces)
    quiet = torch.amp.GradScaler("cpu", enabled=False)
    with wdhook.attach(model, 0.1):
        quiet.step(optimizer)


def test_a_scaler_that_comes_later() -> None:
    """Scaling that starts in mid-training is caught at its first step."""
    model = plain()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, 0.1):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(model, 1)[0])).backward()
        scaler.unscale_(optimizer)
        assert_unchanged_by(
            lambda: scaler.step(optimizer), model, wdhook.LossScaleError, "GradScaler"
        )


@pytest.mark.parametrize("other", [True, False])
def test_a_scaler_that_does_not_step(other: bool) -> None:
    """A scaler that was given, while another one or none steps the optimizer, is an error before
    the step."""
    model = plain()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with wdhook.attach(model, 0.1, scaler=torch.amp.GradScaler("cpu")):
        loss = loss_of(model, batches(model, 1)[0])
        (scaler.scale(loss) if other else loss).backward()
        if other:
            scaler.unscale_(optimizer)
        step = (lambda: scaler.step(optimizer)) if other else optimizer.step
        assert_unchanged_by(step, model, wdhook.LossScaleError, "scaler.step(optimizer)")


@pytest.mark.parametrize("at", ["backward", "step"])
def test_an_lr_that_is_not_there(at: str) -> None:
    """lr=None is named, with `lr=`; at the step where the optimizer was not given."""
    model = plain()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    if at == "backward":
        with pytest.raises(wdhook.LearningRateError, match="`lr=`"):
            wdhook.attach(model, 0.1, mode="decoupled", optimizer=optimizer)
        return
    with wdhook.attach(model, 0.1, mode="decoupled", at="step"):
        backward(model)
        assert_unchanged_by(optimizer.step, model, wdhook.LearningRateError, "`lr=`", "None")


def test_an_lr_that_is_elsewhere() -> None:
    """Prodigy multiplies lr by an estimate d: refused, with the function to give; which then
    works."""
    model = plain()
    optimizer = SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0].update(d=0.25)
    with wdhook.attach(model, 0.5, mode="decoupled", at="step"):
        backward(model)
        pieces = ('lr=lambda group: group["lr"] * group["d"]', "0.25")
        assert_unchanged_by(optimizer.step, model, wdhook.LearningRateError, *pieces)
    lr = lambda group: group["lr"] * group["d"]  # noqa: E731 - as the message says
    before = model[0].weight.detach().clone()
    with wdhook.attach(model, 0.5, mode="decoupled", optimizer=optimizer, lr=lr):
        model.zero_grad()
        backward(model)
    assert torch.equal(model[0].weight, before * (1 - 0.25 * 0.5))


def test_two_sequences_of_weights_at_the_step() -> None:
    """ScheduleFree with decoupled decay is refused at its step where it was not given to attach."""
    model = plain()
    optimizer = two_sequences(model.parameters())
    with wdhook.attach(model, 0.1, mode="decoupled", at="step"):
        backward(model)
        pieces = ("two sequences", "param_groups")
        assert_unchanged_by(optimizer.step, model, wdhook.UnsupportedOptimizerError, *pieces)
    with wdhook.attach(model, 0.1):
        optimizer.step()  # coupled decay is right


def test_maximize_that_was_not_known() -> None:
    """A sign that turns out wrong at the first step is an error that names `optimizer=`."""
    model = plain()
    optimizer = SGD(model.parameters(), lr=0.1, maximize=True)
    with wdhook.attach(model, 0.1):
        backward(model)
        pieces = ("maximize", "optimizer=optimizer")
        assert_unchanged_by(optimizer.step, model, wdhook.UnsupportedOptimizerError, *pieces)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_decay_that_rounds_away(mode: str) -> None:
    """bfloat16 with lr·λ below half a unit in the last place, rounded at each step, warns once;
    float32 and a large λ do not."""
    model = plain().bfloat16()
    optimizer = SGD(model.parameters(), lr=0.1)
    with wdhook.attach(model, 1e-4, mode=mode, at="step", low_precision="round"):
        backward(model)
        with pytest.warns(wdhook.WdhookWarning, match=r"rounds away[\s\S]*bfloat16"):
            optimizer.step()
        backward(model)
        optimizer.step()
    with wdhook.attach(model, 0.5, mode=mode, at="step", low_precision="round"):
        optimizer.step()
    if mode == "decoupled":
        with (
            wdhook.attach(model, 0.5, mode=mode, at="step", low_precision="round", lr=1e-4),
            pytest.warns(wdhook.WdhookWarning, match="5e-05"),
        ):
            optimizer.step()
    fine = plain()
    with wdhook.attach(fine, 1e-4, mode=mode, at="step", low_precision="round"):
        backward(fine)
        SGD(fine.parameters(), lr=0.1).step()


def test_a_bfloat16_decay_really_rounds_away() -> None:
    """The fact behind the warning: a thousand products with 1 − 1e-4 leave bfloat16 unchanged."""
    p = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = p.clone()
    for _ in range(1000):
        p.mul_(1 - 1e-4)
    assert torch.equal(p, before)


def test_a_state_of_another_mode() -> None:
    """A handle takes no state of another mode, and nothing that is no state."""
    model = plain()
    with wdhook.attach(model, 0.1) as coupled:
        state = coupled.state_dict()
    with wdhook.attach(model, 0.1, mode="decoupled", at="step") as decoupled:
        with pytest.raises(wdhook.ArgumentError, match="another mode"):
            decoupled.load_state_dict(state)
        with pytest.raises(wdhook.ArgumentError, match="missing"):
            decoupled.load_state_dict({})
        with pytest.raises(wdhook.ArgumentError, match="finite and not negative"):
            decoupled.weight_decay = -1.0
        assert decoupled.weight_decay == 0.1


def test_a_warning_names_the_line_of_the_user() -> None:
    """At a step and in a backward pass: no line of wdhook or torch, in which nobody can change a
    thing."""
    model = plain()
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0)
    with wdhook.attach(model, 0.1):
        loss_of(model, batches(model, 1)[0]).backward()
        with pytest.warns(wdhook.WdhookWarning, match="decoupled") as at_step:
            optimizer.step()
    with wdhook.attach(model, 0.1, mode="decoupled", optimizer=optimizer):
        optimizer.zero_grad()
        loss_of(model, batches(model, 1)[0]).backward()
        with pytest.warns(wdhook.WdhookWarning, match="second gradient|micro-batch") as in_pass:
            loss_of(model, batches(model, 1)[0]).backward()
    assert {w.filename for w in [*at_step, *in_pass]} == {__file__}


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("whose", ["ours", "an exempt parameter", "another model"])
def test_a_settled_step_does_not_walk_the_model(
    whose: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose optimizer is known costs nothing for each parameter of the model: not where
    optimizers of single parameters step in hooks, nor for the optimizers of other models."""
    model = plain()
    stepped = {
        "ours": list(model.parameters()),
        "an exempt parameter": [next(p for p in model.parameters() if p.ndim == 1)],
        "another model": [nn.Parameter(torch.ones(2))],
    }[whose]
    optimizer, own = SGD(stepped, lr=0.1), SGD(model.parameters(), lr=0.1)
    walks: list[Parameters] = []
    walk = Parameters.walk

    def counted(parameters: Parameters) -> Any:
        walks.append(parameters)
        return walk(parameters)

    with wdhook.attach(model, 0.1, at=at, optimizer=own):
        for step in range(6):
            if step == 5:
                monkeypatch.setattr(Parameters, "walk", counted)
            for param in stepped:
                param.grad = torch.full_like(param, 0.5)
            optimizer.step()
        assert not walks
        model.zero_grad()
        own.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        own.step()
        assert walks  # the count can fail: a group that is new is looked for in the model
