"""docs/limits.md: its rules are those of the engine, and each of its other statements is tried."""

from __future__ import annotations

import copy
import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import limits_table
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import SGD, AdamW
from twins import perceptron

import wdhook

PAGE = limits_table.PAGE.read_text()
CALLS = PAGE.split("## In calls")[1].split("##")[0]
ROWS = dict(re.findall(r"^\| (.*) \| `(\w+Error)`.*\|$", CALLS, re.MULTILINE))
STATEMENTS = re.findall(r"^- \*\*(.*?)\.?\*\*", PAGE.split("## What wdhook cannot detect")[1], re.M)
X = torch.tensor([[1.0, 2.0]])
λ = 0.5


def line() -> Any:
    """One weight of ones, whose gradient is X."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    return model


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(model.parameters(), lr=1.0, **options)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- rules -----------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_rules() -> None:
    """Made by the script, to the letter."""
    assert limits_table.remade(PAGE) == PAGE
    assert limits_table.table() in PAGE


def test_another_table_is_seen() -> None:
    """Twin: a rule that is missing, or worded otherwise, is another page."""
    row = limits_table.row(limits_table.RULES[1])
    assert row in PAGE
    for other in ("", row.replace("AdamW", "Adam")):
        assert limits_table.remade(PAGE.replace(row, other)) == PAGE != PAGE.replace(row, other)


# -- calls -----------------------------------------------------------------------------------------


def attached_twice() -> None:
    model = line()
    wdhook.attach(model, λ)
    with pytest.raises(wdhook.AlreadyAttachedError):
        wdhook.apply_weight_decay(model, weight_decay=λ)
    wdhook.attach(model, λ)


def arguments_without_meaning() -> None:
    for value in (-1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(wdhook.ArgumentError):
            wdhook.attach(line(), value)
    with pytest.raises(wdhook.ArgumentError):
        wdhook.attach(line(), λ, mode="l2")
    wdhook.attach(line(), λ, overrides={3: 0.0})


def flattened() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp").FullyShardedDataParallel
    cpu = torch.device("cpu")
    model = nn.Sequential(line())
    with wdhook.attach(model, λ):
        wrapped = fsdp(model, device_id=cpu)
        wrapped(X).sum().backward()
        with pytest.raises(wdhook.NothingToDecayError, match="use_orig_params=True"):
            sgd(wrapped).step()
    wdhook.attach(fsdp(nn.Sequential(line()), device_id=cpu), λ)


class Lomo(torch.optim.Optimizer):
    """Updates inside the backward pass."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


