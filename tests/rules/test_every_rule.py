"""Every rule of the engine: a training that breaks it, and one beside it that does not.

From the id in an error or a warning one finds its training here: ``pytest -k own-decay``.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import SGD, AdamW, Optimizer
from twins import batches, loss_of, perceptron

import wdhook
from wdhook._base.problem import Problem
from wdhook._decay import steps
from wdhook._decay.rules.base import Rule
from wdhook._decay.rules.table import RULES

λ, LR = 0.1, 0.1
Training = Callable[[bool, pytest.MonkeyPatch], object]
TRAININGS: dict[str, Training] = {}


def training_of(rule: str) -> Callable[[Training], Training]:
    """Register the training of a rule. Its first argument says whether the rule is broken."""

    def register(training: Training) -> Training:
        assert rule not in TRAININGS
        TRAININGS[rule] = training
        return training

    return register


def backward(model: nn.Module, **options: Any) -> None:
    loss_of(model, batches(model, 1)[0]).backward(**options)


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(model.parameters(), lr=LR, **options)


# -- at `attach` -----------------------------------------------------------------------------------


class Lomo:
    """Has param groups, and is no torch.optim.Optimizer."""

    def __init__(self, params: Any, weight_decay: float) -> None:
        self.param_groups = [{"params": list(params), "weight_decay": weight_decay}]


@training_of("own-decay-unannounced")
def lomo(broken: bool, _: Any) -> None:
    """An optimizer that decays, whose steps torch does not announce, is given."""
    model = perceptron()
    optimizer = Lomo(model.parameters(), λ if broken else 0.0)
    wdhook.attach(model, λ, optimizer=optimizer)


# -- before a step ---------------------------------------------------------------------------------


@training_of("own-decay")
def own_decay(broken: bool, _: Any) -> None:
    """The optimizer's weight_decay is not 0."""
    model = perceptron()
    wdhook.attach(model, λ)
    backward(model)
    sgd(model, weight_decay=λ if broken else 0.0).step()


@training_of("learning-rate")
def learning_rate(broken: bool, _: Any) -> None:
    """The optimizer holds its learning rate elsewhere than in the param group."""
    model = perceptron()
    wdhook.attach(model, λ, mode="decoupled", at="step")
    backward(model)
    optimizer = sgd(model)
    if broken:
        optimizer.param_groups[0]["lr"] = None
    optimizer.step()


@training_of("micro-batches-in-state")
def micro_batches_in_state(broken: bool, _: Any) -> None:
    """The step only takes gradients into the state, as optimi's gradient accumulation does."""
    model = perceptron()
    wdhook.attach(model, λ)
    optimizer = sgd(model)
    optimizer.optimizer_accumulation = broken  # type: ignore[attr-defined]
    backward(model)
    optimizer.step()


@training_of("not-stepped-by-those-given")
def not_stepped_by_those_given(broken: bool, _: Any) -> None:
    """A layer is trained that the optimizer does not own; or it is frozen."""
    model = perceptron()
    model[0].requires_grad_(broken)
    optimizer = SGD(model[3:].parameters(), lr=LR)
    wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer)
    backward(model)
    optimizer.step()


@training_of("other-learning-rate")
def other_learning_rate(broken: bool, _: Any) -> None:
    """One optimizer is given, and another one with another rate steps."""
    model = perceptron()
    given = sgd(model)
    wdhook.attach(model, λ, mode="decoupled", optimizer=given)
    backward(model)
    SGD(model.parameters(), lr=2 * LR if broken else LR).step()


@training_of("gradients-with-graph")
def gradients_with_graph(broken: bool, _: Any) -> None:
    """backward(create_graph=True) and decoupled decay."""
    model = perceptron()
    wdhook.attach(model, λ, mode="decoupled", at="step")
    backward(model, create_graph=broken)
    sgd(model).step()


