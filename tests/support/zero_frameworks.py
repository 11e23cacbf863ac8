"""DeepSpeed below accelerate and the Hugging Face Trainer, in the processes of a `Group`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from twins import loss_of, perceptron, weights
from zero_runs import Cell, ready, settings

import wdhook

λ, LR = 0.1, 0.01


@contextmanager
def _accelerate() -> Iterator[None]:
    """accelerate chooses DeepSpeed by a variable of the environment, and remembers its choice."""
    ready()
    from accelerate.state import AcceleratorState, GradientState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"], os.environ["ACCELERATE_TORCH_DEVICE"]
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def _values(model: nn.Module) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(p).clone().flatten() for p in model.parameters()]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# accelerate --------------------------------------------------------------------------------------


def _accelerated(cell: Cell, way: str) -> list[Tensor]:
    """Values after six steps; `way` is "own", "bare", "attached" or "given"."""
    with _accelerate():
        from accelerate import Accelerator, DeepSpeedPlugin

        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings(cell)))
        net = perceptron()
        params: Any = wdhook.param_groups(net, λ) if way == "own" else net.parameters()
        inner = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
        model, optimizer = accelerator.prepare(net, inner)
        decay = None
        if way in ("attached", "given"):
            given: Any = {"optimizer": optimizer} if way == "given" else {}
            decay = wdhook.attach(model, λ, mode="decoupled", at="step", **given)
        generator = torch.Generator().manual_seed(10 + dist.get_rank())
        for _ in range(6 * cell.micro):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, torch.randn(4, 4, generator=generator)))
                optimizer.step()
                optimizer.zero_grad()
        values = _values(net)
        if decay is not None:
            assert "steps=6" in repr(decay)
            decay.remove()
        model.destroy()
        return values


def compare_accelerate(cell: Cell) -> None:
    """Raise unless the decay is the engine's own, whether accelerate's wrapper is given or not."""
    own = _accelerated(cell, "own")
    assert _same(own, _accelerated(cell, "attached"))
    assert _same(own, _accelerated(cell, "given"))
    assert not _same(own, _accelerated(cell, "bare"))


# The Trainer -------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, x)}


def _trained(cell: Cell, folder: str, callback: Any, own: bool) -> list[Tensor]:
    with _accelerate():
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=cell.micro,
            max_steps=4,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=λ if own else 0.0,
            max_grad_norm=0.0,
            deepspeed=settings(cell),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            optim="adamw_torch",
        )
        torch.manual_seed(1)
        data = [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(64)]
        model = _Net()
        decayed = {id(p) for p in weights(model)}

        class Planned(Trainer):  # type: ignore[misc]
            def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
                return [name for name, p in model.named_parameters() if id(p) in decayed]

        trainer = Planned(
            model=model,
            args=arguments,
            train_dataset=data,
            callbacks=[] if callback is None else [callback],
        )
        try:
            trainer.train()
            return _values(model)
        finally:
            if callback is not None:
                callback.remove()
            if trainer.model_wrapped is not model:
                trainer.model_wrapped.destroy()


def compare_trainer(cell: Cell, folder: str) -> str:
    """Raise unless the callback decays as the Trainer does; the error of the callback with its
    defaults."""
    from wdhook.integrations.transformers import WeightDecayCallback

    own = _trained(cell, folder, None, own=True)
    step = WeightDecayCallback(λ, mode="decoupled", at="step")
    assert _same(own, _trained(cell, folder, step, own=False))
    assert not _same(own, _trained(cell, folder, None, own=False))
    try:
        _trained(cell, folder, WeightDecayCallback(λ), own=False)
    except wdhook.MasterWeightsError as error:
        return str(error)
    return "nothing"
