"""One training for the tests of torch.compile, counted, with wdhook or torch.optim's own decay."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from twins import LR, batches, own_groups, perceptron, λ

import wdhook

STEPS = 12
CASES = [("coupled", "backward"), ("coupled", "step"), ("decoupled", "step")]
each_case = pytest.mark.parametrize(("mode", "at"), CASES)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor needs a C++ compiler on the CPU",
)
WARNINGS = [  # of torch itself, in Dynamo and Inductor
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

Iteration = Callable[[int, Tensor], object]
Loop = Callable[[nn.Module, torch.optim.Optimizer], Iteration]


@pytest.fixture
def dynamo(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Inductor compiles in this process, into a directory of these tests, test by test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    trace = logging.getLogger(
        "torch.__trace"
    )  # torch writes it where somebody listens, and pytest would: all of it
    monkeypatch.setattr(trace, "handlers", [])
    monkeypatch.setattr(trace, "addHandler", lambda handler: None)
    yield
    torch._dynamo.reset()


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two decayed weights and little else, for what is slow to compile."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


class Count(NamedTuple):
    """What Dynamo has done so far."""

    graphs: int
    breaks: int
    frames: int  # that it began to compile: each recompilation is one more


class Run(NamedTuple):
    """One training: the parameters at its end, and what Dynamo had done after each iteration."""

    state: dict[str, Tensor]
    counts: list[Count]

    @property
    def last(self) -> Count:
        """What Dynamo has done in the whole training."""
        return self.counts[-1]

    def assert_settled(self, after: int) -> None:
        """Raise if Dynamo began to compile anything after so many iterations."""
        if self.counts[after - 1 :] != [self.last] * (len(self.counts) - after + 1):
            raise AssertionError(f"compiled after iteration {after}: {self.counts}")


def optimizer_of(
    model: nn.Module, mode: str, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW, with its own decay."""
    if mode == "coupled":
        return torch.optim.SGD(
            own_groups(model, weight_decay), **{"lr": LR, "momentum": 0.9, **options}
        )
    return torch.optim.AdamW(own_groups(model, weight_decay), **{"lr": LR, **options})


def play(
    loop: Loop,
    mode: str,
    at: str | None,
    *,
    make: Callable[[], nn.Module] = perceptron,
    steps: int = STEPS,
    micro: int = 1,
    late: bool = False,
    scaler: Any = None,
    **options: Any,
) -> Run:
    """Train with the loop that `loop` makes. Both lr and λ change from step to step.

    Args:
        loop: is given the model and its optimizer, compiles what it likes, and returns one
            iteration.
        mode: the formula of the decay.
        at: the moment; None is the reference, in which torch.optim decays by itself.
        make: the model.
        steps: iterations.
        micro: iterations for each optimizer step.
        late: attach after `loop` has compiled.
        scaler: for `attach`.
        options: of the optimizer.
    """
    torch._dynamo.reset()
    counters.clear()
    model = make()
    optimizer = optimizer_of(model, mode, λ if at is None else 0.0, **options)
    handle = None
    iteration = loop(model, optimizer) if late else None
    if at is not None:
        handle = wdhook.attach(model, λ, mode=mode, at=at, scaler=scaler)
    iteration = iteration or loop(model, optimizer)
    counts = []
    for i, batch in enumerate(batches(model, steps)):
        _schedule(optimizer, handle, i // micro)
        iteration(i, batch)
        counts.append(
            Count(
                counters["stats"]["unique_graphs"],
                sum(counters["graph_break"].values()),
                counters["frames"]["total"],
            )
        )
    if handle is not None:
        handle.remove()
    return Run(model.state_dict(), counts)


def lr_of(tensor: bool) -> dict[str, Any]:
    """For `play`: a number as lr makes torch.optim compile its step anew whenever lr changes."""
    return {"lr": torch.tensor(LR)} if tensor else {}


def _schedule(optimizer: torch.optim.Optimizer, handle: wdhook.WeightDecay | None, i: int) -> None:
    now = λ * (1 + i % 3)
    if handle is None:
        optimizer.param_groups[0]["weight_decay"] = now
    else:
        handle.weight_decay = now
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(LR * 0.9**i)
        else:
            group["lr"] = LR * 0.9**i
