"""torch.optim, and what frameworks put around an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import Case, Package, listed, optimizers_in
from catalogue_loops import LR, Group, around, closure, embeddings, layer_wise, matrices, sparse
from torch import nn


def torch_optim() -> list[Case]:
    kinds = optimizers_in(torch.optim)
    del kinds["Optimizer"]
    decoupled = {"decoupled_weight_decay": True}
    special: dict[str, dict[str, Any]] = {
        "LBFGS": {
            "build": lambda m, groups: torch.optim.LBFGS(list(m.parameters()), lr=LR, max_iter=3),
            "loop": closure,
        },
        "Muon": {"model": matrices},
        "NAdam decoupled": decoupled,
        "RAdam decoupled": decoupled,
        "SparseAdam": {
            "build": lambda m, groups: torch.optim.SparseAdam(list(m.parameters()), lr=LR),
            "loop": sparse,
            "model": embeddings,
        },
    }
    return listed(
        "torch", kinds, {name: how for name, how in special.items() if name.split()[0] in kinds}
    )


def transformers() -> list[Case]:
    from transformers.optimization import Adafactor
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    def each(model: nn.Module, groups: list[Group]) -> Any:
        every = {
            p: torch.optim.AdamW([p], lr=LR, weight_decay=g["weight_decay"])
            for g in groups
            for p in g["params"]
        }
        return LayerWiseDummyOptimizer(optimizer_dict=every, lr=LR)

    special: dict[str, dict[str, Any]] = {
        "Adafactor": {"relative_step": False, "scale_parameter": False},
        "Adafactor relative_step": {"lr": None, "relative_step": True},
        "Adafactor scale_parameter": {"relative_step": False, "scale_parameter": True},
        "LayerWiseDummyOptimizer": {
            "build": each,
            "loop": layer_wise,
            "groups": lambda o: [
                group for inside in o.optimizer_dict.values() for group in inside.param_groups
            ],
        },
    }
    kinds: dict[str, type] = {
        "Adafactor": Adafactor,
        "LayerWiseDummyOptimizer": LayerWiseDummyOptimizer,
    }
    return listed("transformers", kinds, special)


def accelerate() -> list[Case]:
    from accelerate import Accelerator

    def build(model: nn.Module, groups: list[Group]) -> Any:
        return Accelerator(cpu=True).prepare(torch.optim.AdamW(groups, lr=LR, weight_decay=0.0))

    return [Case("accelerate", "AcceleratedOptimizer", build, around("optimizer"))]


def lightning() -> list[Case]:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    class Strategy:
        """The part of Lightning's that calls the optimizer."""

        def optimizer_step(self, optimizer: Any, closure: Any, **kwargs: Any) -> Any:
            return optimizer.step(closure=closure, **kwargs)

    def build(model: nn.Module, groups: list[Group]) -> Any:
        wrapped = LightningOptimizer(torch.optim.AdamW(groups, lr=LR, weight_decay=0.0))
        wrapped._strategy = Strategy()
        return wrapped

    inside = {"groups": lambda optimizer: optimizer.optimizer.param_groups}
    return [
        Case("lightning", "LightningOptimizer, automatic", build, closure, **inside),
        Case("lightning", "LightningOptimizer, manual", build, around("optimizer")),
    ]


PACKAGES = [
    Package("torch", "torch", torch_optim),
    Package("accelerate", "accelerate", accelerate),
    Package("lightning", "lightning", lightning),
    Package("transformers", "transformers", transformers),
]
