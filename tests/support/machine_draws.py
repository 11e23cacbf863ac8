"""Draws a run of `test_machine`: a model of two parts, its optimizers, and the way to attach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop


class PlannedError(Exception):
    """What the machine raises inside a backward pass or a step."""


def stop(*_: object) -> None:
    raise PlannedError


class Signs(Optimizer):
    """A third-party optimizer: updates through `.data`, unseen by version counters, no decay."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.detach().tanh(), alpha=-group["lr"])


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "SGD one by one": (SGD, {"momentum": 0.9, "foreach": False}),
    "SGD fused": (SGD, {"fused": True}),
    "SGD maximize": (SGD, {"maximize": True}),
    "Nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {"foreach": True}),
    "Adam fused": (Adam, {"fused": True}),
    "AdamW": (AdamW, {"weight_decay": 0.0}),
    "AdamW fused": (AdamW, {"weight_decay": 0.0, "fused": True}),
    "AdamW maximize": (AdamW, {"weight_decay": 0.0, "maximize": True, "foreach": True}),
    "RMSprop": (RMSprop, {"momentum": 0.9}),
    "Signs": (Signs, {}),
}
DECAY_THEMSELVES = {("coupled", SGD), ("coupled", Adam), ("coupled", RMSprop), ("decoupled", AdamW)}


class Around(nn.Module):
    """A convolution, a table or attention around four features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.Conv1d):
            return x + self.inner(x.unsqueeze(1)).mean(1)
        if isinstance(self.inner, nn.Embedding):
            return x + self.inner((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())
        return x + self.inner(x, x, x)[0]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tie()

    def tie(self) -> None:
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)),
    "conv": lambda: Around(nn.Conv1d(1, 2, 3, padding=1)),
    "table": lambda: Around(nn.Embedding(6, 4)),
    "attention": lambda: Around(nn.MultiheadAttention(4, 2)),
    "tied": Tied,
}


class Net(nn.Module):
    """Two parts, and a matrix at the root which belongs to the first."""

    def __init__(self, one: tuple[str, ...], two: tuple[str, ...]) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.one = nn.Sequential(*(BLOCKS[kind]() for kind in one))
        self.two = nn.Sequential(*(BLOCKS[kind]() for kind in two))

    def forward(self, x: Tensor, reach: str, breaks: bool) -> Tensor:
        between = self.one(x @ self.mix)
        if breaks and between.requires_grad:
            between.register_hook(stop)
        if reach == "one":
            return between
        return self.two(between if reach == "both" else between.detach())


@dataclass(frozen=True)
class Config:
    """What one run of the machine is about."""

    seed: int
    one: tuple[str, ...]
    two: tuple[str, ...]
    double: bool
    mode: str
    at: str
    λ: tuple[float, ...]  # of each handle: of the whole model, or one for each of its parts
    own: tuple[float | bool | None, ...]  # overrides of the parameters, in turn
    optimizers: tuple[str, ...]  # one, or one for each part
    shared: bool  # two optimizers, each with all parameters
    given: bool  # to `attach`
    lr: float | str | None  # to `attach`: a number, or "half" of what the param group says
    scale: float | None  # of a GradScaler; 0 for a disabled one
    foreach: bool | None
    frozen: str  # the part that is frozen when `attach` is called
    scheduled: bool  # λ is a function of the step

    def build(self) -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = Net(self.one, self.two).to(torch.float64 if self.double else torch.float32)
        for p in net.parameters():
            if not p.any():
                nn.init.constant_(p, 0.1)  # a decay of zeros is no witness, as test_events shows
        if self.frozen:
            net.get_submodule(self.frozen).requires_grad_(False)
        return net


def sensible(config: Config) -> Config:
    """The nearest configuration that means something."""
    in_backward = config.mode != "coupled" and config.at == "backward"
    # One scaler un-scales a gradient once; and before a step the learning rate that decay in the
    # backward has to read is unknown.
    shared = config.shared and len(config.optimizers) == 2 and not (in_backward or config.scale)
    optimizers = (
        tuple(k.replace(" maximize", "") for k in config.optimizers)
        if shared
        else config.optimizers
    )
    lr = None if config.mode == "coupled" else config.lr
    given = config.given or config.mode == "independent" or (in_backward and lr in (None, "half"))
    given = given or (config.mode == "coupled" and any("maximize" in kind for kind in optimizers))
    scheduled = config.scheduled and not shared  # else a parameter would have two numbers of steps
    return replace(
        config, shared=shared, optimizers=optimizers, lr=lr, given=given, scheduled=scheduled
    )


def scheduled(λ: float, step: int) -> float:
    """A schedule that comes back to 0."""
    return λ * (1.0, 0.5, 0.0, 2.0, 1.5)[step % 5]


PARTS = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=2).map(tuple)
KINDS = st.sampled_from(list(OPTIMIZERS))
RATES = st.sampled_from([0.05, 0.5, 0.1, 0.0])
CONFIGS = st.builds(
    Config,
    seed=st.integers(0, 99),
    one=PARTS,
    two=PARTS,
    double=st.booleans(),
    mode=st.sampled_from(["coupled", "coupled", "coupled", "decoupled", "independent"]),
    at=st.sampled_from(["backward", "backward", "step"]),
    λ=st.one_of(st.tuples(RATES), st.tuples(RATES, RATES)),
    own=st.lists(st.sampled_from([None, None, True, 0.0, 0.2]), max_size=5).map(tuple),
    optimizers=st.one_of(st.tuples(KINDS), st.tuples(KINDS, KINDS)),
    shared=st.booleans(),
    given=st.booleans(),
    lr=st.sampled_from([None, None, 0.03, "half"]),
    scale=st.sampled_from([None, None, None, 1024.0, 1024.0, 0.0]),
    foreach=st.sampled_from([None, True, False]),
    frozen=st.sampled_from(["", "", "one", "two"]),
    scheduled=st.sampled_from([False, False, True]),
).map(sensible)