class ScheduleFree(SGD):
    """Has to be told which of its sequences the model holds."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def unannounced() -> list[Any]:
    """Optimizers whose steps torch does not announce, each with its model."""
    models = [line() for _ in range(3)]
    replaced = sgd(models[2])
    replaced.step = lambda closure=None: None  # type: ignore[method-assign]
    plain = type("Plain", (), {"param_groups": [{"params": list(models[0].parameters())}]})()
    return list(zip(models, [plain, Lomo(models[1].parameters()), replaced], strict=True))


def unannounced_at_step() -> None:
    for model, optimizer in unannounced()[1:]:
        with pytest.raises(wdhook.ArgumentError, match='at="backward"'):
            wdhook.attach(model, λ, at="step", optimizer=optimizer)
    model, optimizer = unannounced()[0]
    wdhook.attach(model, λ, at="step", optimizer=optimizer)


def unannounced_with_schedule() -> None:
    schedule = wdhook.schedules.constant(λ)
    for model, optimizer in unannounced()[1:]:
        with pytest.raises(wdhook.ArgumentError, match="handle"):
            wdhook.attach(model, schedule, optimizer=optimizer)
    model, optimizer = unannounced()[0]
    wdhook.attach(model, schedule, optimizer=optimizer)


def lomo_without_lr() -> None:
    model = line()
    optimizer = Lomo(model.parameters())
    wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer, lr=0.1).remove()
    wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer)


def two_sequences_given() -> None:
    model = line()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer)


def set_under_a_schedule() -> None:
    wdhook.attach(line(), wdhook.schedules.constant(λ)).weight_decay = 0.1


def state_of_another_mode() -> None:
    state = wdhook.attach(line(), λ).state_dict()
    wdhook.attach(line(), λ, mode="decoupled", at="step").load_state_dict(state)


def nothing_to_adopt() -> None:
    model = line()
    own = type("Own", (SGD,), {})(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(wdhook.ArgumentError, match="mode="):
        wdhook.adopt(model, own)
    wdhook.adopt(model, sgd(model))


def adopt_one_of_two() -> None:
    both = nn.ModuleList([line(), line()])
    wdhook.adopt(both[0], sgd(both, weight_decay=0.1))


def decays_itself() -> None:
    model = line()
    optimizer = sgd(model, weight_decay=0.1)
    model(X).sum().backward()
    wdhook.apply_weight_decay(model, weight_decay=λ, mode="decoupled", optimizer=optimizer)


def cautious_too_early() -> None:
    with pytest.raises(wdhook.ArgumentError, match="update"):
        wdhook.attach(line(), λ, mode="decoupled", lr=0.1, cautious=True)
    wdhook.attach(line(), λ, at="step", cautious=True)


def deferred_where_nothing_can_wait() -> None:
    with pytest.raises(wdhook.ArgumentError, match="decoupled"):
        wdhook.attach(line(), λ, mode="coupled", low_precision="defer")
    how: dict[str, Any] = {"mode": "decoupled", "at": "step", "cautious": True}
    wdhook.attach(line(), λ, low_precision="defer", **how)


def pending_for_a_cautious_handle() -> None:
    model = line().bfloat16()
    how: dict[str, Any] = {"mode": "decoupled", "at": "step"}
    with wdhook.attach(model, 2**-10, **how) as decay:
        model(X.bfloat16()).sum().backward()
        sgd(model).step()
        state = decay.state_dict()
    wdhook.attach(model, 2**-10, cautious=True, **how).load_state_dict(state)


AIMED: dict[str, Any] = {"mode": "decoupled", "at": "step"}


def cautious_toward() -> None:
    wdhook.attach(line(), λ, cautious=True, toward="init", **AIMED)


def targets_without_meaning() -> None:
    for toward in (float("nan"), "start", torch.ones(2)):
        with pytest.raises(wdhook.ArgumentError):
            wdhook.attach(line(), λ, toward=toward)
    with pytest.raises(wdhook.SelectorError, match="overrides"):
        wdhook.attach(nn.Linear(2, 1), λ, toward={"bias": 1.0})
    wdhook.attach(line(), λ, toward=torch.ones(2))


def state_of_other_targets() -> None:
    model = line()
    with wdhook.attach(model, λ, toward="init", **AIMED) as decay:
        state = decay.state_dict()
    wdhook.attach(model, λ, toward=1.0, **AIMED).load_state_dict(state)


def state_that_does_not_fit() -> None:
    model, schedule = line(), wdhook.schedules.constant(λ)
    with wdhook.attach(nn.Sequential(model), schedule) as decay:
        of_others = decay.state_dict()
    with wdhook.attach(model, schedule) as other:
        for state in (decay.state_dict(), of_others, {**other.state_dict(), "memory": 1}):
            with pytest.raises(wdhook.ArgumentError):
                other.load_state_dict(state)
        other.load_state_dict(of_others)


def target_of_another_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(1, bias=False))  # no shape yet to compare with
    anchor = wdhook.Anchor({"0.weight": torch.ones(3, 3)})
    wdhook.attach(model, λ, toward=anchor, **AIMED)
    model(X).sum().backward()
    sgd(model).step()


def groups_of_a_plan_with_targets() -> None:
    model = line()
    wdhook.plan(model, λ, toward="init").param_groups()


IN_CALLS: dict[str, Callable[[], object]] = {
    "`attach` on a parameter": attached_twice,
    "λ that is negative": arguments_without_meaning,
    "a selector that matches nothing": lambda: wdhook.attach(line(), λ, overrides={"no.*": 0.0}),
    "a model without an eligible": lambda: wdhook.attach(nn.LayerNorm(2), λ),
    "FSDP1": flattened,
    'decoupled decay at `"backward"`': lambda: wdhook.attach(line(), λ, mode="decoupled"),
    "decoupled decay, and an optimizer without": lomo_without_lr,
    "decoupled decay, and an optimizer with two": two_sequences_given,
    '`at="step"`': unannounced_at_step,
    "a schedule of λ": unannounced_with_schedule,
    "λ set by hand": set_under_a_schedule,
    "the state of a handle": state_of_another_mode,
    "`adopt`, and": nothing_to_adopt,
    "`adopt` for one": adopt_one_of_two,
    "`cautious=True` with coupled": cautious_too_early,
    '`low_precision="defer"`': deferred_where_nothing_can_wait,
    "`cautious=True` with `toward=`": cautious_toward,
    "a target that is no": targets_without_meaning,
    "a state that was taken after": state_that_does_not_fit,
    "a state with other targets": state_of_other_targets,
    "a target that has another shape": target_of_another_shape,
    "`Plan.param_groups`": groups_of_a_plan_with_targets,
    "a state with pending decay": pending_for_a_cautious_handle,
    "`apply_weight_decay` before": lambda: wdhook.apply_weight_decay(line(), weight_decay=λ),
    "`apply_weight_decay(optimizer=)`": decays_itself,
}


@pytest.mark.filterwarnings("ignore:.*FSDP:UserWarning", "ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("situation", ROWS)
def test_a_call_that_is_an_error(situation: str) -> None:
    """Each row is provoked, and raises what the page says."""
    (call,) = [call for start, call in IN_CALLS.items() if situation.startswith(start)]
    with pytest.raises(getattr(wdhook, ROWS[situation])) as caught:
        call()
    assert type(caught.value).__name__ == ROWS[situation]


def test_every_row_is_provoked() -> None:
    """As many rows as there are calls here, and none that the pattern misses."""
    assert len(ROWS) == len(IN_CALLS) == CALLS.count("\n| ") - 1


# -- statements ------------------------------------------------------------------------------------

TRIED: dict[str, Callable[[], None]] = {}


def statement(start: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register the trial of a statement of the page, by its first words."""

    def register(trial: Callable[[], None]) -> Callable[[], None]:
        TRIED[start] = trial
        return trial

    return register


