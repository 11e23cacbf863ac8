"""heavyball: what it exports."""

from __future__ import annotations

from typing import Any

from catalogue import Case, Package, listed, optimizers_in
from catalogue_loops import LR, Group, closure
from torch import nn


def one_list(kind: Any) -> Any:
    """For a class that takes parameters, and no groups: its own decay is one number for all."""
    return lambda model, groups: kind(
        list(model.parameters()), lr=LR, weight_decay=groups[0]["weight_decay"]
    )


def cases() -> list[Case]:
    import heavyball
    import heavyball.utils

    heavyball.utils.compile_mode = None  # compiling a step takes longer than all of them

    def sam(model: nn.Module, groups: list[Group]) -> Any:
        return heavyball.SAMWrapper(model.parameters(), heavyball.AdamW(groups, lr=LR))

    def split(model: nn.Module, groups: list[Group]) -> Any:
        return heavyball.SplitOpt(
            [{**group, "optimizer": heavyball.AdamW, "lr": LR} for group in groups]
        )

    kinds = {
        name: kind for name, kind in optimizers_in(heavyball).items() if name in heavyball.__all__
    }
    special: dict[str, dict[str, Any]] = {
        "PSGDLRA": {"build": one_list(heavyball.PSGDLRA)},
        "SAMWrapper": {
            "build": sam,
            "loop": closure,
            "groups": lambda o: o.wrapped_optimizer.param_groups,
        },
        "SplitOpt": {
            "build": split,
            "groups": lambda o: [g for inside in o.optimizers for g in inside.param_groups],
        },
    }
    return listed("heavyball", kinds, special)


PACKAGES = [Package("heavyball", "heavyball", cases)]
