"""Training loops with decay written by hand, for every way in which an optimizer is driven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LR = 0.05
λ = 0.1
STEPS = 5

Group = dict[str, Any]


def mixed() -> nn.Module:
    """Matrices, which are decayed; biases and a LayerNorm, which are not."""
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def matrices() -> nn.Module:
    """For optimizers that take hidden matrices only, or the whole model."""
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))


def embeddings() -> nn.Module:
    """Sparse gradients."""
    return nn.Sequential(nn.Embedding(8, 3, sparse=True))


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are decayed."""
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]


def groups_of(model: nn.Module, weight_decay: float) -> list[Group]:
    """The weights, with a decay of the optimizer's own, and the rest, if there is one."""
    decayed = weights(model)
    rest = [p for p in model.parameters() if not any(p is w for w in decayed)]
    groups: list[Group] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def batches(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


# ------------------------------------------------------------------ by hand

BEFORE = ("decoupled", "corrected", "independent", "fixed")
AFTER = ("decoupled after", "fixed after")


class Hand:
    """Decay written by hand. A loop says when the gradients are there, and when the update comes.

    Modes: "coupled at backward", "coupled at step", "decoupled", and the formulas of optimizers:
    "decoupled after" the update, "corrected" (p·(1 − lr²/lr_max·λ)),
    "independent" (p·(1 − lr/lr_max·λ)), "fixed" (p·(1 − λ)), "fixed after". "none" does nothing,
    "probe" multiplies with `probe`.
    """

    def __init__(self, model: nn.Module, mode: str, lr: Callable[[Group], Any]) -> None:
        self.weights = weights(model)
        self.mode = mode
        self.lr = lr
        self.groups: list[Group] = []  # they tell the learning rate
        self.peak = LR
        self.evaluations = 0  # of the closure, in this step
        self.probe = 1.0
        self.before: Tensor | None = None  # what was probed

    def gradients(self) -> None:
        """After each backward pass."""
        if self.mode == "coupled at backward":
            self._add()

    def step(self, *_: object) -> None:
        """Just before the update; with a closure, at its end. (A step pre-hook can be this.)"""
        self.evaluations += 1
        if self.mode == "coupled at step":
            self._add()
        elif self.mode in (*BEFORE, "probe") and self.evaluations == 1:
            self._shrink()

    def stepped(self, *_: object) -> None:
        """After the update."""
        self.evaluations = 0
        if self.mode in AFTER:
            self._shrink()

    def of_one(self, p: Tensor) -> Hand:
        """For loops that step each parameter by itself."""
        one = Hand(nn.Module(), self.mode, self.lr)
        one.weights, one.groups = [w for w in self.weights if w is p], self.groups
        return one

    @torch.no_grad()
    def _add(self) -> None:
        for p in self.weights:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = (p.grad.to_dense() + p * λ).to_sparse(1)
            elif p.grad is not None:
                p.grad.add_(p, alpha=λ)

    @torch.no_grad()
    def _shrink(self) -> None:
        if self.mode == "probe" and self.weights:
            self.before = torch.cat([p.flatten() for p in self.weights])
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None and any(p is w for w in self.weights):
                    p.mul_(self._factor(group))

    def _factor(self, group: Group) -> Any:
        if self.mode == "probe":
            return self.probe
        if "fixed" in self.mode:
            return 1 - λ
        lr = self.lr(group)
        if self.mode == "corrected":
            return 1 - lr * (lr / self.peak) * λ
        return 1 - (lr / self.peak if self.mode == "independent" else lr) * λ


# ------------------------------------------------------------------ loops

Loop = Callable[[nn.Module, Any, Tensor, Hand], None]


def plain(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand, **backward: Any) -> None:
    """Zero, backward, step."""
    optimizer.zero_grad()
    loss_of(model, batch).backward(**backward)
    step(optimizer, hand)


def step(optimizer: Any, hand: Hand) -> None:
    hand.gradients()
    hand.step()
    optimizer.step()
    hand.stepped()


def graph(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """For estimates of the Hessian."""
    plain(model, optimizer, batch, hand, create_graph=True)
    for p in model.parameters():
        p.grad = None  # breaks the cycle that create_graph makes


def sparse(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """Every row has a gradient, so that decay by hand can be written for the whole matrix."""
    optimizer.zero_grad()
    (model(torch.arange(8)) * batch[:, :3]).square().mean().backward()
    step(optimizer, hand)


def evaluation(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> Callable[[], Tensor]:
    """A closure: zero, forward, backward."""

    def evaluate() -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
        hand.gradients()
        return loss

    return evaluate


def closure(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """The optimizer evaluates the loss, once or several times."""
    evaluate = evaluation(model, optimizer, batch, hand)

    def evaluate_and_decay() -> Tensor:
        loss = evaluate()
        hand.step()
        return loss

    optimizer.step(closure=evaluate_and_decay)
    hand.stepped()


def gradients_first(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """A closure, and gradients before it."""
    evaluation(model, optimizer, batch, hand)()
    closure(model, optimizer, batch, hand)


def two_passes(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """SAM: gradients, then a step whose closure makes those at the perturbed weights."""
    evaluate = evaluation(model, optimizer, batch, hand)
    evaluate()
    optimizer.step(evaluate)


def one_pass(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """SAM, whose closure makes all gradients."""
    optimizer.step(evaluation(model, optimizer, batch, hand))


def trained(loop: Loop = plain) -> Loop:
    """ScheduleFree has a mode."""

    def play(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
        optimizer.train()
        loop(model, optimizer, batch, hand)

    return play


def around(name: str, loop: Loop = plain) -> Loop:
    """A wrapper: the step that counts is that of the optimizer that it holds as `name`."""

    def play(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
        inside = getattr(optimizer, name)
        hand.groups = inside.param_groups
        outside = Hand(model, "none", hand.lr)
        outside.gradients = hand.gradients  # type: ignore[method-assign]
        hooks = (
            inside.register_step_pre_hook(hand.step),
            inside.register_step_post_hook(hand.stepped),
        )
        try:
            loop(model, optimizer, batch, outside)
        finally:
            for hook in hooks:
                hook.remove()

    return play


def fused(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """LOMO: updates in the backward pass. By hand, the decay is in an earlier hook."""

    def decay(p: Tensor) -> None:
        one = hand.of_one(p)
        one.gradients()
        one.step()

    ours = [
        w.register_post_accumulate_grad_hook(decay) for w in hand.weights if hand.mode != "none"
    ]
    for w in hand.weights if ours else ():
        hooks: Any = w._post_accumulate_grad_hooks
        for key, theirs in list(hooks.items())[
            :-1
        ]:  # autograd walks the dict in the order of insertion
            del hooks[key]
            hooks[key] = theirs
    optimizer.fused_backward(loss_of(model, batch), optimizer.param_groups[0]["lr"])
    for hook in ours:
        hook.remove()


def layer_wise(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """The Trainer of transformers: an optimizer a parameter, in hooks, and a dummy to step."""

    def update(p: Tensor) -> None:
        one = hand.of_one(p)
        step(optimizer.optimizer_dict[p], one)
        optimizer.optimizer_dict[p].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
    loss_of(model, batch).backward()
    optimizer.step()
    for hook in hooks:
        hook.remove()
