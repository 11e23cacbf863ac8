"""Trainings for the Hugging Face callback: a model with a loss, decay by hand, quiet Trainers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from twins import LR, batches, weights, λ

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the framework's imports
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

# The Trainer's own groups decay what wdhook decays: here, the weights of the linear layers.
OWN = {"coupled": "sgd", "decoupled": "adamw_torch"}
MOMENTS = [(mode, at) for mode in OWN for at in ("backward", "step")]


class Regression(nn.Module):
    """What the Trainer trains: a model that computes its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - 1).square().mean()}


class Rows(Dataset[dict[str, Tensor]]):
    """Seven batches of four rows."""

    def __init__(self, net: nn.Module) -> None:
        self.rows = torch.cat(batches(net, 7))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.rows[index]}


class DecayInBackward(Trainer):
    """Coupled decay by hand, after each step's first backward pass, times the scale of the loss."""

    def training_step(self, model: Any, *inputs: Any) -> Tensor:
        fresh = next(model.parameters()).grad is None
        loss: Tensor = super().training_step(model, *inputs)
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        for p in weights(model) if fresh else ():
            p.grad.add_(p.detach(), alpha=λ * scale)
        return loss


class DecayBeforeStep(TrainerCallback):
    """Decay by hand, just before the step."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def on_pre_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        lr = optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for p in weights(model):
                if self.mode == "coupled":
                    p.grad.add_(p, alpha=λ)
                else:
                    p.mul_(1 - (lr / LR if self.mode == "independent" else lr) * λ)


class AtStep(TrainerCallback):
    """Calls a function with the optimizer after some steps."""

    def __init__(self, steps: int, function: Any) -> None:
        self.steps, self.function = steps, function

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        if state.global_step == self.steps:
            self.function(optimizer)


def trainer_of(
    net: nn.Module, folder: Path, *callbacks: Any, kind: Any = Trainer, **arguments: Any
) -> Any:
    """A Trainer for two epochs of seven batches that keeps quiet."""
    settings = {"optim": "sgd", "learning_rate": LR, "max_grad_norm": 0.0, "num_train_epochs": 2}
    quiet = {"use_cpu": True, "report_to": "none", "logging_strategy": "no", "save_strategy": "no"}
    quiet |= {"disable_tqdm": True, "log_level": "error", "per_device_train_batch_size": 4}
    args = TrainingArguments(str(folder), **{**quiet, **settings, **arguments})
    return kind(Regression(net), args, train_dataset=Rows(net), callbacks=list(callbacks))


def train(
    net: nn.Module, folder: Path, *callbacks: Any, resume: Any = None, **arguments: Any
) -> Any:
    """Train, from a checkpoint or from the start."""
    trainer = trainer_of(net, folder, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
