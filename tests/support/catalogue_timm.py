"""timm.optim: its registry."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import Case, Package, by_signature
from catalogue_loops import LR, graph

ELSEWHERE = {
    "fused": "of apex, which is not installed",
    "bnb": "of bitsandbytes, which timm wants CUDA for",
}


def cases() -> list[Case]:
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    found = []
    for name in list_optimizers():
        elsewhere = next((why for start, why in ELSEWHERE.items() if name.startswith(start)), "")
        if elsewhere and not torch.cuda.is_available():
            found.append(Case("timm", name, lambda model, groups: None, cannot=elsewhere))
            continue
        given: dict[str, Any] = {"momentum": 0.9} if get_optimizer_info(name).has_momentum else {}
        build = by_signature(get_optimizer_class(name, bind_defaults=True), lr=LR, **given)
        options: dict[str, Any] = {"loop": graph} if name == "adahessian" else {}
        found.append(Case("timm", name, build, **options))
    return found


PACKAGES = [Package("timm", "timm", cases)]
