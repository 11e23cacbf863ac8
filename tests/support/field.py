"""Plays one training loop twice, with wdhook and with the decay by hand, and compares each step.

A loop is a generator function of one argument, `decay`. The loop calls ``decay.attach(model, ...)``
where a user would call ``wdhook.attach``, and ``decay.now()`` at the point where the decay belongs;
with wdhook ``now`` does nothing. The loop yields the model once after attaching, and then after
each finished step.

Numbers are dyadic (λ = 1/8, lr = 1/2, weights in quarters) and most losses are linear, so sums and
products of a few steps are exact in float32. In any order of the operations the right result is
right to the last bit.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wdhook

RIGHT = "right"  # nothing else: the right answer can be known
RIGHT_OR_REFUSED = "right, or refused"  # or a WdhookError before anything was changed
RIGHT_OR_TOLD = "right, or told"  # or a true WdhookWarning: no program could know the right answer

DECAY = 1 / 8  # λ
LR = 1 / 2
MODES = ("coupled", "decoupled", "independent")
MOMENTS = ("backward", "step")
AGAIN = ("not decayed again",)  # not true where a gradient holds the decay of several micro-batches

everywhere = pytest.mark.parametrize(("mode", "at"), [(m, a) for m in MODES for a in MOMENTS])
all_modes = pytest.mark.parametrize("mode", MODES)
both_moments = pytest.mark.parametrize("at", MOMENTS)


class PlannedError(Exception):
    """Stands for an interrupt, or a batch that is too large for memory; the loop goes on."""


class Brittle(torch.autograd.Function):
    """The identity; its backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise PlannedError


# Models ----------------------------------------------------------------------------------------


def dyadic(model: nn.Module) -> Any:
    """Fill all parameters with quarters from 1/4 to 7/4."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(((torch.arange(p.numel()) % 7 + 1) / 4).view_as(p))
    return model


def chain(*layers: nn.Module) -> nn.Sequential:
    """A Sequential with dyadic parameters."""
    model: nn.Sequential = dyadic(nn.Sequential(*layers))
    return model


def lines(count: int) -> nn.Sequential:
    """`count` decayed weights of 2×2, and nothing else."""
    return chain(*(nn.Linear(2, 2, bias=False) for _ in range(count)))


def pull(model: nn.Module, size: float = 0.25) -> Any:
    """A loss that is linear in every trainable parameter: each element gets the gradient `size`."""
    return sum((p * size).sum() for p in model.parameters() if p.requires_grad)


def sgd(params: Any, lr: float = LR, **more: Any) -> torch.optim.SGD:
    """SGD with a dyadic learning rate."""
    return torch.optim.SGD(params, lr=lr, **more)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Wrapper(torch.optim.Optimizer):
    """As Lookahead and others: an optimizer that holds another one, and lets it step."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside
        super().__init__(inside.param_groups, {})
        self.param_groups = inside.param_groups

    def step(self, closure: Any = None) -> Any:
        """Let the inner optimizer step."""
        return self.inside.step(closure)


# The two decays --------------------------------------------------------------------------------


class Ours:
    """The decay of wdhook."""

    by_hand = False

    def __init__(self) -> None:
        self.handles: list[wdhook.WeightDecay] = []
        self.shrinks = 1.0  # factor of the decay that a backward pass may have made before an error
        self.weights: Any = None

    @property
    def handle(self) -> Any:
        """The newest handle."""
        return self.handles[-1]

    def attach(
        self, model: nn.Module, weight_decay: Any = DECAY, *, optimizer: Any = None, **more: Any
    ) -> None:
        """Call ``wdhook.attach``; `given` is False where it is not told of the optimizer."""
        more.pop("weights", None)
        given = more.pop("given", True)
        mode, at = more.get("mode", "coupled"), more.get("at", "backward")
        if mode != "coupled" and at == "backward":
            λ = weight_decay(0) if callable(weight_decay) else weight_decay
            self.shrinks = 1 - λ * (LR if mode == "decoupled" else 1)
        optimizer = optimizer if given else None
        more["mode"] = mode
        self.handles.append(wdhook.attach(model, weight_decay, optimizer=optimizer, **more))

    def now(self, lr: float = LR, **more: Any) -> None:
        """Nothing: wdhook does it."""