def decay_in(model: Any, gradients: float = 1.0) -> Tensor:
    """What a first step of SGD with rate 1 has taken beside the gradient, by element."""
    taken: Tensor = (1 - model.weight - gradients * X).detach().flatten()
    return taken


@statement("A loss scaled by hand")
def _scaled() -> None:
    class Scale:
        def scale(self, tensor: Tensor) -> Tensor:
            return tensor * 1024

        def is_enabled(self) -> bool:
            return True

    options: list[dict[str, Any]] = [{}, {"scaler": Scale()}, {"at": "step"}]
    found = []
    for option in options:
        model = line()
        optimizer = sgd(model)
        wdhook.attach(model, λ, **option)
        (1024 * model(X).sum()).backward()
        model.weight.grad.div_(1024)
        optimizer.step()
        found.append(decay_in(model).tolist())
    # 1 − λ/1024 is rounded in the parameter, by at most 2⁻²⁴
    assert found[0] == pytest.approx([λ / 1024] * 2, abs=2**-22)
    assert found[1:] == [[λ, λ]] * 2


@statement("A resumed run without the handle's state")
def _resumed_without_state() -> None:
    first = line().weight.tolist()
    for toward, target in (("init", 1 - 2 * X), (wdhook.Anchor(line()), torch.tensor(first))):
        model = line()
        optimizer = sgd(model)
        decay = wdhook.attach(model, 0.5, mode="decoupled", at="step", toward=toward)
        model(2 * X).sum().backward()
        optimizer.step()
        saved = model.state_dict()
        decay.remove()
        resumed = line()
        resumed.load_state_dict(saved)
        wdhook.attach(resumed, 0.5, mode="decoupled", at="step", toward=toward)
        (resumed.weight * 0).sum().backward()
        sgd(resumed).step()
        expected = saved["weight"].lerp(target, 0.5)
        assert torch.equal(resumed.weight, expected)


