"""What is particular to parameters and gradients that are DTensors: no communication, kernels,
traces, empty shards."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import local_batch
from processes import Group
from sharded import (
    NORMS,
    WAYS,
    Loop,
    Trainer,
    assert_same_shards,
    assert_whole_is_close,
    blocks,
    groups,
    needs_dtensor,
    optimizer_of,
    parallel,
    play_scaled,
    shard,
    tower,
    whole_state,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import LR, assert_close, batches, loss_of, own_groups, weights, λ

import wdhook
import wdhook._decay.tensors

pytestmark = needs_dtensor


def sharded(how: str) -> nn.Module:
    if how == "fsdp2":
        return shard(blocks())
    return parallel(how, torch.distributed.init_device_mesh("cpu", (2,)), tower())


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for batch in batches(model, 2):
        loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


class Collectives(TorchDispatchMode):
    """Counts what is communicated. (torch's own CommDebugMode stumbles over `fully_shard` in some
    versions.)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # the operations on what the rank holds come by as well
        if "c10d" in func.namespace:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _communication(how: str, mode: str, at: str, foreach: bool | None) -> None:
    def count(attach: bool) -> Counter[str]:
        model = sharded(how)
        optimizer = optimizer_of(mode, model.parameters(), weight_decay=0.0)
        overrides = NORMS if how == "replicated" else None
        handle = (
            wdhook.attach(model, λ, mode=mode, at=at, foreach=foreach, overrides=overrides)
            if attach
            else None
        )
        one_step(model, optimizer)
        with Collectives() as counter:
            one_step(model, optimizer)
        if handle is not None:
            handle.remove()
        return counter.seen

    expected = count(False)
    assert expected.total() >= 4
    assert count(True) == expected


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("how", ["fsdp2", "sequence", "replicated"])
def test_decay_communicates_nothing(how: str, mode: str, at: str, two: Group) -> None:
    """A rank decays what it holds: as many collectives with a handle as without, in backward
    passes and steps."""
    for foreach in (None, True):
        two(_communication, how, mode, at, foreach)


def _communication_is_seen() -> None:
    model = sharded("fsdp2")
    with Collectives() as counter:
        model[0][0].weight.full_tensor()
    assert any("all" in name for name in counter.seen)


def test_the_count_sees_a_collective(two: Group) -> None:
    """The counter of the test above is not blind."""
    two(_communication_is_seen)


def _by_foreach(how: str, mode: str, at: str) -> None:
    results = []
    for foreach in (False, True):
        trainer = Trainer(groups=groups if how == "sequence" else own_groups)
        model = sharded(how)
        with wdhook.attach(
            model,
            λ,
            mode=mode,
            at=at,
            foreach=foreach,
            overrides=NORMS if how == "sequence" else None,
        ):
            trainer.play_attached(model, mode)
        other = sharded(how)
        trainer.play_by_torch(other, mode)
        assert_same_shards(model, other)
        results.append(model)
    assert_same_shards(*results)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("how", ["fsdp2", "sequence"])
def test_foreach_when_asked(how: str, mode: str, at: str, two: Group) -> None:
    """`foreach=True` takes the foreach kernels for DTensors too; the result is that of single
    ones, to the last bit."""
    two(_by_foreach, how, mode, at)


def _zeroed_by_foreach(kind: str, skipped: tuple[int, ...], given: bool) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "fused Adam":
            return torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        return torch.optim.SGD(model.parameters(), lr=LR, foreach=True)

    trainer = Trainer(Loop(micro=2, to_none=False, skipped=skipped), local_batch)
    model = sharded("fsdp2")
    optimizer = make(model)
    with wdhook.attach(model, λ, optimizer=optimizer if given else None):
        trainer.play(model, optimizer)
    other = sharded("fsdp2")
    trainer.play(other, make(other), lambda i: "backward")
    assert_same_shards(model, other)


@pytest.mark.parametrize("kind", ["foreach SGD", "fused Adam"])
@pytest.mark.parametrize(("skipped", "given"), [((1, 2), False), ((0, 2), True)])
def test_zeroed_in_place_by_a_foreach_kernel(
    kind: str, skipped: tuple[int, ...], given: bool, two: Group
) -> None:
    """Foreach kernels leave no trace in the version of a DTensor: gradients that were zeroed after
    a skipped step, and hold no decay any more, are told by their content."""
    two(_zeroed_by_foreach, kind, skipped, given)