class ByHand:
    """The same decay in plain torch: once at `now`, for each weight that has a gradient."""

    by_hand = True
    handle: Any = None

    def attach(
        self,
        model: nn.Module,
        weight_decay: Any = DECAY,
        *,
        weights: Iterable[Tensor] | None = None,
        **more: Any,
    ) -> None:
        """Note what is decayed: matrices, or `weights`."""
        self.mode = more.get("mode", "coupled")
        self.weight_decay = weight_decay
        matrices = [p for p in model.parameters() if p.ndim > 1]
        self.weights = matrices if weights is None else list(weights)

    def now(
        self,
        lr: float = LR,
        *,
        peak: float | None = None,
        weight_decay: float | None = None,
        only: Iterable[Tensor] | None = None,
        sign: int = 1,
        in_place: bool = True,
    ) -> None:
        """Decay each weight that has a gradient."""
        λ = self.weight_decay if weight_decay is None else weight_decay
        factor = λ * (lr if self.mode == "decoupled" else lr / (peak or lr))
        with torch.no_grad():
            for p in self.weights if only is None else only:
                if p.grad is None:
                    continue
                if self.mode != "coupled":
                    p.mul_(1 - factor)
                elif in_place:
                    p.grad.add_(p, alpha=sign * λ)
                else:
                    p.grad = p.grad.add(p, alpha=sign * λ)


def train_step(decay: Any, model: nn.Module, optimizer: Any, **how: Any) -> None:
    """One plain iteration of a loop; `how` is for the decay by hand."""
    optimizer.zero_grad()
    pull(model).backward()
    decay.now(**how)
    optimizer.step()


# The comparison --------------------------------------------------------------------------------

Loop = Callable[[Any], Iterator[nn.Module]]


def check(
    loop: Loop,
    accept: str = RIGHT,
    *,
    untrue: tuple[str, ...] = (),
    tolerance: float = 0.0,
    moved: bool = False,
) -> None:
    """Raise unless `loop` is right with wdhook, or what `accept` allows in place of that.

    Args:
        loop: see the top of this file.
        accept: RIGHT, RIGHT_OR_REFUSED or RIGHT_OR_TOLD.
        untrue: regular expressions of sentences that are false in this situation, or of another
            matter. A message with one of them does not count.
        tolerance: relative and absolute; 0 compares bits.
        moved: the loop itself moves parameters between two yields, so their values at an error
            prove nothing.
    """
    torch.manual_seed(0)
    want = [values(model) for model in loop(ByHand())]
    torch.manual_seed(0)
    ours = Ours()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrong, refusal, last = _play(loop, ours, want, tolerance)
        finally:
            for handle in ours.handles:
                handle.remove()
    said = [str(w.message) for w in caught if issubclass(w.category, wdhook.WdhookWarning)]
    said += [] if refusal is None else [str(refusal)]
    true = [text for text in said if not any(re.search(lie, text) for lie in untrue)]
    if refusal is None and not wrong:
        return
    heard = f"; said: {said or 'nothing'}"
    if accept == RIGHT_OR_TOLD:
        assert true, f"{wrong}, and nothing true was said{heard}"
        return
    assert not wrong, f"{wrong}{heard}"
    assert accept == RIGHT_OR_REFUSED, f"refused, though the right answer can be known{heard}"
    assert true, f"the refusal says what is not so{heard}"
    if not moved and last is not None:
        _assert_unchanged(values(last[0]), last[1], ours.shrinks)


Last = tuple[nn.Module, dict[str, Tensor]]
"""The model of the last yield, and the values that its parameters were to have then."""


def _play(
    loop: Loop, ours: Ours, want: list[dict[str, Tensor]], tolerance: float
) -> tuple[str, wdhook.WdhookError | None, Last | None]:
    """The first difference ('' for none), the refusal if there was one, and the last yield."""
    wrong, last = "", None
    try:
        for step, model in enumerate(loop(ours)):
            last = model, want[step]
            found = differences(values(model), want[step], tolerance)
            if found and not wrong:
                wrong = f"wrong after step {step}: {'; '.join(found)}"
    except wdhook.WdhookError as error:
        return wrong, error, last
    return wrong, None, last


def differences(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 0.0
) -> list[str]:
    """A line for each parameter whose values differ."""
    found = []
    for (name, a), b in zip(got.items(), want.values(), strict=True):
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
            found.append(f"{name}: largest difference {(a - b).abs().max().item():g}")
    return found


def _assert_unchanged(now: dict[str, Tensor], then: dict[str, Tensor], shrinks: float) -> None:
    """Raise unless parameters are as before the step, or as the backward pass decayed them."""
    for (name, value), before in zip(now.items(), then.values(), strict=True):
        same = torch.equal(value, before) or torch.equal(value, before * shrinks)
        assert same, f"{name} was changed before the error"
