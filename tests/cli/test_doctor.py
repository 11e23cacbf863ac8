"""`python -m wdhook doctor`: each thing that it finds, found in a training that has it and in none
that has not."""

from __future__ import annotations

import copy
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

import wdhook
from wdhook import cli
from wdhook._decay.step_listener import attached

Make = Callable[[], Any]


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


def loss(net: nn.Module) -> Tensor:
    p = next(net.parameters())
    return net(torch.ones(3, 4, dtype=p.dtype)).float().square().sum()


def healthy() -> Any:
    net = model()
    return net, SGD(net.parameters(), lr=0.1), lambda: loss(net)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Runs the command on a function; gives the parsed JSON, after the exit status was checked
    against it."""
    module = types.ModuleType("its_training")
    sys.modules["its_training"] = module

    def run(make: Make, *arguments: str) -> Any:
        module.make = make  # type: ignore[attr-defined]
        status = cli.main(["doctor", "its_training:make", *arguments, "--json"])
        streams = capsys.readouterr()
        if status == cli.BAD_USAGE:
            return streams.err
        found = json.loads(streams.out)
        assert status == any(f["severity"] != "note" for f in found["findings"])
        return found

    yield run
    del sys.modules["its_training"]
    for engine in attached():
        engine.close()


def kinds(found: Any) -> list[tuple[str, str]]:
    return [(f["severity"], f["kind"]) for f in found["findings"]]


def names(found: Any, kind: str) -> list[str]:
    (finding,) = [f for f in found["findings"] if f["kind"] == kind]
    parameters: list[str] = finding["parameters"]
    return parameters


# -- healthy ---------------------------------------------------------------------------------------


def trains_by_itself() -> Any:
    net, optimizer, step = healthy()

    def train() -> None:
        optimizer.zero_grad()
        step().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return [optimizer], net, train


def accumulates() -> Any:
    net, optimizer, step = healthy()
    calls = []

    def micro_batch() -> Tensor:
        value: Tensor = step()
        value.backward()
        calls.append(1)
        if len(calls) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return value

    return net, optimizer, micro_batch


def steps_with_closure() -> Any:
    net = model()
    return net, torch.optim.LBFGS(net.parameters()), lambda: loss(net)


def scales() -> Any:
    net = model()
    return net, SGD(net.parameters(), lr=1e-6), torch.amp.GradScaler("cpu"), lambda: loss(net)


def overflows_at_first() -> Any:
    net = model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    return net, SGD(net.parameters(), lr=1e-6), scaler, lambda: loss(net)


def has_two() -> Any:
    net = model()
    return net, (Adam(net[0].parameters()), SGD(net[1:].parameters(), lr=0.1)), lambda: loss(net)


def is_frozen() -> Any:
    net = model()
    net[0].requires_grad_(False)
    return net, SGD(net[1:].parameters(), lr=0.1), lambda: loss(net)


@pytest.mark.parametrize(
    "make",
    [
        healthy,
        trains_by_itself,
        accumulates,
        steps_with_closure,
        scales,
        overflows_at_first,
        has_two,
        is_frozen,
    ],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_nothing_is_found_where_nothing_is_wrong(
    make: Make, mode: str, doctor: Callable[..., Any]
) -> None:
    """A loss, a whole loop, accumulation, a closure, a scaler that skips steps, two optimizers: all
    are right."""
    found = doctor(make, "--mode", mode, "--at", "step")
    assert kinds(found) == []
    assert found["steps"] == len(found["optimizers"])
    (mine,) = found["attached"]
    assert (mine["by"], mine["mode"], mine["at"], mine["decayed_tensors"]) == (
        "doctor",
        mode,
        "step",
        2,
    )


def test_what_works_is_said_as_the_handle_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The text has the first line of ``print(decay)`` only where nothing is wrong."""
    net, optimizer, step = healthy()
    handle = wdhook.attach(net, 0.125, at="step")
    module = types.ModuleType("its_training")
    sys.modules["its_training"] = module
    try:
        for λ in (0.0, 0.5):
            optimizer.param_groups[0]["weight_decay"] = λ
            module.make = lambda: (net, optimizer, step)  # type: ignore[attr-defined]
            assert cli.main(["doctor", "its_training:make"]) == (λ > 0)
            text = " ".join(capsys.readouterr().out.split())
            assert (handle.check().sentence in text) == (λ == 0)
    finally:
        del sys.modules["its_training"]
        handle.remove()


