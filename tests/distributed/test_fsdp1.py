"""FSDP1 (`FullyShardedDataParallel`): shards are 1-D, and no hook runs, so the decay is always
that of the step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import local_batch
from processes import Group
from sharded import (
    BOUND,
    LOOPS,
    WAYS,
    Loop,
    Trainer,
    assert_clean,
    assert_same_shards,
    attached,
    blocks,
    local_state,
    play_scaled,
    reasons,
)
from torch import Tensor, nn
from twins import LR, assert_close, batches, loss_of, own_groups, weights, λ

import wdhook

WRAPPER = "_fsdp_wrapped_module."


def wrap(model: nn.Module, strategy: str = "FULL_SHARD", **how: Any) -> nn.Module:
    """One unit for the root and one for each block."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    settings = {
        "use_orig_params": True,
        "auto_wrap_policy": ModuleWrapPolicy({nn.Sequential}),
        **how,
    }
    kind = ShardingStrategy[strategy]
    return FullyShardedDataParallel(
        model, sharding_strategy=kind, device_id=torch.device("cpu"), **settings
    )


def syncing(model: Any, sync: bool) -> AbstractContextManager[Any]:
    return nullcontext() if sync else model.no_sync()


def whole_state(model: Any) -> dict[str, Tensor]:
    with model.summon_full_params(model):
        return {
            name.replace(WRAPPER, ""): p.detach().clone() for name, p in model.named_parameters()
        }


SHARDED = Trainer(
    part=local_batch, syncing=syncing, clip=lambda model, norm: model.clip_grad_norm_(norm)
)


def compare(
    mode: str, at: str, new: Any, make: Any, trainer: Trainer, alone: Trainer | None, bound: float
) -> Any:
    """Raise unless handles of before and after wrapping give what torch's own decay gives; the
    last model."""
    for when in ("before", "after"):
        model, handle = attached(when, new, make, mode=mode, at=at)
        trainer.play_attached(model, mode)
        other = make(new())
        trainer.play_by_torch(other, mode)
        assert_same_shards(model, other)
        if alone is not None:
            single = new()
            alone.play_by_torch(single, mode)
            assert_close(whole_state(model), single.state_dict(), bound)
        assert reasons(handle.plan) == reasons(wdhook.plan(new(), λ))
        handle.remove()
        assert_clean(model)
    return model


def _in_a_loop(name: str, mode: str, at: str) -> None:
    loop = LOOPS[name]
    # FSDP's own clipping is for float32: 4 steps of gradients below 1 and lr 0.1, each rounded to
    # some units of 6e-8.
    new, bound = (blocks, BOUND) if loop.clip is None else (lambda: blocks(torch.float32), 1e-5)
    model = compare(mode, at, new, wrap, replace(SHARDED, loop=loop), Trainer(loop), bound)
    assert all(weight.ndim == 1 for weight in weights(model))
    if (name, mode) == ("plain", "coupled"):
        undecayed = blocks()
        Trainer().play(undecayed, torch.optim.SGD(undecayed.parameters(), lr=LR, momentum=0.9))
        with pytest.raises(AssertionError, match="differs"):
            assert_close(whole_state(model), undecayed.state_dict(), 1e-3)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop(name: str, mode: str, at: str, two: Group) -> None:
    """`no_sync`, both kinds of zeroing, FSDP's own clipping, skipped steps; wrapped after and
    before attaching: names and types give the same plan as that of the model on its own."""
    two(_in_a_loop, name, mode, at)


def _by_strategy(name: str, mode: str, at: str) -> None:
    from torch.distributed.fsdp import MixedPrecision

    loop = Loop(micro=2)
    trainer, alone = replace(SHARDED, loop=loop), Trainer(loop)
    how: dict[str, Any] = {"strategy": name}
    new, strategy_of = (
        blocks,
        {"one unit": "FULL_SHARD", "ignored": "FULL_SHARD", "bfloat16": "SHARD_GRAD_OP"},
    )
    if name in strategy_of:
        how["strategy"] = strategy_of[name]
    if name == "HYBRID_SHARD":
        how["device_mesh"] = torch.distributed.init_device_mesh("cpu", (2, 2))
    elif name == "one unit":
        how["auto_wrap_policy"] = None
    elif name == "ignored":  # nobody reduces these gradients, so every rank sees the whole batch
        trainer = replace(trainer, loop=Loop(), part=lambda batch: batch)
        alone = Trainer()
    elif name == "bfloat16":
        how["mixed_precision"] = MixedPrecision(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )

    def make(model: nn.Module) -> nn.Module:
        if name == "ignored":
            how["ignored_states"] = [model[2]]
        return wrap(model, **how)

    if name == "bfloat16":
        compare(mode, at, lambda: new(torch.float32), make, trainer, None, 0.0)
        return
    model = compare(mode, at, new, make, trainer, alone, BOUND)
    if name == "one unit":
        assert any(weight.numel() == 0 for weight in weights(model))


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("name", ["SHARD_GRAD_OP", "NO_SHARD", "one unit", "ignored", "bfloat16"])
def test_every_strategy(name: str, mode: str, at: str, two: Group) -> None:
    """Other strategies, ignored modules, mixed precision; and weights of which a rank holds
    nothing."""
    two(_by_strategy, name, mode, at)


