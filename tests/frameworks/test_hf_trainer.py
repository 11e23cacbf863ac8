"""The callback for the Hugging Face Trainer: each training is compared with one without wdhook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from twins import assert_bit_equal, perceptron, twins, weights, λ

import wdhook
from wdhook._decay import step_listener as _listener

pytest.importorskip("transformers", reason="needs transformers")
from hf_runs import (
    MOMENTS,
    OWN,
    AtStep,
    DecayBeforeStep,
    DecayInBackward,
    Trainer,
    train,
    trainer_of,
)

from wdhook.integrations.transformers import WeightDecayCallback


def hooks(net: nn.Module) -> int:
    """How many parameters have a hook."""
    return sum(bool(p._post_accumulate_grad_hooks) for p in net.parameters())


def compare(mode: str, at: str, folder: Path, *, off: float = 1.0, **arguments: Any) -> None:
    """Raise unless the callback and a reference without wdhook end with the same parameters."""
    net, twin = twins(perceptron())
    arguments = {"optim": OWN[mode], **arguments}
    train(net, folder, WeightDecayCallback(λ * off, mode=mode, at=at), **arguments)
    if (mode, at) == ("coupled", "backward"):
        train(twin, folder, kind=DecayInBackward, **arguments)
    else:
        train(twin, folder, weight_decay=λ, **arguments)
    assert_bit_equal(net.state_dict(), twin.state_dict())


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.3},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated, clipped": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3},
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_every_loop(mode: str, at: str, loop: str, tmp_path: Path) -> None:
    """Accumulation and clipping by the Trainer: its own decay, or by hand, bit for bit."""
    if (mode, at) == ("decoupled", "backward") and "accumulated" in loop:
        with pytest.warns(
            wdhook.WdhookWarning, match="second gradient before the optimizer stepped"
        ):
            train(
                perceptron(),
                tmp_path,
                WeightDecayCallback(λ, mode=mode, at=at),
                optim=OWN[mode],
                **LOOPS[loop],
            )
    else:
        compare(mode, at, tmp_path, **LOOPS[loop])


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(mode: str, at: str, tmp_path: Path) -> None:
    """A λ that is wrong by one percent is seen."""
    with pytest.raises(AssertionError, match="differs by up to"):
        compare(mode, at, tmp_path, off=1.01)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "rmsprop", "adagrad"])
def test_optimizers_of_torch_by_name(optim: str, tmp_path: Path) -> None:
    """`optim=`: the Trainer's own decay, with the mode that the optimizer has."""
    mode = "decoupled" if "adamw" in optim else "coupled"
    compare(mode, "step", tmp_path, optim=optim, **LOOPS["accumulated, clipped"])


THIRD_PARTY: dict[str, dict[str, Any]] = {
    "adafactor": {},
    # The Trainer does not give these its weight_decay.
    "galore_adamw": {
        "optim_target_modules": "all-linear",
        "optim_args": "rank=2, update_proj_gap=3",
    },
    "galore_adamw_layerwise": {
        "optim_target_modules": "all-linear",
        "optim_args": "rank=2, update_proj_gap=3",
    },
}


class Layerwise(Trainer):
    """Decay by hand in hooks that run before those in which the optimizers step."""

    mode = "coupled"

    def create_optimizer(self, *arguments: Any) -> Any:
        hook = {"coupled": self.add, "decoupled": self.shrink}[self.mode]
        for p in weights(self.model):
            p.register_post_accumulate_grad_hook(hook)
        return super().create_optimizer(*arguments)

    @staticmethod
    def add(p: torch.Tensor) -> None:
        p.grad.add_(p, alpha=λ)

    def shrink(self, p: torch.Tensor) -> None:
        p.mul_(1 - self.optimizer.optimizer.optimizer_dict[p].param_groups[0]["lr"] * λ)


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
@pytest.mark.parametrize("optim", THIRD_PARTY)
@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_third_party_optimizers(mode: str, at: str, optim: str, tmp_path: Path) -> None:
    """`optim=` of others: bit for bit the decay by hand, at the step or in the backward."""
    if "galore" in optim:
        pytest.importorskip(
            "galore_torch", reason="needs galore-torch and bitsandbytes", exc_type=ImportError
        )
    net, twin = twins(perceptron())
    arguments = {"optim": optim, **THIRD_PARTY[optim]}
    train(net, tmp_path, WeightDecayCallback(λ, mode=mode, at=at), **arguments)
    if "layerwise" in optim:
        train(twin, tmp_path, kind=type("Kind", (Layerwise,), {"mode": mode}), **arguments)
    else:
        train(twin, tmp_path, DecayBeforeStep(mode), **arguments)
    assert_bit_equal(net.state_dict(), twin.state_dict())
    assert not torch.equal(net[0].weight, perceptron()[0].weight)