@statement("Gradients zeroed after the last backward pass")
def _zeroed() -> None:
    for at, expected in (("backward", 1.0), ("step", 1.0 - λ)):
        model = line()
        optimizer = sgd(model)
        wdhook.attach(model, λ, at=at)
        model(X).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert model.weight.tolist() == [[expected] * 2]


@statement("Gradients written through `.data` or numpy")
def _without_version() -> None:
    for at, factor, kept in (
        ("backward", 0.0, 0.0),
        ("backward", 0.5, 0.5),
        ("step", 0.0, 1.0),
        ("step", 0.5, 1.0),
    ):
        for through_numpy in (False, True):
            model = line()
            optimizer = sgd(model)
            wdhook.attach(model, λ, at=at)
            model(X).sum().backward()
            if through_numpy:
                model.weight.grad.numpy()[:] *= factor
            else:
                model.weight.grad.data.mul_(factor)
            model(X).sum().backward()
            optimizer.step()
            assert decay_in(model, 1 + factor).tolist() == [kept * λ] * 2


@statement("A gradient replaced once")
def _replaced() -> None:
    for at, decay in (("backward", 0.0), ("step", λ)):
        model = line()
        optimizer = sgd(model)
        wdhook.attach(model, λ, at=at)
        model(X).sum().backward()
        model.weight.grad = X.clone()
        if at == "backward":
            with pytest.warns(wdhook.WdhookWarning, match="replaced"):
                optimizer.step()
        else:
            optimizer.step()
        assert decay_in(model).tolist() == [decay] * 2


@statement("A parameter that joins the model late")
def _late() -> None:
    model, late = nn.Sequential(line()), line()
    optimizer = SGD([*model.parameters(), *late.parameters()], lr=1.0)

    def step() -> Tensor:
        before = late.weight.detach().clone()
        optimizer.zero_grad()
        (model[0](X) + late(X)).sum().backward()
        optimizer.step()
        return before - late.weight.detach() - X

    wdhook.attach(model, λ)
    step()
    model.add_module("late", late)
    assert not step().any()


@statement("A copy of an attached model")
def _copied() -> None:
    for original_has_optimizer in (False, True):
        model = line()
        wdhook.attach(model, λ)
        kept = sgd(model) if original_has_optimizer else None
        copied = copy.deepcopy(model)
        optimizer = sgd(copied)
        for step in range(21):
            optimizer.zero_grad()
            copied(X).sum().backward()
            if step == 19 and kept is None:
                with pytest.warns(wdhook.WdhookWarning, match="has no hooks"):
                    optimizer.step()
            else:
                optimizer.step()
        assert not decay_in(copied, 21).any()


@statement("One update by hand")
def _by_hand() -> None:
    model = line()
    wdhook.attach(model, λ, at="step")

    def update() -> None:
        model.zero_grad()
        model(X).sum().backward()
        with torch.no_grad():
            model.weight.sub_(model.weight.grad)

    update()
    update()
    with pytest.warns(wdhook.WdhookWarning, match="no optimizer step was announced"):
        update()


@statement('A script that writes `group["weight_decay"]` where it is above 0')
def _writes_where_positive() -> None:
    model = line()
    optimizer = AdamW(model.parameters(), weight_decay=λ)
    decay = wdhook.adopt(model, optimizer)
    for group in optimizer.param_groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = 0.25
    model(X).sum().backward()
    optimizer.step()
    assert decay.weight_decay == λ
    optimizer.param_groups[0]["weight_decay"] = 0.25
    with pytest.raises(wdhook.DoubleDecayError) as caught:
        optimizer.step()
    assert caught.value.rule == "own-decay"