@pytest.mark.parametrize(("mode", "at"), WAYS)
def test_hybrid_shards(mode: str, at: str, four: Group) -> None:
    """Shards on two ranks, replicas on two others."""
    four(_by_strategy, "HYBRID_SHARD", mode, at)


def _scaled(at: str) -> None:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    scaler, its = (
        ShardedGradScaler(device="cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)
    )
    model, other = wrap(blocks(torch.float32)), wrap(blocks(torch.float32))
    with wdhook.attach(model, λ, at=at, scaler=scaler):
        play_scaled(model, torch.optim.SGD(model.parameters(), lr=LR), scaler, local_batch, (1, 2))
    play_scaled(other, torch.optim.SGD(own_groups(other), lr=LR), its, local_batch, (1, 2))
    assert scaler.get_scale() == its.get_scale() < 4096
    assert all(p.isfinite().all() for p in model.parameters())
    assert_same_shards(model, other)


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_sharded_scaler(at: str, two: Group) -> None:
    """`ShardedGradScaler`: gradients are un-scaled before the decay comes, and ranks agree on what
    is skipped."""
    two(_scaled, at)


FLAT = {"use_orig_params": False}


def _refused() -> list[str]:
    """The message of everything that would decay nothing, or the wrong thing."""
    messages = []
    model = wrap(blocks(), **FLAT)
    for decide in (wdhook.attach, wdhook.plan, wdhook.param_groups, wdhook.l2_penalty):
        with pytest.raises(wdhook.NothingToDecayError) as error:
            decide(model, λ)
        messages.append(str(error.value))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=λ)
    with pytest.raises(wdhook.NothingToDecayError):
        wdhook.adopt(model, optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == λ
    for mode, at in [*WAYS, ("decoupled", "backward")]:
        inner = blocks()
        lr = LR if (mode, at) == ("decoupled", "backward") else None
        with wdhook.attach(inner, λ, mode=mode, at=at, lr=lr):
            model = wrap(inner, **FLAT)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            loss_of(model, local_batch(batches(model, 1)[0])).backward()
            before = local_state(model)
            for _ in range(2):  # each time, not only the first
                with pytest.raises(wdhook.NothingToDecayError) as error:
                    optimizer.step()
            messages.append(str(error.value))
            assert all(map(torch.equal, local_state(model).values(), before.values()))
    return messages


def test_flattened_parameters_are_refused(two: Group) -> None:
    """`use_orig_params=False` makes one parameter of weights and biases: refused where it is seen,
    at the latest by the first step, which changes nothing; with the way out."""
    for messages in two(_refused):
        assert len(messages) == 8
        for message in messages:
            assert "use_orig_params=True" in message
            assert "_flat_param" in message


def _on_purpose() -> None:
    """What the message names: the whole parameter is decayed."""
    model, other = wrap(blocks(), **FLAT), wrap(blocks(), **FLAT)
    with wdhook.attach(model, λ, at="step", overrides={"*_flat_param": True}) as handle:
        SHARDED.play(model, torch.optim.SGD(model.parameters(), lr=LR))
        assert {decision.role for decision in handle.plan.values()} == {"other"}
    SHARDED.play(other, torch.optim.SGD(other.parameters(), lr=LR, weight_decay=λ))
    assert_same_shards(model, other)


def test_flattened_parameters_on_purpose(two: Group) -> None:
    """An override that selects the flattened parameters decays them, biases and all."""
    two(_on_purpose)


def _frozen() -> None:
    model = nn.Sequential(
        wrap(blocks()[:2].requires_grad_(False), **FLAT), nn.Linear(5, 1).double()
    )
    other = nn.Sequential(
        wrap(blocks()[:2].requires_grad_(False), **FLAT), nn.Linear(5, 1).double()
    )
    other[1].load_state_dict(model[1].state_dict())
    with wdhook.attach(model, λ) as handle:
        Trainer().play(model, torch.optim.SGD(model[1].parameters(), lr=LR))
        assert list(handle.plan.decayed) == ["1.weight"]
    Trainer().play(other, torch.optim.SGD(own_groups(other[1]), lr=LR))
    assert_same_shards(model, other)


def test_frozen_flattened_parameters_are_not_in_the_way(two: Group) -> None:
    """A frozen backbone may be flattened: nothing of it would be decayed."""
    two(_frozen)


def _toward(toward: Any) -> str:
    trained = []
    for make in (wrap, nn.Module.train):
        model: Any = make(blocks())
        with wdhook.attach(model, λ, mode="decoupled", at="step", toward=toward):
            try:
                Trainer().play(model, torch.optim.SGD(model.parameters(), lr=LR))
            except wdhook.TargetError as error:
                return str(error)
        trained.append(model)
    assert_close(whole_state(trained[0]), trained[1].state_dict(), BOUND)
    return ""


def test_fsdp1_takes_numbers_alone(two: Group) -> None:
    """A piece of a flat parameter does not know its place in the whole."""
    for said in two(_toward, "init"):
        assert said.startswith("An engine steps a piece")
    assert set(two(_toward, 1.0)) == {""}
