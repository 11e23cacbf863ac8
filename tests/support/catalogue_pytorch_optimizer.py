"""pytorch_optimizer: its registry, and the wrappers that it exports besides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from catalogue import Build, Case, Package, each, listed, optimizers_in
from catalogue_loops import (
    LR,
    Group,
    Hand,
    around,
    closure,
    evaluation,
    fused,
    gradients_first,
    graph,
    loss_of,
    matrices,
    one_pass,
    trained,
    two_passes,
)
from torch import Tensor, nn

NAME = "pytorch_optimizer"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def whole_model(kind: Any, **given: Any) -> Build:
    """For classes that take the model; their own decay is one number for all of it."""

    def build(model: nn.Module, groups: list[Group]) -> Any:
        own = {"weight_decay": groups[0]["weight_decay"]} if groups[0]["weight_decay"] else {}
        return kind(model, lr=LR, **{**given, **own})

    return build


def wrapping(kind: Any, **given: Any) -> Build:
    """Around torch's AdamW."""
    return lambda model, groups: kind(torch.optim.AdamW(groups, lr=LR, weight_decay=0.0), **given)


def with_base(kind: Any, **given: Any) -> Build:
    """Constructs the AdamW that it is around."""
    return lambda model, groups: kind(groups, torch.optim.AdamW, lr=LR, weight_decay=0.0, **given)


def gsam(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    evaluate = evaluation(model, optimizer.base_optimizer, batch, hand)
    optimizer.step(lambda: (None, evaluate()))


def pcgrad(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """Two objectives, and a gradient made of theirs."""
    optimizer.zero_grad()
    optimizer.pc_backward([loss_of(model, batch[:4]), loss_of(model, batch[4:])])
    optimizer.step()


def safe_fp16(model: nn.Module, optimizer: Any, batch: Tensor, hand: Hand) -> None:
    """It scales the loss by a number of its own, and steps copies in float32."""
    optimizer.zero_grad()
    optimizer.backward(loss_of(model, batch.half()))
    if hand.mode == "coupled at backward":
        for p in hand.weights:
            p.grad.add_(p.detach(), alpha=optimizer.scaler.loss_scale * 0.1)
    optimizer.clip_main_grads(1e6)
    optimizer.step()


class Scaler:
    """What `attach` wants of a scaler, for an optimizer that scales the loss itself."""

    def __init__(self, optimizer: Any) -> None:
        self.scaler = optimizer.scaler

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.scaler.loss_scale

    def is_enabled(self) -> bool:
        return True


class Constant:
    """A schedule of GSAM's radius."""

    def step(self) -> float:
        return 0.05


MUON = {"weight": {"use_muon": True}, "rest": {"use_muon": False}}
LOW_RANK = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}
ESTIMATED = {"lr": 1.0, "d0": 0.01, "lr_of": lambda group: group["lr"] * group["d"]}
IN_BACKWARD = {
    "loop": fused,
    "attach": lambda optimizer, mode: {
        "optimizer": optimizer,
        **({"lr": lambda group: optimizer.lr} if mode == "decoupled" else {}),
    },
}
SAM = {"loop": around("base_optimizer", two_passes)}
INSIDE = {"loop": around("optimizer")}
TRAINED = {"loop": trained()}


def special() -> dict[str, dict[str, Any]]:
    import pytorch_optimizer as po

    def gsam_around_adamw(model: nn.Module, groups: list[Group]) -> Any:
        base = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)
        return po.GSAM(model.parameters(), base, model, Constant())

    def wsam_around_adamw(model: nn.Module, groups: list[Group]) -> Any:
        return po.WSAM(model, groups, torch.optim.AdamW, lr=LR, weight_decay=0.0)

    return {
        **each("AdaGO AdaMuon Muon MuonClip NorMuon", MUON),
        **each("DAdaptAdam DAdaptAdan DAdaptLion Prodigy", ESTIMATED),
        **each("DAdaptAdaGrad DAdaptSGD", {"d0": 0.01, "lr": 1.0}),
        **each("Fira GaLore", {"weight": LOW_RANK}),
        **each("LoRARite SpectralSphere", {"model": matrices}),
        **each("RAdam Ranger", {"degenerated_to_sgd": True}),
        **each("ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD", TRAINED),
        **{
            name: {"build": wrapping(getattr(po, name)), **INSIDE}
            for name in ("Magma", "OrthoGrad")
        },
        **{name: {"build": with_base(getattr(po, name)), **SAM} for name in ("FriendlySAM", "SAM")},
        "AdaHessian": {"loop": graph},
        "AdaLOMO": {
            "build": whole_model(po.AdaLOMO, loss_scale=0.0),
            "model": matrices,
            **IN_BACKWARD,
        },
        "AdaShift": {"keep_num": 2},
        "AdamMini": {"build": whole_model(po.AdamMini, weight_decay=0.0), "model": matrices},
        "AliG": {"max_lr": LR, "loop": closure},
        "BSAM": {"num_data": 8, "foreach": False, "loop": gradients_first},
        "DeMo": {"compression_chunk": 2, "surroundings": alone},
        "DistributedMuon": {**MUON, "surroundings": alone},
        "GSAM": {"build": gsam_around_adamw, "loop": around("base_optimizer", gsam)},
        "LBFGS": {
            "build": lambda m, groups: po.LBFGS(list(m.parameters()), lr=LR, max_iter=3),
            "loop": closure,
        },
        "LOMO": {"build": whole_model(po.LOMO), **IN_BACKWARD},
        "LookSAM": {"build": with_base(po.LookSAM, k=2), **SAM},
        "Lookahead": {"build": wrapping(po.Lookahead, k=2), **INSIDE},
        "PCGrad": {"build": wrapping(po.PCGrad), "loop": around("optimizer", pcgrad)},
        "Ranger21": {"num_iterations": 20},
        "SaRA": {"threshold": 1.0},
        "SafeFP16Optimizer": {
            "build": lambda m, groups: po.SafeFP16Optimizer(torch.optim.SGD(m.parameters(), lr=LR)),
            "loop": safe_fp16,
            "model": lambda: matrices().half(),
            "groups": lambda optimizer: [],
            "attach": lambda o, mode: (
                {"scaler": Scaler(o)} if mode == "coupled at backward" else {}
            ),
            "note": "needs `scaler=`: it scales the loss itself",
        },
        "ScheduleFreeWrapper": {
            "build": wrapping(po.ScheduleFreeWrapper),
            "loop": trained(around("optimizer")),
        },
        "SophiaH": {"loop": graph, "update_period": 2},
        "TRAC": {"build": wrapping(po.TRAC, s_prev=1.0, eps=0.1, betas=(0.0, 0.5)), **INSIDE},
        "WSAM": {"build": wsam_around_adamw, "loop": around("base_optimizer", one_pass)},
    }


def cases() -> list[Case]:
    import pytorch_optimizer as po
    from pytorch_optimizer.optimizer import OPTIMIZERS

    kinds = {kind.__name__: kind for kind in OPTIMIZERS.values()}
    return listed(NAME, {**kinds, **optimizers_in(po)}, special())


PACKAGES = [Package(NAME, "pytorch_optimizer", cases)]
