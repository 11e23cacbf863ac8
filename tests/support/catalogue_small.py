"""Packages with a few optimizers each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from catalogue import Build, Case, Package, each, listed, optimizers_in
from catalogue_loops import LR, Group, around, closure, graph, matrices, trained
from catalogue_pytorch_optimizer import ESTIMATED, IN_BACKWARD, TRAINED, whole_model

LOW_RANK = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
NEEDS_CUDA = "" if torch.cuda.is_available() else "needs CUDA"


def corrected(group: Group) -> Any:
    """Adam's bias correction, in the step of Prodigy and D-Adaptation."""
    beta1, beta2 = group["betas"]
    count = group["k"] + 1
    return group["lr"] * group["d"] * ((1 - beta2**count) ** 0.5 / (1 - beta1**count))


CORRECTED = {**ESTIMATED, "use_bias_correction": True, "lr_of": corrected}


def around_sgd(kind: Any) -> Build:
    """Keeps its own entries in the state of the inner optimizer, unexpected by AdamW."""
    return lambda model, groups: kind(torch.optim.SGD(groups, lr=LR))


def schedulefree() -> list[Case]:
    import schedulefree

    kinds = optimizers_in(schedulefree)
    cases = listed(
        "schedulefree",
        kinds,
        {n: {"loop": closure} if n.endswith("Closure") else TRAINED for n in kinds},
    )
    for name in ("ScheduleFreeWrapper", "ScheduleFreeWrapperReference"):
        cases.append(
            Case(
                "schedulefree",
                name,
                around_sgd(getattr(schedulefree, name)),
                trained(around("base")),
            )
        )
    return cases


def dadaptation() -> list[Case]:
    import dadaptation

    special = {
        **each("DAdaptAdam DAdaptAdan DAdaptLion", ESTIMATED),
        **each("DAdaptAdaGrad DAdaptSGD", {"d0": 0.01, "lr": 1.0}),
        "DAdaptAdam decouple": {**ESTIMATED, "decouple": True},
        "DAdaptAdam use_bias_correction": CORRECTED,
        "DAdaptAdan no_prox": {**ESTIMATED, "no_prox": True},
    }
    return listed("dadaptation", optimizers_in(dadaptation), special)


def lion_pytorch() -> list[Case]:
    import lion_pytorch
    from lion_pytorch import cautious_lion, foreach

    kinds = {
        **optimizers_in(lion_pytorch),
        "cautious_lion.Lion": cautious_lion.Lion,
        "foreach.Lion": foreach.Lion,
    }
    return listed(
        "lion-pytorch", kinds, {"Lion decoupled_weight_decay": {"decoupled_weight_decay": True}}
    )


def optimi() -> list[Case]:
    import optimi

    special = {
        "AdamW decouple_lr": {"decouple_lr": True},
        "AdamW foreach": {"foreach": True},
        "Adam decouple_wd": {"decouple_wd": True},
        "SGD decouple_wd": {"decouple_wd": True, "momentum": 0.9},
        "SGD": {"momentum": 0.9},
    }
    kinds = optimizers_in(optimi)
    return listed(
        "torch-optimi",
        kinds,
        {n: {"triton": False, **special.get(n, {})} for n in (*kinds, *special)},
    )


def torch_optimizer() -> list[Case]:
    import torch_optimizer

    kinds = optimizers_in(torch_optimizer, "pytorch_ranger")
    special = {
        "Adahessian": {"loop": graph},
        "Lookahead": {
            "build": lambda m, groups: torch_optimizer.Lookahead(
                torch.optim.AdamW(groups, lr=LR, weight_decay=0.0), k=2
            ),
            "loop": around("optimizer"),
        },
    }
    return listed("torch-optimizer", kinds, special)


def galore_torch() -> list[Case]:
    import galore_torch

    special = {
        "GaLoreAdafactor": {"weight": LOW_RANK, "relative_step": False, "scale_parameter": False},
        "GaLoreAdamW": {"weight": LOW_RANK, "no_deprecation_warning": True},
        "GaLoreAdamW8bit": {"weight": LOW_RANK, "cannot": NEEDS_CUDA},
    }
    return listed("galore-torch", optimizers_in(galore_torch), special)


def bitsandbytes() -> list[Case]:
    import bitsandbytes

    kinds = optimizers_in(bitsandbytes.optim)
    special: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    for name, how in special.items():
        if name.endswith("8bit"):
            how["min_8bit_size"] = 1
        if "SGD" in name or "LARS" in name:
            how["momentum"] = 0.9
        if name.endswith("AdEMAMix32bit") and NEEDS_CUDA:
            how["cannot"] = "fails on the CPU (a shape that does not fit, in its own kernel)"
    return listed("bitsandbytes", kinds, special)


def lomo_optim() -> list[Case]:
    import lomo_optim

    special = {
        "Lomo": {"build": whole_model(lomo_optim.Lomo), "model": matrices, **IN_BACKWARD},
        "AdaLomo": {
            "build": whole_model(lomo_optim.AdaLomo, loss_scale=0),
            "cannot": NEEDS_CUDA,
            **IN_BACKWARD,
        },
    }
    return listed("lomo-optim", optimizers_in(lomo_optim), special)


def simple(package: str, module: str, special: dict[str, dict[str, Any]] | None = None) -> Package:
    """A package whose optimizers are all in one module."""

    def cases() -> list[Case]:
        return listed(package, optimizers_in(importlib.import_module(module)), special or {})

    return Package(package, module.split(".")[0], cases)


def package(name: str, cases: Callable[[], list[Case]]) -> Package:
    return Package(name, cases.__name__, cases)


PACKAGES = [
    simple("adan-pytorch", "adan_pytorch"),
    simple("came-pytorch", "came_pytorch.CAME"),
    simple("grokadamw", "grokadamw"),
    simple(
        "prodigyopt", "prodigyopt", {"Prodigy": ESTIMATED, "Prodigy use_bias_correction": CORRECTED}
    ),
    package("bitsandbytes", bitsandbytes),
    package("dadaptation", dadaptation),
    package("galore-torch", galore_torch),
    package("lion-pytorch", lion_pytorch),
    package("lomo-optim", lomo_optim),
    package("schedulefree", schedulefree),
    package("torch-optimi", optimi),
    package("torch-optimizer", torch_optimizer),
]