class ScheduleFree(SGD):
    """Has to be told which of its sequences the model holds."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@training_of("two-sequences")
def two_sequences(broken: bool, _: Any) -> None:
    """Decoupled decay of one of two sequences of weights."""
    model = perceptron()
    wdhook.attach(model, λ, mode="decoupled", at="step")
    backward(model)
    (ScheduleFree if broken else SGD)(model.parameters(), lr=LR).step()


@training_of("scaler-not-given")
def scaler_not_given(broken: bool, _: Any) -> None:
    """A GradScaler steps; it was given or not."""
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wdhook.attach(model, λ, scaler=None if broken else scaler)
    scaler.scale(loss_of(model, batches(model, 1)[0])).backward()
    scaler.step(sgd(model))


class DividesByItself(SGD):
    """Divides gradients by its `grad_scale`, as fused optimizers do."""

    grad_scale: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        scale, self.grad_scale = self.grad_scale, None
        for group in self.param_groups:
            for param in group["params"]:
                if scale is not None and param.grad is not None:
                    param.grad.div_(scale)
        return super().step(closure)


@training_of("grad-scale-by-hand")
def grad_scale_by_hand(broken: bool, _: Any) -> None:
    """An optimizer is told the scale of the loss, and no scaler is there."""
    model = perceptron()
    wdhook.attach(model, λ)
    optimizer = DividesByItself(model.parameters(), lr=LR)
    backward(model)
    if broken:
        optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()


@training_of("scaler-does-not-step")
def scaler_does_not_step(broken: bool, _: Any) -> None:
    """A GradScaler was given, and the optimizer is stepped without it."""
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wdhook.attach(model, λ, scaler=scaler)
    scaler.scale(loss_of(model, batches(model, 1)[0])).backward()
    optimizer = sgd(model)
    if broken:
        optimizer.step()
    else:
        scaler.step(optimizer)


@training_of("sign-turned")
def sign_turned(broken: bool, _: Any) -> None:
    """`maximize` is set between the backward pass and the step."""
    model = perceptron()
    optimizer = sgd(model)
    wdhook.attach(model, λ, optimizer=optimizer)
    backward(model)
    optimizer.param_groups[0]["maximize"] = broken
    optimizer.step()


@training_of("pipeline-divides")
def pipeline_divides(broken: bool, _: Any) -> None:
    """A pipeline schedule that scales gradients exists for the module."""
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    if "scale_grads" not in inspect.signature(pipelining.ScheduleGPipe).parameters:
        pytest.skip("this torch has no `scale_grads`")
    model = perceptron()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stage = pipelining.PipelineStage(model, 0, 1, torch.device("cpu"))
        schedule = pipelining.ScheduleGPipe(
            stage, 4, loss_fn=nn.functional.mse_loss, scale_grads=broken
        )
        wdhook.attach(model, λ)
        backward(model)
        sgd(model).step()
        assert schedule.scale_grads == broken
    finally:
        dist.destroy_process_group()


@training_of("ambiguous-gradient")
def ambiguous_gradient(broken: bool, _: Any) -> None:
    """Gradients of micro-batches are moved to a buffer, and put back before the step."""
    model = perceptron()
    wdhook.attach(model, λ)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _batch in range(2):
        backward(model)
        for name, param in model.named_parameters() if broken else ():
            assert param.grad is not None
            sums[name] += param.grad
            param.grad = None
    for name, param in model.named_parameters() if broken else ():
        param.grad = sums[name]
    sgd(model).step()


class Perturbs(Optimizer):
    """Moves the parameters, lets the optimizer inside run the closure, and moves them back."""

    def __init__(self, base: Optimizer, by: float) -> None:
        self.base, self.by = base, by
        super().__init__(base.param_groups, base.defaults)

    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        before = [param.detach().clone() for param in params]
        torch._foreach_add_([param.data for param in params], self.by)
        loss = self.base.step(closure)
        if self.by:
            for param, old in zip(params, before, strict=True):
                param.data.copy_(old)
        return loss


@training_of("moved-in-the-closure")
def moved_in_the_closure(broken: bool, _: Any) -> None:
    """The closure runs at perturbed parameters, or at the parameters themselves."""
    model = perceptron()
    wdhook.attach(model, λ, at="step")
    wrapper = Perturbs(sgd(model), 0.5 if broken else 0.0)

    @torch.enable_grad()
    def closure() -> Tensor:
        wrapper.zero_grad()
        loss = loss_of(model, batches(model, 1)[0])
        loss.backward()
        return loss

    wrapper.step(closure)


@training_of("two-optimizers-in-turn")
def two_optimizers_in_turn(broken: bool, _: Any) -> None:
    """An outer optimizer steps what the given one steps. Both decay, unless paused."""
    model = perceptron()
    inner, outer = sgd(model), sgd(model)
    decay = wdhook.attach(model, λ, optimizer=inner, at="step")
    for optimizer in (inner, outer, inner):
        optimizer.zero_grad()
        backward(model)
        if optimizer is outer and not broken:
            with decay.paused():
                optimizer.step()
        else:
            optimizer.step()


@training_of("default-mode")
def default_mode(broken: bool, _: Any) -> None:
    """AdamW without its own decay, and a handle that was told no mode."""
    model = perceptron()
    wdhook.attach(model, λ, mode=None if broken else "coupled")
    backward(model)
    AdamW(model.parameters(), lr=LR, weight_decay=0.0).step()


@training_of("rounds-away")
def rounds_away(broken: bool, _: Any) -> None:
    """bfloat16: lr·λ is 1e-5, or 0.05, and half a unit in the last place is 0.0039."""
    model = perceptron().bfloat16()
    wdhook.attach(model, 1e-4 if broken else 0.5)
    backward(model)
    sgd(model).step()


@training_of("lost-in-gradients")
def lost_in_gradients(broken: bool, _: Any) -> None:
    """bfloat16 gradients of 1024, whose neighbours are 4 away, or of 2⁻¹⁰, and λ·p below 0.5."""
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    wdhook.attach(model, 1.0)
    optimizer = SGD(model.parameters(), lr=2**-7)
    for _ in range(30):
        model.weight.data.fill_(0.25)
        optimizer.zero_grad()
        (model.weight * (1024.0 if broken else 2**-10)).sum().backward()
        optimizer.step()


@training_of("lower-precision-gradient")
def lower_precision_gradient(broken: bool, _: Any) -> None:
    """A bfloat16 gradient of a float32 parameter."""
    if not hasattr(nn.Parameter, "grad_dtype"):
        pytest.skip("this torch has no `grad_dtype`")
    model = nn.Linear(4, 2, bias=False)
    model.weight.grad_dtype = torch.bfloat16 if broken else torch.float32
    wdhook.attach(model, λ)
    backward(model)
    sgd(model).step()


# -- before a step of somebody else ----------------------------------------------------------------


@training_of("master-weights")
def master_weights(broken: bool, _: Any) -> None:
    """The optimizer steps copies of the parameters, or the parameters."""
    model = perceptron()
    copies = [param.detach().clone().requires_grad_() for param in model.parameters()]
    wdhook.attach(model, λ, at="step")
    backward(model)
    for copied, param in zip(copies, model.parameters(), strict=True):
        copied.grad = param.grad
    SGD(copies if broken else model.parameters(), lr=LR).step()


@training_of("gradient-taken-by-engine")
def gradient_taken_by_engine(broken: bool, _: Any) -> None:
    """Megatron-core takes each gradient into `main_grad`, and decay was to come before."""
    model = perceptron()
    for param in model.parameters() if broken else ():
        param.main_grad = torch.zeros_like(param)
    wdhook.attach(model, λ)
    backward(model)


@training_of("gradient-taken")
def gradient_taken(broken: bool, _: Any) -> None:
    """An engine takes each gradient away in the backward pass, and steps buffers of its own."""
    model = perceptron()
    wdhook.attach(model, λ)
    buffers = [torch.zeros_like(param) for param in model.parameters()]

    nodes = [param.expand_as(param).grad_fn.next_functions[0][0] for param in model.parameters()]
    for node in nodes if broken else ():
        node.register_hook(lambda *_, node=node: setattr(node.variable, "grad", None))
    backward(model)
    SGD(buffers, lr=LR).step()


@training_of("never-steps")
def never_steps(broken: bool, _: Any) -> None:
    """20 steps of another model; an optimizer of ours exists, or none."""
    model, other = perceptron(), nn.Linear(1, 1)
    optimizer = None if broken else sgd(model)
    wdhook.attach(model, λ)
    backward(model)
    foreign = sgd(other)
    for _step in range(20):
        foreign.step()
    assert (optimizer is None) == broken


# -- when a step has ended -------------------------------------------------------------------------


class LineSearch(Optimizer):
    """Calls backward() in its step."""

    def __init__(self, params: Any, loss: Callable[[], Tensor] | None) -> None:
        self.loss = loss
        super().__init__(params, {"lr": LR})

    def step(self, closure: Any = None) -> None:
        if self.loss is not None:
            self.loss().backward()
        for param in self.param_groups[0]["params"]:
            param.data.sub_(param.grad, alpha=LR)


@training_of("undecayed")
def undecayed(broken: bool, _: Any) -> None:
    """The gradients come into being in the step, where no closure tells of them; or before."""
    model = perceptron()
    wdhook.attach(model, λ, at="step")

    def loss() -> Tensor:
        return loss_of(model, batches(model, 1)[0])

    if not broken:
        loss().backward()
    LineSearch(model.parameters(), loss if broken else None).step()


# -- in the backward pass, and while a step pays ---------------------------------------------------


@training_of("gradient-replaced")
def gradient_replaced(broken: bool, _: Any) -> None:
    """Gradients are replaced between the backward pass and the step."""
    model = perceptron()
    wdhook.attach(model, λ)
    backward(model)
    for param in model.parameters() if broken else ():
        assert param.grad is not None
        param.grad = param.grad / 2
    sgd(model).step()


@training_of("changed-between")
def changed_between(broken: bool, _: Any) -> None:
    """Gradients are scaled in place between two backward passes of one step."""
    model = perceptron()
    wdhook.attach(model, λ)
    backward(model)
    for param in model.parameters() if broken else ():
        assert param.grad is not None
        param.grad.mul_(0.5)
    backward(model)
    sgd(model).step()


@training_of("zeroed-or-changed")
def zeroed_or_changed(broken: bool, _: Any) -> None:
    """The same in a model with one decayed parameter."""
    model = nn.Linear(4, 2)
    wdhook.attach(model, λ)
    backward(model)
    if broken:
        assert model.weight.grad is not None
        model.weight.grad.mul_(0.5)
    backward(model)
    sgd(model).step()


@training_of("sums-without-graph")
def sums_without_graph(broken: bool, _: Any) -> None:
    """Two passes with create_graph=True of a loss that is linear in the weights, or is not."""
    model = nn.Linear(4, 2)
    wdhook.attach(model, λ)
    for batch in batches(perceptron(), 2):
        output = model(batch)
        loss = output.sum() if broken else output.square().sum()
        loss.backward(create_graph=True)
    sgd(model).step()


@training_of("sparse-then-dense")
def sparse_then_dense(broken: bool, _: Any) -> None:
    """An embedding is looked up, and then used as a matrix."""
    model = nn.Embedding(5, 3, sparse=True)
    wdhook.attach(model, λ, overrides={"*": True})
    model(torch.tensor([1, 2])).sum().backward()
    if broken:
        model.weight.square().sum().backward()
    else:
        model(torch.tensor([2, 3])).sum().backward()
    sgd(model).step()


@training_of("second-gradient")
def second_gradient(broken: bool, _: Any) -> None:
    """Decoupled decay in the backward, with gradient accumulation."""
    model = perceptron()
    optimizer = sgd(model)
    wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer)
    for _batch in range(2 if broken else 1):
        backward(model)
    optimizer.step()


@training_of("stepped-again")
def stepped_again(broken: bool, _: Any) -> None:
    """Two steps with one gradient."""
    model = perceptron()
    optimizer = sgd(model)
    wdhook.attach(model, λ, at="step")
    backward(model)
    optimizer.step()
    if not broken:
        optimizer.zero_grad()
        backward(model)
    optimizer.step()


@training_of("replayed-backward")
def replayed_backward(broken: bool, patch: pytest.MonkeyPatch) -> None:
    """Gradients change without a hook, on a device where a graph may have written them."""
    patch.setattr(steps, "may_be_replayed", lambda grad: True)
    model = perceptron()
    optimizer = sgd(model)
    wdhook.attach(model, λ)
    backward(model)
    optimizer.step()
    if broken:
        for param in model.parameters():
            assert param.grad is not None
            param.grad.mul_(1.0)
    else:
        optimizer.zero_grad()
        backward(model)
    optimizer.step()


@training_of("captured")
def captured(broken: bool, patch: pytest.MonkeyPatch) -> None:
    """λ is set after a step went into a CUDA graph: to another value, or to the same."""
    patch.setattr(steps, "is_capturing", lambda: True)
    model = perceptron()
    decay = wdhook.attach(model, λ, at="step")
    backward(model)
    sgd(model).step()
    decay.weight_decay = 2 * λ if broken else λ


@training_of("unannounced-steps")
def unannounced_steps(broken: bool, _: Any) -> None:
    """Decay at the step, and a loop that moves the parameters by hand."""
    model = perceptron()
    optimizer = sgd(model)
    wdhook.attach(model, λ, at="step")
    for _step in range(4):
        model.zero_grad()
        backward(model)
        if not broken:
            optimizer.step()
            continue
        with torch.no_grad():
            for param in model.parameters():
                assert param.grad is not None
                param.sub_(param.grad, alpha=LR)


@training_of("moved-in-the-pass")
def moved_in_the_pass(broken: bool, _: Any) -> None:
    """A hook of autograd's own nodes updates each parameter as its gradient comes."""
    model = perceptron()
    wdhook.attach(model, λ)

    def update(node: Any) -> None:
        with torch.no_grad():
            node.variable.sub_(node.variable.grad, alpha=LR)

    nodes = [param.expand_as(param).grad_fn.next_functions[0][0] for param in model.parameters()]
    for node in nodes if broken else ():
        node.register_hook(lambda *_, node=node: update(node))
    backward(model)


