"""Training loops that are not `backward(); step()`: each against a reference without wdhook."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twins import (
    LR,
    assert_bit_equal,
    assert_close,
    batches,
    loss_of,
    own_groups,
    perceptron,
    train,
    twins,
    weights,
    zero,
    λ,
)

import wdhook

SGD = torch.optim.SGD


def test_a_gan_with_two_optimizers() -> None:
    """Each optimizer's step ends the windows of its own parameters only; both moments, both orders
    of zeroing."""
    for at in ("backward", "step"):
        (g, d), (g2, d2) = [(perceptron(seed=1), perceptron(seed=2)) for _ in range(2)]
        for module in (d, d2):
            module[0] = nn.Linear(2, 5)
            torch.manual_seed(0)
            nn.init.normal_(module[0].weight)
            nn.init.normal_(module[0].bias)

        def play(
            g: nn.Module, d: nn.Module, og: torch.optim.Optimizer, od: torch.optim.Optimizer
        ) -> None:
            for z in batches(g, 6):
                for _ in range(2):  # the critic steps twice, and leaves gradients on the generator
                    od.zero_grad()
                    d(g(z)).square().mean().backward()
                    od.step()
                og.zero_grad()
                (d(g(z)) - 1).square().mean().backward()
                og.step()

        handle = wdhook.attach(nn.ModuleList([g, d]), λ, at=at)  # the container dies at once
        play(g, d, SGD(g.parameters(), lr=LR), SGD(d.parameters(), lr=LR))
        handle.remove()
        play(g2, d2, SGD(own_groups(g2), lr=LR), SGD(own_groups(d2), lr=LR))
        assert_bit_equal(g.state_dict(), g2.state_dict())
        assert_bit_equal(d.state_dict(), d2.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
@pytest.mark.parametrize("to_none", [True, False])
def test_lbfgs_sees_the_penalised_gradient_in_each_evaluation(at: str, to_none: bool) -> None:
    """LBFGS calls its closure many times a step; each gradient holds λ·p of the point where it was
    taken."""
    model, twin = twins(perceptron(torch.float64))
    batch = batches(model, 1)[0]

    def fit(m: nn.Module, penalty: Callable[[], Any]) -> None:
        optimizer = torch.optim.LBFGS(m.parameters(), max_iter=5, history_size=5)

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=to_none)
            loss = loss_of(m, batch)
            (loss + penalty()).backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)

    with wdhook.attach(model, λ, at=at):
        fit(model, lambda: 0.0)
    fit(twin, lambda: wdhook.l2_penalty(twin, λ))
    # 15 evaluations in float64; LBFGS divides by curvatures of about 1e-3, which enlarges rounding
    # errors.
    assert_close(model.state_dict(), twin.state_dict(), 1e-8)
    with pytest.raises(AssertionError):
        assert_close(model.state_dict(), perceptron(torch.float64).state_dict(), 1e-8)


def test_decoupled_lbfgs_shrinks_once_per_step() -> None:
    """However often the closure runs, decoupled decay multiplies once, after its first run."""
    model = nn.Linear(3, 1, bias=False)
    runs: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        runs.append(model.weight.detach().clone())
        loss = model(torch.ones(1, 3)).square().sum() * 0
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.5, tolerance_grad=-1, tolerance_change=-1, max_iter=4
    )
    before = model.weight.detach().clone()
    with wdhook.attach(model, 0.1, mode="decoupled", at="step"):
        optimizer.step(closure)
    assert len(runs) > 1
    assert torch.equal(runs[0], before)
    assert torch.equal(model.weight, before * (1 - 0.5 * 0.1))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) as usually written: two passes, an
    optimizer inside."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


@pytest.mark.parametrize("by_closure", [True, False])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_sam_at_step_equals_the_decay_of_its_base_optimizer(mode: str, by_closure: bool) -> None:
    """The optimizer inside takes the real step: there the decay happens, on the restored
    parameters."""
    kind = SGD if mode == "coupled" else torch.optim.AdamW

    def play(m: nn.Module, optimizer: SAM) -> None:
        for batch in batches(m, 5):
            loss_of(m, batch).backward()
            if by_closure:
                optimizer.step(lambda m=m, batch=batch: loss_of(m, batch).backward())
            else:
                optimizer.first_step()
                loss_of(m, batch).backward()
                optimizer.second_step()

    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, mode=mode, at="step"):
        play(
            model, SAM(own_groups(model, 0.0), kind, lr=LR)
        )  # in one order: SAM sums over all gradients
    play(twin, SAM(own_groups(twin), kind, lr=LR))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_sam_at_backward_equals_a_penalty_in_both_losses() -> None:
    """Each of the two passes has a gradient of its own, and each holds the decay once."""
    model, twin = twins(perceptron(torch.float64))

    def play(m: nn.Module, penalty: Callable[[], Any]) -> None:
        optimizer = SAM(m.parameters(), SGD, lr=LR, weight_decay=0)
        for batch in batches(m, 5):
            (loss_of(m, batch) + penalty()).backward()
            optimizer.first_step()
            (loss_of(m, batch) + penalty()).backward()
            optimizer.second_step()

    with wdhook.attach(model, λ):
        play(model, lambda: 0.0)
    play(twin, lambda: wdhook.l2_penalty(twin, λ))
    assert_close(model.state_dict(), twin.state_dict(), 1e-12)  # 10 gradients below 10, in float64


class Centralised(SGD):
    """A subclass that changes its gradients and calls the step of its base: two steps to the hooks
    of torch."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.ndim > 1:
                    p.grad.sub_(p.grad.mean(dim=1, keepdim=True))
        return super().step(closure)


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_step_within_a_step_decays_once(at: str) -> None:
    """`super().step()` runs inside the step of a subclass; the decay comes before both, once."""
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ, at=at):
        train(model, Centralised(model.parameters(), lr=LR), batches(model, 5))
    reference = Centralised(twin.parameters(), lr=LR)
    for batch in batches(twin, 5):
        zero(twin, to_none=True)
        loss_of(twin, batch).backward()
        for weight in weights(twin):
            weight.grad.add_(weight.detach(), alpha=λ)
        reference.step()
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_gradient_that_is_stepped_twice(at: str, clip: bool) -> None:
    """Two steps on one gradient (two optimizers, say) read the decay that is in it: once, not
    twice."""
    model, twin = twins(perceptron())

    def play(m: nn.Module, penalised: bool) -> None:
        one, two = SGD(m.parameters(), lr=LR), torch.optim.Adam(m.parameters(), lr=0.01)
        for batch in batches(m, 4):
            zero(m, to_none=True)
            loss_of(m, batch).backward()
            for weight in weights(m) if penalised and not clipped_first else ():
                weight.grad.add_(weight.detach(), alpha=λ)
            if clip:
                nn.utils.clip_grad_norm_(m.parameters(), 0.05)
            for weight in weights(m) if penalised and clipped_first else ():
                weight.grad.add_(weight.detach(), alpha=λ)
            one.step()
            two.step()
            one.step()

    clipped_first = at == "step"
    with (
        wdhook.attach(model, λ, at=at),
        pytest.warns(wdhook.WdhookWarning, match="stepped again"),
    ):
        play(model, penalised=False)
    play(twin, penalised=True)
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_a_step_that_raised_does_not_cost_the_next_its_decay() -> None:
    """After an exception in a step the next gradients are decayed; the same gradients, tried
    again, are not twice."""

    class Fragile(SGD):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("out of memory, say")
            return super().step(closure)

    for retry in (True, False):
        model, twin = twins(perceptron())
        optimizer = Fragile(model.parameters(), lr=LR)
        reference = SGD(own_groups(twin), lr=LR)
        with wdhook.attach(model, λ, at="step"):
            for i, batch in enumerate(batches(model, 4)):
                zero(model, to_none=True)
                loss_of(model, batch).backward()
                optimizer.broken = i == 1
                if optimizer.broken:
                    with pytest.raises(RuntimeError, match="out of memory"):
                        optimizer.step()
                    optimizer.broken = False
                    if not retry:
                        continue
                optimizer.step()
        for i, batch in enumerate(batches(twin, 4)):
            zero(twin, to_none=True)
            loss_of(twin, batch).backward()
            if i != 1 or retry:
                reference.step()
        assert_bit_equal(model.state_dict(), twin.state_dict())