class Thin(nn.Module):
    """Of two neighbours one is empty on the second rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.ModuleDict(
            {"wide": nn.Linear(4, 4, bias=False), "thin": nn.Linear(4, 1, bias=False)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last["thin"](self.last["wide"](self.first(x).tanh()).tanh())


def _scaled_between(factor: float) -> None:
    def train(model: nn.Module, by_hand: bool) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for i, batch in enumerate(batches(model, 9)):
            if i % 3 == 0:
                optimizer.zero_grad()
            loss_of(model, local_batch(batch)).backward()
            for weight in weights(model) if by_hand and i % 3 == 0 else ():
                weight.grad.add_(weight.detach(), alpha=λ)
            for p in model.parameters():
                p.grad.mul_(factor)
            if i % 3 == 2:
                optimizer.step()

    def make() -> nn.Module:
        torch.manual_seed(0)
        return shard_in_order(Thin().double())

    model, other = make(), make()
    with wdhook.attach(model, λ), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", wdhook.WdhookWarning
        )  # the second rank has no other witness in the root
        train(model, by_hand=False)
    train(other, by_hand=True)
    assert_same_shards(model, other)


def shard_in_order(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.first)
    return fully_shard(model)


def test_an_empty_shard_is_no_witness(two: Group) -> None:
    """Gradients that were scaled between two backward passes still hold the decay; that an empty
    one holds nothing does not speak against it."""
    two(_scaled_between, 0.5)


def _scale_on_device(how: str) -> None:
    overrides, grouped, part = (
        (None, own_groups, local_batch) if how == "fsdp2" else (NORMS, groups, lambda batch: batch)
    )

    scaler, its = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    model = sharded(how)
    with (
        wdhook.attach(model, λ, scaler=scaler, overrides=overrides),
        mock.patch.object(wdhook._decay.tensors, "is_on_cpu", return_value=False),
    ):
        play_scaled(model, torch.optim.SGD(model.parameters(), lr=LR), scaler, part)
    # One more rounding of λ·p in float64, 6 times.
    other = sharded(how)
    play_scaled(other, torch.optim.SGD(grouped(other, λ), lr=LR), its, part)
    assert_close(whole_state(model), whole_state(other), 1e-14)


@pytest.mark.parametrize("how", ["fsdp2", "replicated"])
def test_a_scale_that_stays_on_the_device(how: str, two: Group) -> None:
    """S as a tensor, as on a GPU: S·λ·p is added to shards, and to gradients that are partial
    sums."""
    two(_scale_on_device, how)


def _in_the_backward(tensor: bool) -> None:
    def make(groups: Any) -> torch.optim.Optimizer:
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
        return torch.optim.AdamW(groups, lr=lr, foreach=False)

    trainer = Trainer(part=local_batch)
    model, other = sharded("fsdp2"), sharded("fsdp2")
    optimizer = make(own_groups(model, 0.0))
    with wdhook.attach(model, λ, mode="decoupled", optimizer=optimizer):
        trainer.play(model, optimizer)
    trainer.play(other, make(own_groups(other, λ)))
    assert_same_shards(model, other)


@pytest.mark.parametrize("tensor", [False, True])
def test_decoupled_in_the_backward(tensor: bool, two: Group) -> None:
    """Shards shrink as their gradients come, by a learning rate that is a number or a tensor."""
    two(_in_the_backward, tensor)


def _scheduled(mode: str, at: str) -> None:
    def play(model: nn.Module, optimizer: torch.optim.Optimizer, set_to: Any) -> None:
        for i, batch in enumerate(batches(model, 4)):
            set_to(0.0 if i == 0 else λ * i)
            optimizer.zero_grad()
            loss_of(model, local_batch(batch)).backward()
            optimizer.step()

    model = blocks()
    handle = wdhook.attach(model, λ, mode=mode, at=at)
    shard(model)
    play(
        model,
        optimizer_of(mode, own_groups(model, 0.0)),
        lambda value: setattr(handle, "weight_decay", value),
    )
    other = sharded("fsdp2")
    optimizer = optimizer_of(mode, own_groups(other, λ))
    play(other, optimizer, lambda value: optimizer.param_groups[0].update(weight_decay=value))
    assert_same_shards(model, other)


@pytest.mark.parametrize(("mode", "at"), WAYS)
def test_a_schedule_reaches_replaced_parameters(mode: str, at: str, two: Group) -> None:
    """λ that is set after sharding is that of the new parameters; λ=0 is no decay."""
    two(_scheduled, mode, at)


def _one_shot() -> None:
    model, other, alone = sharded("fsdp2"), sharded("fsdp2"), blocks()
    for batch in batches(model, 3):
        for m in (model, other, alone):
            m.zero_grad()
            loss_of(m, local_batch(batch) if m is not alone else batch).backward()
        wdhook.apply_weight_decay(model, weight_decay=λ)
        torch.optim.SGD(model.parameters(), lr=LR).step()
        for m in (other, alone):
            torch.optim.SGD(own_groups(m), lr=LR).step()
    assert_same_shards(model, other)
    assert_whole_is_close(model, alone)


def test_the_call_without_hooks(two: Group) -> None:
    """`apply_weight_decay` after the backward pass of a sharded model."""
    two(_one_shot)