def test_nothing_stays_behind(doctor: Callable[..., Any]) -> None:
    """Hooks on parameters and on optimizers are gone, and the optimizer has the λ that it had."""
    made = healthy()
    made[1].param_groups[0]["weight_decay"] = 0.5
    before = (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )
    assert ("error", "double-decay") in kinds(doctor(lambda: made))
    assert not attached()
    after = (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )
    assert before == after
    assert not any(p._post_accumulate_grad_hooks for p in made[0].parameters())
    assert made[1].param_groups[0]["weight_decay"] == 0.5


def test_a_handle_of_the_user_is_found_and_kept(doctor: Callable[..., Any]) -> None:
    """What `make` has attached is looked at, returned or not, and stays attached."""
    net, optimizer, step = healthy()
    handle = wdhook.attach(net, 0.125, at="step")
    found = doctor(lambda: (net, optimizer, step))
    assert found["attached"] == [
        {"by": "make", "weight_decay": 0.125, "mode": "coupled", "at": "step", "decayed_tensors": 2}
    ]
    assert doctor(lambda: (net, optimizer, step, handle))["attached"] == found["attached"]
    assert "steps=2" in repr(handle)
    handle.remove()


def test_the_inputs_make_a_loss(doctor: Callable[..., Any]) -> None:
    """Without `step`, `--input` does, for outputs in dicts, tuples and by name too."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.aside, self.unused = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, *, scale: float, ids: Tensor) -> Any:
            return {"a": [self.net(x)], "b": (None, self.aside(x) * scale), "ids": ids}

    def make() -> Any:
        net = Nested()
        return net, SGD(net.parameters(), lr=0.1)

    found = doctor(
        make, "--input", "randn(3, 4)", "--input", "scale=0.5", "--input", "ids=randint(0, 9, (3,))"
    )
    assert kinds(found) == [("warning", "no-gradient")]
    assert names(found, "no-gradient") == ["unused.weight", "unused.bias"]


# -- findings --------------------------------------------------------------------------------------


def test_double_decay_and_decay_of_what_is_exempt(doctor: Callable[..., Any]) -> None:
    """AdamW as most people construct it: its weights decayed twice, its biases and norms decayed at
    all."""
    net = model()
    found = doctor(lambda: (net, AdamW(net.parameters()), lambda: loss(net)))
    assert kinds(found) == [
        ("error", "double-decay"),
        ("warning", "exempt-decayed"),
        ("note", "default-mode"),
    ]
    assert names(found, "double-decay") == ["0.weight", "2.weight"]
    assert names(found, "exempt-decayed") == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert (
        found["findings"][0]["facts"]["optimizer"]
        == "AdamW, param_groups[0]['weight_decay'] = 0.01"
    )
    assert "wdhook.adopt(model, optimizer)" in found["findings"][0]["do"]
    assert found["findings"][1]["facts"]["roles"] == "bias, norm"
    assert found["steps"] == 1  # the step has run to its end all the same


def test_who_is_in_no_optimizer_and_in_two(doctor: Callable[..., Any]) -> None:
    """Parameters that were forgotten, and those that were given twice."""

    def make() -> Any:
        net = model()
        return (
            net,
            [SGD(net[0].parameters(), lr=0.1), SGD(net[0].parameters(), lr=0.1)],
            lambda: loss(net),
        )

    found = doctor(make)
    assert kinds(found) == [("warning", "two-optimizers"), ("warning", "no-optimizer")]
    assert names(found, "two-optimizers") == ["0.weight", "0.bias"]
    assert names(found, "no-optimizer") == ["1.weight", "1.bias", "2.weight", "2.bias"]


def test_a_wrapper_is_no_second_optimizer(doctor: Callable[..., Any]) -> None:
    """An optimizer around another, both returned, is one."""

    class Wrapper(Optimizer):
        def __init__(self, base: Optimizer) -> None:
            self.base = base
            super().__init__(base.param_groups, base.defaults)

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

    def make() -> Any:
        net, base, step = healthy()
        return net, [base, Wrapper(base)], step

    assert kinds(doctor(make)) == []


def test_an_optimizer_of_a_copy(doctor: Callable[..., Any]) -> None:
    """The optimizer was built, and then the model was copied."""

    def make() -> Any:
        net, optimizer, _ = healthy()
        new = copy.deepcopy(net)
        return new, optimizer, lambda: loss(new)

    found = doctor(make)
    assert kinds(found) == [("warning", "no-optimizer"), ("warning", "not-of-the-model")]
    assert found["findings"][1]["facts"] == {
        "tensors": "6, first SGD.param_groups[0]['params'][0] (8, 4)"
    }


def test_decay_that_rounds_away(doctor: Callable[..., Any]) -> None:
    """bfloat16 parameters whose decay is below their precision; every one of them is named, and
    float32 is not."""

    def make() -> Any:
        net = model(torch.bfloat16)
        net[2].float()
        net.forward = lambda x: net[2](net[1](net[0](x)).float())  # type: ignore[method-assign]
        return (
            net,
            SGD([{"params": net[0].parameters()}, {"params": net[1:].parameters()}], lr=0.1),
            lambda: loss(net),
        )

    found = doctor(make, "--override", "norm=true")
    assert kinds(found) == [("warning", "rounds-away")]
    assert names(found, "rounds-away") == ["0.weight", "1.weight", "1.bias"]
    assert found["findings"][0]["facts"] == {"lr·λ": "1e-05, half a unit: 0.00390625"}
    # 0.1·0.05 = 0.005 is above half a unit in the last place of bfloat16, 2⁻⁸ = 0.0039.
    assert kinds(doctor(make, "--weight-decay", "0.05")) == []


class WithoutLr(SGD):
    """A step of its own, and no lr in its groups to be read."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