def test_a_retained_graph_accumulates_one_decay() -> None:
    """Two backward passes through one graph are two micro-batches."""
    model = perceptron(torch.float64)
    batch = batches(model, 1)[0]
    expected = torch.autograd.grad(
        2 * loss_of(model, batch) + wdhook.l2_penalty(model, λ), weights(model)
    )
    with wdhook.attach(model, λ):
        loss = loss_of(model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
    for weight, grad in zip(weights(model), expected, strict=True):
        assert (
            weight.grad - grad
        ).abs().max() < 1e-14  # one sum of three terms below 10, another order


def test_a_retained_graph_with_decoupled_decay_is_an_error_of_autograd() -> None:
    """The hook changes parameters that the graph still needs: autograd sees it, since we never use
    `.data`."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with wdhook.attach(model, λ, mode="decoupled", lr=LR):
        loss = model(torch.ones(1, 3)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_create_graph_once_and_accumulated(mode: str) -> None:
    """Under create_graph=True gradients are made out of place; the decay is in them once all the
    same."""
    model, twin = twins(perceptron(torch.float64))
    first, second = batches(model, 2)
    arguments = {"lr": LR} if mode == "decoupled" else {}
    with wdhook.attach(model, λ, mode=mode, **arguments), warnings.catch_warnings():
        warnings.simplefilter("ignore", wdhook.WdhookWarning)  # decoupled: the second micro-batch
        loss_of(model, first).backward(create_graph=True)
        graphs = [p.grad.requires_grad for p in weights(model)]
        if mode == "coupled":
            loss_of(model, second).backward(create_graph=True)
    assert all(graphs)
    if mode == "decoupled":
        for weight, other in zip(weights(model), weights(twin), strict=True):
            assert torch.equal(weight, other * (1 - LR * λ))
    else:
        total = loss_of(twin, first) + loss_of(twin, second) + wdhook.l2_penalty(twin, λ)
        for weight, grad in zip(
            weights(model), torch.autograd.grad(total, weights(twin)), strict=True
        ):
            assert (weight.grad - grad).abs().max() < 1e-14  # a sum of three terms below 10
    model.zero_grad()  # break the cycle that create_graph makes


def test_autograd_grad_leaves_everything_alone() -> None:
    """`torch.autograd.grad` accumulates nothing, so no hook runs and no window opens."""
    model, twin = twins(perceptron())
    with wdhook.attach(model, λ):
        for batch in batches(model, 2):
            got = torch.autograd.grad(loss_of(model, batch), weights(model))
            expected = torch.autograd.grad(loss_of(twin, batch), weights(twin))
            assert all(map(torch.equal, got, expected))
        assert all(p.grad is None for p in model.parameters())


# torch 2.4 warns of its own checkpointing.
OLD_CHECKPOINT = pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for _ in range(3):
            if self.reentrant is None:
                x = self.shared(x).tanh()
            else:
                x = checkpoint(lambda y: self.shared(y).tanh(), x, use_reentrant=self.reentrant)
        return self.last(x)


@OLD_CHECKPOINT
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("at", ["backward", "step"])
def test_activation_checkpointing_with_a_shared_layer(
    reentrant: bool, to_none: bool, at: str
) -> None:
    """Reentrant checkpointing calls the hook of a shared parameter once per segment; it is decayed
    once."""
    model, twin = twins(Checkpointed(reentrant).double())
    with wdhook.attach(model, λ, at=at):
        train(model, SGD(model.parameters(), lr=LR), batches(model, 6), micro=2, to_none=to_none)
    twin.reentrant = None
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 6), micro=2, to_none=to_none)
    assert_close(
        model.state_dict(), twin.state_dict(), 1e-13
    )  # other orders of a few sums in float64


@OLD_CHECKPOINT
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_skipped_step_with_checkpointing(reentrant: bool) -> None:
    """Zeroed in place without a step, in loops whose hooks run several times per backward."""
    model, twin = twins(Checkpointed(reentrant).double())
    optimizer, reference = SGD(model.parameters(), lr=LR), SGD(own_groups(twin), lr=LR)
    with wdhook.attach(model, λ):
        for m, o in ((model, optimizer), (twin, reference)):
            for i, batch in enumerate(batches(m, 6)):
                loss_of(m, batch).backward()
                if i % 2:
                    o.step()
                zero(m, to_none=False)
    assert_close(model.state_dict(), twin.state_dict(), 1e-13)


@pytest.mark.parametrize("at", ["backward", "step"])
def test_frozen_then_trained(at: str) -> None:
    """Parameters unfrozen after `attach` are decayed from their first step on; frozen ones are
    left alone."""
    model, twin = twins(perceptron())

    def play(m: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        m[3].requires_grad_(False)
        for i, batch in enumerate(batches(m, 6)):
            if i == 3:
                m[3].requires_grad_(True)
            zero(m, to_none=True)
            loss_of(m, batch).backward()
            optimizer.step()

    model[3].requires_grad_(False)
    with wdhook.attach(model, λ, at=at):
        play(model, SGD(model.parameters(), lr=LR))
    play(twin, SGD(own_groups(twin), lr=LR))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_replaced_and_added_parameters(at: str) -> None:
    """What `load_state_dict(assign=True)` put in place, and a head added later, is found at the
    step."""
    model, twin = twins(perceptron())
    handle = wdhook.attach(model, λ, at=at)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for m in (model, twin):
        torch.manual_seed(3)
        m.append(nn.Linear(2, 2))
    train(model, SGD(model.parameters(), lr=LR), batches(model, 5))
    assert handle.plan["6.weight"].weight_decay == λ
    assert handle.plan["6.bias"].weight_decay == 0
    handle.remove()
    train(twin, SGD(own_groups(twin), lr=LR), batches(twin, 5))
    assert_bit_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_model_that_changed_needs_no_match_for_its_overrides(at: str) -> None:
    """A selector that matched when attached, and matches nothing in the changed model, is no error
    at the step."""
    model = perceptron()
    with wdhook.attach(model, λ, at=at, overrides={"5.*": 0.0}) as handle:
        model[5] = nn.ModuleDict({"head": nn.Linear(5, 2)})
        model[5].forward = lambda x: model[5]["head"](x)
        train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
        assert handle.plan["5.head.weight"].weight_decay == 0.0
        model[5] = nn.Identity()
        model.append(nn.Linear(5, 2))
        train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
        assert handle.plan["6.weight"].weight_decay == λ


@pytest.mark.parametrize("at", ["backward", "step"])
def test_an_exemption_survives_a_parametrization(at: str) -> None:
    """A weight that was exempt, or has an absolute λ, keeps that when a parametrization renames
    it."""
    model = perceptron()
    with wdhook.attach(model, λ, at=at, overrides={"0.weight": 0.0, "3.weight": 0.25}) as handle:
        for layer in (0, 3, 5):
            nn.utils.parametrizations.weight_norm(model[layer])
        train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
        λs = {n: d.weight_decay for n, d in handle.plan.items() if "original" in n}
    assert λs == {
        f"{layer}.parametrizations.weight.original{i}": value if i else 0.0
        for layer, value in ((0, 0.0), (3, 0.25), (5, λ))
        for i in (0, 1)
    }


@pytest.mark.parametrize("at", ["backward", "step"])
def test_gradients_assigned_by_hand(at: str) -> None:
    """A gradient that no backward pass made is decayed at the step."""
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=LR)
    before = model.weight.detach().clone()
    with wdhook.attach(model, λ, at=at):
        model.weight.grad = torch.ones(2, 3)
        model.bias.grad = torch.ones(2)
        optimizer.step()
    expected = nn.Parameter(before)
    expected.grad = torch.ones(2, 3)
    SGD([expected], lr=LR, weight_decay=λ).step()
    assert torch.equal(model.weight, expected)


def test_a_gradient_replaced_after_its_decay_is_taken_as_derived() -> None:
    """`p.grad = f(p.grad)` keeps the decay that is in it, and a warning says what was assumed."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    with wdhook.attach(model, λ):
        model(torch.zeros(1, 3)).sum().backward()
        model.weight.grad = model.weight.grad * 0.5
        with pytest.warns(wdhook.WdhookWarning, match="replaced"):
            optimizer.step()
    assert torch.equal(model.weight, before - λ * before * 0.5)


def test_decoupled_in_the_backward_warns_of_accumulation_once() -> None:
    """The second micro-batch sees changed parameters: decayed once, and a warning names
    at="step"."""
    model = perceptron()
    before = [w.detach().clone() for w in weights(model)]
    first, second, third = batches(model, 3)
    with wdhook.attach(model, λ, mode="decoupled", lr=LR):
        loss_of(model, first).backward()
        with pytest.warns(wdhook.WdhookWarning, match='at="step"'):
            loss_of(model, second).backward()
        loss_of(model, third).backward()
    assert all(
        torch.equal(w, b * (1 - LR * λ)) for w, b in zip(weights(model), before, strict=True)
    )


def test_independent_decay_follows_the_schedule_but_not_the_base_lr() -> None:
    """p ← p·(1 − (lr/lr_peak)·λ): two base learning rates, one shrinkage."""
    for at in ("backward", "step"):
        shrunk = []
        for base in (0.1, 0.01):
            weight = nn.Linear(2, 1, bias=False)
            nn.init.ones_(weight.weight)
            optimizer = SGD(weight.parameters(), lr=base)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda t: [0.5, 1.0, 0.25][min(t, 2)]
            )
            with wdhook.attach(weight, 0.1, mode="independent", at=at, optimizer=optimizer):
                for _ in range(3):
                    optimizer.zero_grad()
                    (weight(torch.ones(1, 2)) * 0).sum().backward()
                    optimizer.step()
                    schedule.step()
            shrunk.append(weight.weight.detach().clone())
        expected = (1 - 0.5 * 0.1) * (1 - 0.1) * (1 - 0.25 * 0.1)
        for result in shrunk:
            # Three float32 products, and a ratio of learning rates rounded in float64.
            assert torch.allclose(result, torch.full((1, 2), expected), rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("moment", ["backward", "step"])
def test_a_scheduled_lr_is_read_when_it_is_applied(moment: str) -> None:
    """Schedulers, and an optimizer checkpoint that replaces the param groups, just work."""
    model, twin = twins(perceptron())

    def play(m: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for i, batch in enumerate(batches(m, 6)):
            if i == 3:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            loss_of(m, batch).backward()
            optimizer.step()
            schedule.step()

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    with wdhook.attach(model, λ, mode="decoupled", at=moment, optimizer=optimizer):
        play(model, optimizer)
    play(twin, torch.optim.AdamW(own_groups(twin), lr=LR))
    assert_bit_equal(model.state_dict(), twin.state_dict())


def test_two_optimizers_that_take_turns_on_the_same_parameters() -> None:
    """Adam for some steps, then SGD: whoever steps ends the window."""
    model, twin = twins(perceptron())

    def play(m: nn.Module, one: torch.optim.Optimizer, two: torch.optim.Optimizer) -> None:
        for i, batch in enumerate(batches(m, 8)):
            zero(m, to_none=True)
            loss_of(m, batch).backward()
            (one if i % 3 else two).step()

    with wdhook.attach(model, λ):
        play(model, SGD(model.parameters(), lr=LR), torch.optim.Adam(model.parameters(), lr=0.01))
    play(twin, SGD(own_groups(twin), lr=LR), torch.optim.Adam(own_groups(twin), lr=0.01))
    assert_bit_equal(model.state_dict(), twin.state_dict())