class Clips(SGD):
    """Clips in its step, as some subclasses do."""

    def step(self, closure: Any = None) -> Any:
        _halve(self)
        return super().step(closure)


def _halve(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.5)


@statement("A `step()` that changes gradients and then calls `super().step()`")
def _clips_in_step() -> None:
    for kind, at, kept in ((Clips, "backward", 0.5), (Clips, "step", 0.5), (SGD, "step", 1.0)):
        model = line()
        optimizer = kind(model.parameters(), lr=1.0)
        if kind is SGD:
            optimizer.register_step_pre_hook(_halve)
        with wdhook.attach(model, λ, at=at):
            model(X).sum().backward()
            optimizer.step()
        assert decay_in(model, 0.5).tolist() == [kept * λ] * 2


def _update_by_hand(weight: Tensor) -> None:
    with torch.no_grad():
        weight.sub_(weight.grad)  # type: ignore[arg-type]


@statement("An optimizer whose `step` is replaced on the instance after it has stepped")
def _replaced_step() -> None:
    for at, expected in (("step", 0.0), ("backward", λ)):
        model = line()
        optimizer = sgd(model)
        with wdhook.attach(model, λ, at=at):
            (model(X) * 0).sum().backward()
            optimizer.step()
            with torch.no_grad():
                model.weight.fill_(1.0)
            optimizer.zero_grad()
            optimizer.step = partial(_update_by_hand, model.weight)  # type: ignore[method-assign]
            model(X).sum().backward()
            optimizer.step()
        assert decay_in(model).tolist() == [expected] * 2
        with pytest.raises(wdhook.ArgumentError, match='at="backward"'):
            wdhook.attach(model, λ, at="step", optimizer=optimizer)


@statement("A parameter that several optimizers step, under a schedule of λ")
def _two_counts() -> None:
    schedule, found = wdhook.schedules.linear(0.0, 0.8, 8), []
    for resumes in (False, True):
        model = line()
        often, seldom = sgd(model), sgd(model)
        decay = wdhook.attach(model, schedule, at="step")
        for optimizer in (seldom, often, often, often):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
        if resumes:
            state = decay.state_dict()
            decay.remove()
            decay = wdhook.attach(model, schedule, at="step")
            decay.load_state_dict(state)
        seldom.zero_grad()
        model(X).sum().backward()
        seldom.step()
        found.append(decay.weight_decay)
        decay.remove()
    assert found == [schedule(2), schedule(5)]


@statement("Several threads in backward on one model at once")
def _in_turn() -> None:
    # That it fails when threads do not take turns is a matter of chance, and no test.
    model = perceptron()
    turn = threading.Lock()
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def work() -> None:
        loss = model(inputs).square().sum()
        with turn:
            loss.backward()

    twin = copy.deepcopy(model)
    wdhook.attach(model, λ)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in threads:
        twin(inputs).square().sum().backward()
    expected = twin[0].weight.grad + λ * twin[0].weight
    # the decay is added after the first of four gradients, and not after the last
    assert torch.allclose(model[0].weight.grad, expected, rtol=1e-5, atol=1e-6)


@statement("A `DTensor` gradient zeroed in place by a foreach optimizer")
def _sharded() -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(distributed, "distribute_tensor"):
        pytest.skip("torch before 2.5 has it elsewhere")
    mesh = dist.init_device_mesh("cpu", (1,))
    found = []
    for given in (False, True):
        model = nn.ModuleList([line(), line()])
        for part in model:
            whole = distributed.distribute_tensor(torch.ones(1, 2), mesh, [distributed.Shard(0)])
            part.weight = nn.Parameter(whole)
        optimizer = sgd(model, foreach=True)
        wdhook.attach(model, λ, optimizer=optimizer if given else None)
        for _batch in range(2):
            optimizer.zero_grad(set_to_none=False)
            (model[0].weight + model[1].weight).sum().full_tensor().backward()
        optimizer.step()
        taken = 1 - model[0].weight.full_tensor().detach()
        found.append((taken - 1).flatten().tolist())
    assert found == [[0.0, 0.0], [λ, λ]]