class KeepsTwo(WithoutLr):
    """MADGRAD's kind: once it has stepped it keeps the point from which it started."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.param_groups[0]["lr"] = 0.1

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["x0"] = p.detach().clone()
        super().step()


@pytest.mark.parametrize(
    ("kind", "finding"),
    [(WithoutLr, "learning-rate"), (KeepsTwo, "unsupported-optimizer")],
    ids=lambda a: str(a),
)
@pytest.mark.parametrize("at", ["backward", "step"])
def test_what_decoupled_decay_needs(
    kind: Any, finding: str, at: str, doctor: Callable[..., Any]
) -> None:
    """No lr, or two sequences of weights: an error in decoupled mode, a note for the others."""

    def make() -> Any:
        net = model()
        return net, kind(net.parameters()), lambda: loss(net)

    assert kinds(doctor(make, "--mode", "decoupled", "--at", at)) == [("error", finding)]
    assert kinds(doctor(make, "--at", at)) == [("note", finding)]
    if kind is WithoutLr:
        assert kinds(doctor(make, "--mode", "decoupled", "--at", at, "--lr", "0.1")) == []


def steps_copies() -> Any:
    net = model(torch.bfloat16)
    copies = [p.detach().float().requires_grad_() for p in net.parameters()]
    optimizer = SGD(copies, lr=0.1)

    def train() -> None:
        loss(net).backward()
        for copied, p in zip(copies, net.parameters(), strict=True):
            copied.grad = p.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        with torch.no_grad():
            for copied, p in zip(copies, net.parameters(), strict=True):
                p.copy_(copied)
        net.zero_grad()

    return net, optimizer, train


class KeepsMasters(SGD):
    """Keeps float32 copies in its state, as apex's fused optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master", p.detach().float())
            master.sub_(p.grad.float(), alpha=1e-3)
            p.data.copy_(master)


def keeps_copies() -> Any:
    net = model(torch.bfloat16)
    return net, KeepsMasters(net.parameters(), lr=1e-3), lambda: loss(net)


@pytest.mark.parametrize("make", [steps_copies, keeps_copies], ids=lambda make: make.__name__)
def test_master_weights(make: Make, doctor: Callable[..., Any]) -> None:
    """Copies that are written back: no obstacle for a decay in the gradient, an error where
    parameters are shrunk."""
    found = [pair for pair in kinds(doctor(make)) if pair[1] != "rounds-away"]
    assert found == [("note", "master-weights")]
    wrong = doctor(make, "--mode", "decoupled", "--at", "step", "--weight-decay", "100")
    assert [pair for pair in kinds(wrong) if pair[1] != "rounds-away"] == [
        ("error", "master-weights")
    ]


