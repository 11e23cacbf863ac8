"""Slow, obvious twins that do not use wdhook, and comparisons that raise."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

λ = 0.05
LR = 0.1


def assert_bit_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise unless two state dicts hold the same tensors to the last bit."""
    if list(one) != list(other):
        raise AssertionError(f"different names: {sorted(set(one) ^ set(other))}")
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            worst = (tensor.double() - other[name].double()).abs().max().item()
            raise AssertionError(f"{name} differs by up to {worst:g}")


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], bound: float) -> None:
    """Raise unless two state dicts differ by at most `bound` in every element."""
    for name, tensor in one.items():
        worst = (tensor - other[name]).abs().max().item()
        if not worst <= bound:
            raise AssertionError(f"{name} differs by {worst:g} > {bound:g}")


class NoReading(TorchDispatchMode):
    """Fails where a value on the device is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, unless it is what `item` and `tolist` do, or a copy to the host."""
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError("a value was read")
        return func(*args, **(kwargs or {}))


def calls(function: Callable[[], object]) -> int:
    """How many functions `function` calls: its cost, and the same on every machine."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def assert_linear(cost: Callable[[int], int], small: int) -> None:
    """Raise unless twice the size costs about twice as much."""
    one, two = cost(small), cost(2 * small)
    if not two < 2.2 * one:
        raise AssertionError(f"twice the size costs {two / one:.2f} times as much")


def convnet(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A small model with every common role: convolution, linear, biases, BatchNorm, LayerNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 6),
            nn.LayerNorm(6),
            nn.Tanh(),
            nn.Linear(6, 3, bias=False),
        ).to(dtype)


def perceptron(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Three layers whose gradients are never zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)
        ).to(dtype)


def batches(model: nn.Module, count: int, seed: int = 1) -> list[Tensor]:
    """Inputs for `convnet` or `perceptron`, of the model's dtype."""
    first = next(model.parameters())
    shape = (4, 2, 5) if first.ndim == 3 else (4, 4)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(first.dtype)
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient is not zero anywhere."""
    return (model(batch) - 1).square().mean()


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are decayed, by the rule that is right for the models above."""
    return [
        p
        for m in model.modules()
        for n, p in m.named_parameters(recurse=False)
        if isinstance(m, (nn.Conv1d, nn.Linear)) and n == "weight"
    ]


def own_groups(model: nn.Module, weight_decay: float = λ) -> list[dict[str, Any]]:
    """Hand-made param groups: `weights` decayed, the rest not."""
    decayed = {id(p) for p in weights(model)}
    return [
        {
            "params": [p for p in model.parameters() if id(p) in decayed],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two models with the same parameters and buffers."""
    return model, copy.deepcopy(model)


def zero(model: nn.Module, to_none: bool) -> None:
    """Both kinds of `zero_grad`."""
    model.zero_grad(set_to_none=to_none)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Iterable[Tensor],
    *,
    micro: int = 1,
    clip: float | None = None,
    to_none: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The loop that everybody writes: `micro` backward passes for each step."""
    for i, batch in enumerate(inputs):
        if i % micro == 0:
            zero(model, to_none)
        (loss_of(model, batch) / micro).backward()
        if i % micro == micro - 1:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            after_step()


def zero_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """A step whose gradients are 0: what moves a parameter is its decay. By plain SGD if none is
    given."""
    model.zero_grad()
    trained = [p for p in model.parameters() if p.requires_grad]
    sum((p * 0).sum() for p in trained).backward()  # type: ignore[union-attr]
    for optimizer in optimizers or (torch.optim.SGD(model.parameters(), lr=LR),):
        optimizer.step()