@statement("Hooks of yours")
def _hooks() -> None:
    model = line()
    before: list[Tensor] = []
    after: list[Tensor] = []
    wdhook.attach(model, λ)
    model.weight.register_hook(lambda grad: before.append(grad.clone()))
    model.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    model(X).sum().backward()
    assert torch.equal(before[0], X)
    assert torch.equal(after[0], X + λ)


@statement("FSDP1")
def _sharded_parameters() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    for kind in ("fsdp1", "fsdp2"):
        model = nn.Sequential(line())
        wdhook.attach(model, λ)
        if kind == "fsdp1":
            cpu = torch.device("cpu")
            model = fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
        elif hasattr(fsdp, "fully_shard"):
            fsdp.fully_shard(model)
        else:
            continue
        model(X).sum().backward()
        (param,) = model.parameters()
        local = param.grad.to_local() if kind == "fsdp2" else param.grad  # type: ignore[union-attr]
        assert torch.equal(local, X)
        sgd(model).step()
        here = param.to_local() if kind == "fsdp2" else param
        assert torch.equal(1 - here.detach(), X + λ)


@statement("An optimizer that reads the parameter in its update")
def _reads() -> None:
    adafactor = getattr(torch.optim, "Adafactor", None)
    if adafactor is None:
        pytest.skip("this torch has no Adafactor")
    ours, own = line(), line()
    wdhook.attach(ours, λ, mode="decoupled", at="step", lr=0.1)
    for model, weight_decay in ((ours, 0.0), (own, λ)):
        optimizer = adafactor(model.parameters(), lr=0.1, weight_decay=weight_decay)
        for _step in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert not torch.equal(ours.weight, own.weight)


@statement("Sparse gradients")
def _sparse() -> None:
    model = nn.Embedding(3, 1, sparse=True)
    with torch.no_grad():
        model.weight.fill_(1.0)
    wdhook.attach(model, λ, overrides={"*": True})
    model(torch.tensor([0, 0, 1])).sum().backward()
    model(torch.tensor([0])).sum().backward()
    sgd(model).step()
    assert model.weight.flatten().tolist() == [1 - 3 - λ, 1 - 1 - λ, 1.0]


@statement("Second derivatives")
def _hessian() -> None:
    model = line()
    wdhook.attach(model, λ)
    with warnings.catch_warnings():  # torch warns of a cycle, once in a process
        warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph", UserWarning)
        model(X).square().sum().backward(create_graph=True)
    (second,) = torch.autograd.grad(model.weight.grad.sum(), model.weight)
    assert second.tolist() == [[2 * 1 * 3, 2 * 2 * 3]]  # 2·xxᵀ·(1, 1), without λ
    loss = model(X).square().sum() + wdhook.l2_penalty(model, λ)
    (first,) = torch.autograd.grad(loss, model.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), model.weight)
    assert second.tolist() == [[6 + λ, 12 + λ]]


@statement("Functions that refer to the model")
def _kept_alive() -> None:
    alive = []
    for refers in (False, True):
        model = nn.Sequential(line())
        held = model if refers else None

        def predicate(name: str, module: Any, param: Any, held: Any = held) -> bool:
            return held is None or module is held[0]

        decay = wdhook.attach(model, λ, overrides={predicate: True})
        reference = weakref.ref(model)
        del model, held, predicate
        gc.collect()
        alive.append(reference() is not None)
        decay.remove()
        gc.collect()
        assert reference() is None
    assert alive == [False, True]


@pytest.mark.filterwarnings("ignore:.*FSDP:UserWarning", "ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("start", STATEMENTS)
def test_a_statement_of_the_page(start: str) -> None:
    """Each statement is tried, with the way out that it names."""
    TRIED[start]()


def test_every_statement_is_tried() -> None:
    """No trial without its statement, and no bullet that begins otherwise."""
    assert set(TRIED) == set(STATEMENTS)
    assert PAGE.count("\n- ") == len(STATEMENTS)