def test_a_scaler_that_was_not_given(doctor: Callable[..., Any]) -> None:
    """A loop with a GradScaler, attached without it; at the step nothing is wrong with it."""

    def make() -> Any:
        net, optimizer, step = healthy()
        scaler = torch.amp.GradScaler("cpu")

        def train() -> None:
            optimizer.zero_grad()
            scaler.scale(step()).backward()
            scaler.step(optimizer)
            scaler.update()

        return net, optimizer, train

    found = doctor(make)
    assert kinds(found) == [("error", "loss-scale")]
    assert "attach(..., scaler=scaler)" in found["findings"][0]["do"]
    assert kinds(doctor(make, "--at", "step")) == []


def test_an_optimizer_that_hides_its_steps(doctor: Callable[..., Any]) -> None:
    """Steps that cannot be heard are an error at the step and a note in the backward; one that
    never came is told."""

    class Hidden:
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params), "lr": 0.1}]

        def zero_grad(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.grad = None

        def step(self) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad, alpha=0.1)

    def hidden() -> Any:
        net = model()
        return net, Hidden(net.parameters()), lambda: loss(net)

    assert kinds(doctor(hidden)) == [("note", "unheard-steps")]
    assert kinds(doctor(hidden, "--at", "step")) == [("error", "unheard-steps")]

    def idle() -> Any:
        net, optimizer, step = healthy()
        return net, optimizer, lambda: step().backward()

    found = doctor(idle)
    assert kinds(found) == [("warning", "unheard-steps")]
    assert found["findings"][0]["facts"]["why"] == "none came in the training step"


def test_an_error_of_the_engine_hides_nothing_else(doctor: Callable[..., Any]) -> None:
    """After an error in the step the loop goes on without the decay: the second optimizer is
    reached."""

    def make() -> Any:
        net = model()
        first, second = WithoutLr(net[0].parameters()), SGD(net[2].parameters(), lr=0.1)
        return net, [first, second], lambda: loss(net)

    found = doctor(make, "--mode", "decoupled", "--at", "step")
    assert kinds(found) == [("error", "learning-rate"), ("warning", "no-optimizer")]
    assert names(found, "no-optimizer") == ["1.weight", "1.bias"]
    assert found["steps"] == 2


def test_other_warnings_of_wdhook_are_findings(doctor: Callable[..., Any]) -> None:
    """What the engine warns of in the loop is told; warnings of others stay warnings."""

    def make() -> Any:
        net, optimizer, step = healthy()

        def train() -> None:
            step().backward()
            net[0].weight.grad = net[0].weight.grad.clone()
            warnings.warn("of the user", UserWarning, stacklevel=1)
            optimizer.step()

        return net, optimizer, train

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = doctor(make)
    assert kinds(found) == [("warning", "warned")]
    assert found["findings"][0]["parameters"] == ["0.weight"]
    assert "A gradient was replaced" in found["findings"][0]["what"]
    assert [str(w.message) for w in caught] == ["of the user"]


# -- false alarms ----------------------------------------------------------------------------------


def loss_and(net: nn.Module, optimizer: Any, *others: Any) -> Make:
    return lambda: (net, optimizer, lambda: loss(net), *others)


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("mode", [None, "coupled", "decoupled"])
def test_param_groups_are_healthy(mode: str | None, at: str, doctor: Callable[..., Any]) -> None:
    """An optimizer that decays by wdhook's own param groups: a note, and no handle is attached."""
    net = model()
    given = [] if mode is None else ["--mode", mode]
    optimizer = AdamW(wdhook.param_groups(net, 0.05))
    found = doctor(loss_and(net, optimizer), "--at", at, *given)
    assert kinds(found) == [("note", "group-decay")]
    assert found["attached"] == []
    assert found["findings"][0]["facts"] == {"the optimizer's weight_decay": "0.05"}
    assert optimizer.param_groups[0]["weight_decay"] == 0.05


