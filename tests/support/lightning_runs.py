"""Trainings for the Lightning callback: modules without wdhook, decay by hand, quiet Trainers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from twins import LR, batches, loss_of, weights, λ

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the framework's imports
    pl: Any = pytest.importorskip("lightning.pytorch", reason="needs Lightning")
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
KINDS: dict[str, Any] = {"coupled": torch.optim.SGD, "decoupled": torch.optim.AdamW}
MOMENTS = [(mode, at) for mode in KINDS for at in ("backward", "step")]
QUIET = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Hand-made param groups, a parameter each: clipping sums gradients in their order."""
    decayed = {id(p) for p in weights(model)}
    return [
        {"params": [p], "weight_decay": weight_decay * (id(p) in decayed)}
        for p in model.parameters()
    ]


class Parts:
    """A module that an optimizer of `kind` trains, with its own decay or none."""

    def __init__(
        self, net: nn.Module, kind: Any, own: float = 0.0, overflows: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.net, self.kind, self.own, self.overflows = net, kind, own, overflows

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.net, batch) * (float("inf") if index in self.overflows else 1.0)

    def configure_optimizers(self) -> Any:
        return self.kind(groups_of(self.net, self.own), lr=LR)


class Regression(Parts, pl.LightningModule):
    """The module for Lightning."""


class Gan(pl.LightningModule):
    """Manual optimization: the critic steps twice, then the generator once.

    Args:
        apart: neither leaves gradients on the other.
    """

    automatic_optimization = False

    def __init__(
        self, g: nn.Module, d: nn.Module, kind: Any, own: float, clip: float, apart: bool
    ) -> None:
        super().__init__()
        self.g, self.d, self.kind, self.own, self.clip, self.apart = g, d, kind, own, clip, apart

    def training_step(self, batch: Tensor, index: int) -> None:
        og, od = self.optimizers()
        for _ in range(2):
            with self.only(od):
                od.zero_grad()
                self.manual_backward(self.d(self.g(batch)).square().mean())
                od.step()
        with self.only(og):
            og.zero_grad()
            self.manual_backward((self.d(self.g(batch)) - 1).square().mean())
            self.clip_gradients(og, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            og.step()

    @contextmanager
    def only(self, optimizer: Any) -> Iterator[None]:
        """Freeze what other optimizers own, if they are kept apart."""
        if self.apart:
            self.toggle_optimizer(optimizer)
        yield
        if self.apart:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.kind(groups_of(net, self.own), lr=LR) for net in (self.g, self.d)]


class InBackward(pl.Callback):
    """Coupled decay by hand, after each step's first backward pass, times the scale of the loss."""

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            for p in weights(module.net):
                p.grad.add_(p.detach(), alpha=λ * (scaler.get_scale() if scaler else 1.0))


class AtEpoch(pl.Callback):
    """Calls a function with the Trainer at the start of one epoch."""

    def __init__(self, epoch: int, function: Any) -> None:
        self.epoch, self.function = epoch, function

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.function(trainer)


def stop(trainer: Any) -> None:
    """Something goes wrong."""
    raise ZeroDivisionError


class Evaluated(Regression):
    """Calls a function in each validation step."""

    def validation_step(self, batch: Tensor, index: int) -> None:
        if self.kind is not None:
            self.kind()


class Environment(LightningEnvironment):
    """Processes that run already, and have met."""

    creates_processes_externally = True

    def setup_processes(self) -> None:
        """Ranks are what torch.distributed says."""

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    local_rank = global_rank

    def set_world_size(self, size: int) -> None:
        """Known."""

    set_global_rank = set_world_size


def ddp(**arguments: Any) -> dict[str, Any]:
    """Trainer arguments for DistributedDataParallel over the processes that have met."""
    strategy = DDPStrategy(
        cluster_environment=Environment(), process_group_backend="gloo", **arguments
    )
    return {
        "strategy": strategy,
        "devices": torch.distributed.get_world_size(),
        "use_distributed_sampler": False,
    }


def trainer_of(*callbacks: Any, package: Any = pl, **arguments: Any) -> Any:
    """A Trainer that prints nothing and saves nothing."""
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    arguments = {"max_epochs": 2, "accelerator": "cpu", **dict.fromkeys(quiet, False), **arguments}
    return package.Trainer(callbacks=list(callbacks), **arguments)


def fit(
    module: Any, *callbacks: Any, ckpt_path: Any = None, seed: int = 1, **arguments: Any
) -> Any:
    """Train on seven batches an epoch."""
    trainer = trainer_of(*callbacks, **arguments)
    net = next(module.children())
    trainer.fit(module, DataLoader(batches(net, 7, seed), batch_size=None), ckpt_path=ckpt_path)
    return trainer