class Scaled(Trainer):
    """fp16 needs a GPU; the scaler that it would bring does not."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.losses = 0

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        self.losses += 1
        loss = super().compute_loss(*arguments, **keywords)
        return loss * float("inf") if self.losses in (3, 4) else loss


@pytest.mark.parametrize("loop", ["plain", "accumulated"])
@pytest.mark.parametrize(
    ("mode", "at"), [("coupled", "backward"), ("coupled", "step"), ("decoupled", "step")]
)
def test_the_scaler_of_accelerate(mode: str, at: str, loop: str, tmp_path: Path) -> None:
    """The callback finds the scaler; steps that overflow are skipped, the decay with them."""
    net, twin = twins(perceptron())
    arguments = {"optim": OWN[mode], **LOOPS[loop]}
    trainer = train(
        net, tmp_path, WeightDecayCallback(λ, mode=mode, at=at), kind=Scaled, **arguments
    )
    assert trainer.accelerator.scaler.get_scale() < 2.0 ** (10 + trainer.state.global_step // 2)
    if (mode, at) == ("coupled", "backward"):
        train(twin, tmp_path, kind=type("Kind", (Scaled, DecayInBackward), {}), **arguments)
    else:
        train(twin, tmp_path, kind=Scaled, weight_decay=λ, **arguments)
    assert_bit_equal(net.state_dict(), twin.state_dict())
    assert not torch.equal(net[0].weight, perceptron()[0].weight)


# ---------------------------------------------------------------- life cycle


def test_attached_while_training_runs(tmp_path: Path) -> None:
    """Hooks are there during `train`, and gone after it; a second `train` is decayed again."""
    (net, twin), seen = twins(perceptron()), []
    callback = WeightDecayCallback(λ)
    ours = trainer_of(
        net,
        tmp_path,
        callback,
        AtStep(3, lambda _: seen.append((hooks(net), callback.decay.weight_decay))),
    )
    theirs = trainer_of(twin, tmp_path, weight_decay=λ)
    for _ in range(2):
        ours.train()
        theirs.train()
        assert hooks(net) == 0
        assert callback.decay is None
        assert not _listener.attached()
        assert_bit_equal(net.state_dict(), twin.state_dict())
    assert seen == [(3, λ), (3, λ)]


def test_after_an_exception(tmp_path: Path) -> None:
    """The Trainer does not report an exception; `remove` works, the next `train` begins anew."""
    (net, twin), callback = twins(perceptron()), WeightDecayCallback(λ)

    def fail(_: Any) -> None:
        callback.decay.weight_decay = 0.9
        raise ZeroDivisionError

    crash = AtStep(1, fail)
    trainer = trainer_of(net, tmp_path, callback, crash)
    theirs = trainer_of(twin, tmp_path, AtStep(1, lambda _: 1 / 0), weight_decay=λ)
    for t in (trainer, theirs, trainer, theirs):
        with pytest.raises(ZeroDivisionError):
            t.train()
    assert_bit_equal(net.state_dict(), twin.state_dict())
    callback.remove()
    callback.remove()
    assert not _listener.attached()


# ---------------------------------------------------------------- refusals


class OfDeepSpeed(torch.optim.SGD):
    """Stands for DeepSpeed's, which needs a GPU."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"


def refuse_deepspeed(folder: Path) -> None:
    trainer = trainer_of(perceptron(), folder, WeightDecayCallback(λ))
    trainer.optimizer = OfDeepSpeed(trainer.model.parameters(), lr=0.1)
    trainer.train()


def refuse_own_optimizer(folder: Path) -> None:
    trainer = trainer_of(perceptron(), folder, WeightDecayCallback(λ))
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    trainer.train()


REFUSED = {
    "TrainingArguments.weight_decay": (
        lambda folder: train(perceptron(), folder, WeightDecayCallback(λ), weight_decay=0.2),
        wdhook.DoubleDecayError,
        [
            "TrainingArguments.weight_decay: 0.2",
            "weight_decay=0",
            'WeightDecayCallback(0.2, mode="decoupled"',
        ],
    ),
    "own decay of an optimizer": (
        refuse_own_optimizer,
        wdhook.DoubleDecayError,
        ["net.0.weight", "AdamW", "0.01"],
    ),
    "DeepSpeed": (
        refuse_deepspeed,
        wdhook.UnsupportedOptimizerError,
        ["OfDeepSpeed", "wdhook.param_groups(model, λ)"],
    ),
    "two callbacks": (
        lambda folder: train(
            perceptron(), folder, WeightDecayCallback(λ), WeightDecayCallback(0.1)
        ),
        wdhook.ArgumentError,
        ["one WeightDecayCallback only", "found: 2", "`overrides`"],
    ),
    "a scaler": (
        lambda _: WeightDecayCallback(λ, scaler=None),
        wdhook.ArgumentError,
        ["`scaler`", "overrides"],
    ),
    "another mode": (
        lambda folder: train(perceptron(), folder, WeightDecayCallback(λ, mode="l2")),
        wdhook.ArgumentError,
        ["`mode`", "l2"],
    ),
}


@pytest.mark.filterwarnings("ignore:You are adding a .*WeightDecayCallback")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    """What has no meaning is an error that names the way out, before any parameter changes."""
    function, kind, pieces = REFUSED[case]
    with pytest.raises(kind) as error:
        function(tmp_path)
    assert [piece for piece in pieces if piece not in str(error.value)] == []