def test_param_groups_beside_a_handle_are_double_decay(doctor: Callable[..., Any]) -> None:
    """Twin: a handle beside the groups decays twice; groups with a bias are not healthy."""
    net = model()
    groups = wdhook.param_groups(net, 0.05)
    with wdhook.attach(net, 0.05, mode="decoupled", at="step"):
        found = doctor(loss_and(net, AdamW(groups)))
    assert kinds(found) == [("error", "double-decay")]
    assert names(found, "double-decay") == ["0.weight", "2.weight"]
    groups[0]["params"] = [*groups[0]["params"], net[0].bias]
    groups[1]["params"] = [p for p in groups[1]["params"] if p is not net[0].bias]
    found = doctor(loss_and(net, AdamW(groups)))
    assert kinds(found) == [
        ("error", "double-decay"),
        ("warning", "exempt-decayed"),
        ("note", "default-mode"),
    ]
    assert names(found, "exempt-decayed") == ["0.bias"]


def test_param_groups_that_leave_a_weight_out(doctor: Callable[..., Any]) -> None:
    """Groups that decay a part of the weights are the user's choice; the note names the others."""
    net = model()
    rest = [p for p in net.parameters() if p is not net[0].weight]
    groups = [{"params": [net[0].weight]}, {"params": rest, "weight_decay": 0.0}]
    found = doctor(loss_and(net, AdamW(groups)))
    assert kinds(found) == [("note", "group-decay")]
    assert names(found, "group-decay") == ["2.weight"]


def test_a_count_of_steps_is_no_master_weight(doctor: Callable[..., Any]) -> None:
    """A parameter that is 1, in bfloat16, and a state whose count of steps is 1.0 in float32."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.temperature = model(), nn.Parameter(torch.tensor([1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.temperature

    net = Scaled().bfloat16()
    optimizer = Adam(net.parameters(), lr=1e-3)
    found = doctor(loss_and(net, optimizer), "--mode", "decoupled", "--at", "step", "--lr", "100")
    assert ("error", "master-weights") not in kinds(found)
    assert optimizer.state[net.temperature]["step"].dtype == torch.float32


def forgets_to_step() -> Any:
    net, optimizer, step = healthy()
    return net, optimizer, lambda: step().backward()


def returns_after_backward() -> Any:
    net, optimizer, step = healthy()

    def train() -> Tensor:
        value: Tensor = step()
        value.backward()
        return value

    return net, optimizer, train


@pytest.mark.parametrize(
    "make", [forgets_to_step, returns_after_backward], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_that_was_forgotten(make: Make, mode: str, doctor: Callable[..., Any]) -> None:
    """The advice is to step, and not to change the decay, which has no part in it."""
    found = doctor(make, "--mode", mode)
    assert kinds(found) == [("warning", "unheard-steps")]
    (finding,) = found["findings"]
    assert "optimizer.step()" in finding["do"]
    assert "coupled" not in finding["do"]
    assert "backward" not in finding["what"]
    assert found["steps"] == 0


def test_a_name_with_a_space(doctor: Callable[..., Any]) -> None:
    """Parameters are data: a module called "my layer" is named whole."""

    def make() -> Any:
        net = nn.Sequential()
        net.add_module("my layer: a", nn.Linear(4, 1))
        return net, AdamW(net.parameters()), lambda: loss(net)

    found = doctor(make)
    assert names(found, "double-decay") == ["my layer: a.weight"]
    assert names(found, "exempt-decayed") == ["my layer: a.bias"]


@pytest.mark.parametrize("given", [None, "coupled", "decoupled"])
def test_a_mode_that_was_not_named(given: str | None, doctor: Callable[..., Any]) -> None:
    """AdamW without its own decay: a note that the default is coupled, unless a mode is given."""
    net = model()
    optimizer = AdamW(net.parameters(), weight_decay=0.0)
    found = doctor(loss_and(net, optimizer), *([] if given is None else ["--mode", given]))
    assert kinds(found) == ([("note", "default-mode")] if given is None else [])
    net = model()
    optimizer = AdamW(net.parameters(), weight_decay=0.0)
    with wdhook.attach(net, 0.1, mode=given, optimizer=optimizer):
        found = doctor(loss_and(net, optimizer))
    assert kinds(found) == ([("warning", "warned")] if given is None else [])
    if given is None:
        assert found["findings"][0]["rule"] == "default-mode"


def test_findings_carry_the_rule_of_the_engine(doctor: Callable[..., Any]) -> None:
    """Errors, warnings and looks name the rule; what the doctor alone looks at has none."""
    net = model()
    found = doctor(loss_and(net, AdamW(net.parameters())))
    assert [f["rule"] for f in found["findings"]] == ["own-decay", "", "default-mode"]
    found = doctor(loss_and(net, KeepsTwo(net.parameters())), "--mode", "decoupled")
    assert [f["rule"] for f in found["findings"]] == ["two-sequences"]


# -- what cannot be examined -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (
            lambda: model(),
            ["does not make a training step", "returned: no optimizer", "make() returns these"],
        ),
        (
            lambda: SGD(model().parameters(), lr=0.1),
            ["returned: no model\n", "expected: (model, optimizer, step)"],
        ),
        (lambda: (model(), *healthy()), ["returned: 2 models", "nn.ModuleList"]),
        (lambda: healthy()[:2], ["no step, and there is no --input"]),
        (lambda: (*healthy(), 3), ["returned: an int, which has no place in a training step"]),
        (lambda: None, ["returned: None\n", "expected: (model, optimizer, step)"]),
        (lambda: (*healthy(), None), ["a tuple with None in it"]),
        (lambda: (*healthy(), len), ["returned: 2 functions; `step` is one"]),
        (lambda: (*healthy()[:2], lambda: 3.0), ["must return the loss", "returned: a float"]),
        (lambda: (*healthy()[:2], lambda: None), ["must return the loss", "returned: None"]),
        (
            lambda: (*healthy(), *(torch.amp.GradScaler("cpu") for _ in range(2))),
            ["returned: 2 scalers"],
        ),
        (lambda: (*healthy()[:2], lambda: torch.ones(2)), ["returned: a tensor (2,)"]),
        (
            lambda: (*healthy()[:2], lambda: 1 / 0),
            ["the training step raised an error", "ZeroDivisionError", "at: "],
        ),
        (lambda: 1 / 0, ["its_training:make raised an error", "ZeroDivisionError"]),
    ],
)
def test_what_is_no_training(make: Make, pieces: list[str], doctor: Callable[..., Any]) -> None:
    """A function that returns something else ends with status 2, and is told what to return."""
    err = doctor(make)
    assert isinstance(err, str)
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--override", "nothing=0"], "matches nothing"),
        (["--lr", "-1"], "`lr` must be"),
        (["--override", "weight=0"], "no eligible parameter"),
    ],
)
def test_what_cannot_be_attached(
    arguments: list[str], piece: str, doctor: Callable[..., Any]
) -> None:
    """Arguments of `attach` without a meaning end with status 2."""
    assert piece in doctor(healthy, *arguments)


def test_names_are_shortened_in_text_alone(
    doctor: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A person sees a count and six names, a program sees all of them."""

    def make() -> Any:
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
        return net, AdamW(net.parameters()), lambda: loss(net)

    assert len(names(doctor(make), "double-decay")) == 10
    assert cli.main(["doctor", "its_training:make"]) == 1
    out = capsys.readouterr().out
    shown = "0.weight, 1.weight, 2.weight, 3.weight, 4.weight, 5.weight"
    assert f"  parameters: 10: {shown}, ... 4 more\n" in out
    assert out.endswith("1 error, 1 warning, 1 note\n")