@training_of("schedule-waits")
def schedule_waits(broken: bool, _: Any) -> None:
    """1001 backward passes under a schedule, with a step in between or without."""
    model = nn.Linear(4, 2)
    optimizer = sgd(model)
    wdhook.attach(model, wdhook.schedules.linear(λ, 0.0, 100), optimizer=optimizer)
    x = torch.ones(1, 4)
    for count in range(1001):
        model(x).sum().backward()
        if count == 500 and not broken:
            optimizer.step()


# -- targets ---------------------------------------------------------------------------------------


@training_of("target-is-the-parameter")
def target_is_the_parameter(broken: bool, _: Any) -> None:
    """The state dict of the model itself is the target, or a copy of it."""
    model = perceptron()
    state = model.state_dict()
    source = state if broken else {name: p.clone() for name, p in state.items()}
    wdhook.attach(model, λ, toward=wdhook.Anchor(source))


@training_of("target-is-missing")
def target_is_missing(broken: bool, _: Any) -> None:
    """The pretrained model has another head; the selectors say what the head is drawn to."""
    model, source = perceptron(), perceptron().state_dict()
    source["5.weight"] = torch.zeros(7, 5)
    anchor = wdhook.Anchor(source)
    wdhook.attach(model, λ, toward=anchor if broken else {"*": anchor, "5.*": 0.0})