# -- what make() may return ------------------------------------------------------------------------


def in_a_dict() -> Any:
    net, optimizer, step = healthy()
    return {"model": net, "optimizer": optimizer, "step": step}


def in_nested_lists() -> Any:
    net, optimizer, step = healthy()
    return [net, {"optimizers": (optimizer,)}, [step]]


def with_schedulers() -> Any:
    net, optimizer, step = healthy()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return net, optimizer, cosine, {"scheduler": plateau}, step


def with_a_loader() -> Any:
    return (*healthy(), torch.utils.data.DataLoader([1, 2, 3]))


@pytest.mark.parametrize(
    "make",
    [in_a_dict, in_nested_lists, with_schedulers, with_a_loader],
    ids=lambda make: make.__name__,
)
def test_the_form_of_what_make_returns_is_free(make: Make, doctor: Callable[..., Any]) -> None:
    """Dicts, lists and tuples, nested; schedulers and loaders are ignored."""
    found = doctor(make)
    assert kinds(found) == []
    assert (found["optimizers"], found["steps"]) == (["SGD"], 1)


def test_an_override_that_matches_nothing_gets_near_names(doctor: Callable[..., Any]) -> None:
    """A slip in a role or a name is answered by a question."""
    assert "Did you mean 'norm'?" in doctor(healthy, "--override", "nrom=true")