@training_of("adapter-goes-back-to-noise")
def adapter_goes_back_to_noise(broken: bool, _: Any) -> None:
    """Factors of LoRA are drawn to their first values, or to 0."""
    model = perceptron()
    model.lora_A = nn.Linear(4, 2, bias=False)
    toward: Any = "init" if broken else {"*": "init", "*lora_*": 0.0}
    wdhook.attach(model, λ, toward=toward)


@training_of("target-in-pieces")
def target_in_pieces(broken: bool, _: Any) -> None:
    """Megatron steps a float32 copy of each parameter, its `main_param`."""
    model = perceptron()
    wdhook.attach(model, λ, mode="decoupled", at="step", toward="init" if broken else 1.0)
    for p in model.parameters():
        p.main_grad = None  # type: ignore[attr-defined]
        p.main_param = p.detach().clone().requires_grad_()  # type: ignore[attr-defined]
    backward(model)
    for p in model.parameters():
        p.main_param.grad, p.grad = p.grad, None  # type: ignore[attr-defined]
    SGD([p.main_param for p in model.parameters()], lr=LR).step()  # type: ignore[attr-defined]


@training_of("target-of-a-resumed-run")
def target_of_a_resumed_run(broken: bool, _: Any) -> None:
    """A run goes on from a checkpoint without the state of the handle, or with it."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9)
    decay = wdhook.attach(model, λ, mode="decoupled", at="step", toward="init")
    backward(model)
    optimizer.step()
    state = decay.state_dict()
    decay.remove()
    resumed = wdhook.attach(model, λ, mode="decoupled", at="step", toward="init")
    if not broken:
        resumed.load_state_dict(state)
    optimizer.step()


@training_of("target-of-a-new-parameter")
def target_of_a_new_parameter(broken: bool, _: Any) -> None:
    """A head is replaced by one of another size in training."""
    model = perceptron()
    toward: Any = "init" if broken else {"*": "init", "5.*": 0.0}
    optimizer = sgd(model)
    wdhook.attach(model, λ, mode="decoupled", at="step", toward=toward)
    backward(model)
    optimizer.step()
    model[5] = nn.Linear(5, 3)
    optimizer.add_param_group({"params": list(model[5].parameters())})
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


# -- the tests -------------------------------------------------------------------------------------


def said_by(training: Callable[[], object]) -> list[tuple[str, type, Problem | None]]:
    """Every warning and error of wdhook in a training, by the id of its rule."""
    found: list[tuple[str, type, Problem | None]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", wdhook.WdhookWarning)
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph", UserWarning)
        try:
            training()
        except wdhook.WdhookError as error:
            found.append((error.rule, type(error), error.problem))
    others = [w for w in caught if not isinstance(w.message, wdhook.WdhookWarning)]
    assert not others
    ours = [w.message for w in caught if isinstance(w.message, wdhook.WdhookWarning)]
    return [(w.rule, type(w), w.problem) for w in ours] + found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_training_that_breaks_the_rule(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule speaks once, and alone, by its class; the problem is whole."""
    said = said_by(lambda: TRAININGS[rule.id](True, monkeypatch))
    assert [(id_, kind) for id_, kind, _ in said] == [(rule.id, rule.says)]
    problem = said[0][2]
    assert problem is not None
    assert problem.what.endswith((".", ")"))
    assert problem.fix
    facts = " ".join(map(str, problem.facts.values()))
    for name in problem.parameters[:1]:
        assert name in facts


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_training_beside_it_that_keeps_the_rule(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training with one difference: nothing is said."""
    assert said_by(lambda: TRAININGS[rule.id](False, monkeypatch)) == []


def test_every_rule_has_a_training() -> None:
    """A rule without a training fails here, and so does a training without a rule."""
    assert set(TRAININGS) == {rule.id for rule in RULES}
    assert max(Counter(rule.id for rule in RULES).values()) == 1


def test_every_rule_says_where_it_stands() -> None:
    """A row has the two columns of docs/limits.md, on one line each."""
    for rule in RULES:
        for text in (rule.situation, rule.answer):
            assert text
            assert "\n" not in text
            assert "|" not in text
