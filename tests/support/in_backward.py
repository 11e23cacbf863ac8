"""Ways to step inside the backward pass, as each gradient comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from twins import LR, own_groups, weights, λ


class Running(NamedTuple):
    """What a regime has set up on a model."""

    optimizers: list[Any]
    backward: Callable[[Tensor], None]
    group_of: Callable[
        [Tensor], Mapping[str, Any]
    ]  # the param group of a parameter, whose lr is used


Install = Callable[[nn.Module, float], Running]  # model, λ of the optimizer's own decay


def backward(loss: Tensor) -> None:
    loss.backward()


def in_hooks(each: dict[Tensor, Any], after: Callable[[Tensor], None] = lambda p: None) -> Running:
    """As in torchtune and in GaLore's README: a hook steps the optimizer of its parameter."""

    def hook(p: Tensor) -> None:
        each[p].step()
        each[p].zero_grad()
        after(p)

    for p in each:
        p.register_post_accumulate_grad_hook(hook)
    return Running(list(each.values()), backward, lambda p: each[p].param_groups[0])


def own(model: nn.Module, weight_decay: float) -> dict[Tensor, float]:
    """Parameter → λ of the optimizer's own decay."""
    return {p: g["weight_decay"] for g in own_groups(model, weight_decay) for p in g["params"]}


def torchtune(kind: Any, **arguments: Any) -> Install:
    def install(model: nn.Module, weight_decay: float) -> Running:
        return in_hooks(
            {
                p: kind([p], lr=LR, weight_decay=w, **arguments)
                for p, w in own(model, weight_decay).items()
            }
        )

    return install


def galore_layerwise(model: nn.Module, weight_decay: float) -> Running:
    """Low rank for the matrices, a schedule for each, and transformers' dummy optimizer."""
    kind = pytest.importorskip("galore_torch").GaLoreAdamW
    dummy = pytest.importorskip("transformers.trainer_pt_utils").LayerWiseDummyOptimizer(lr=LR)
    low_rank = {"rank": 2, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
    each = {
        p: kind(
            [{"params": [p], **(low_rank if p.ndim == 2 else {})}],
            lr=LR,
            weight_decay=w,
            no_deprecation_warning=True,
        )
        for p, w in own(model, weight_decay).items()
    }
    schedules = {p: torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for p, o in each.items()}
    running = in_hooks(each, lambda p: schedules[p].step())

    def then_the_dummy(loss: Tensor) -> None:
        loss.backward()
        dummy.step()

    return running._replace(backward=then_the_dummy)


def applied(kind: Any) -> Install:
    """torch's own helper, whose hook sits on the node of autograd that accumulates."""

    def install(model: nn.Module, weight_decay: float) -> Running:
        # Imported here: it is absent where torch was built without distributed.
        from torch.distributed.optim import (
            _apply_optimizer_in_backward,
            _get_in_backward_optimizers,
        )

        for p, w in own(model, weight_decay).items():
            _apply_optimizer_in_backward(kind, [p], {"lr": LR, "weight_decay": w})
        optimizers = _get_in_backward_optimizers(model)
        groups = {o.param_groups[0]["params"][0]: o.param_groups[0] for o in optimizers}
        return Running(optimizers, backward, groups.__getitem__)

    return install


def gradient_release(kind: str, **arguments: Any) -> Install:
    """optimi: one optimizer for all parameters, called in the hook of each."""

    def install(model: nn.Module, weight_decay: float) -> Running:
        optimi = pytest.importorskip("optimi")
        groups = own_groups(model, weight_decay)
        optimizer = getattr(optimi, kind)(
            groups, lr=LR, gradient_release=True, triton=False, **arguments
        )
        optimi.prepare_for_gradient_release(model, optimizer, ignore_existing_hooks=True)
        return Running([optimizer], backward, lambda p: optimizer.state[p]["group"])

    return install


def fused(package: str, kind: str, **arguments: Any) -> Install:
    """LOMO: no `step()` at all; the learning rate comes with each backward."""

    def install(model: nn.Module, weight_decay: float) -> Running:
        own_decay = {"weight_decay": weight_decay} if weight_decay else {}
        optimizer = getattr(pytest.importorskip(package), kind)(
            model, lr=1.0, **own_decay, **arguments
        )
        lr = iter([LR, LR / 2, LR / 4, LR / 8, LR / 16])
        return Running(
            [optimizer],
            lambda loss: optimizer.fused_backward(loss, next(lr)),
            lambda p: vars(optimizer),
        )

    return install


HEARD: dict[str, Install] = {
    "one SGD each": torchtune(torch.optim.SGD, momentum=0.9),
    "one AdamW each": torchtune(torch.optim.AdamW),
    "SGD applied": applied(torch.optim.SGD),
    "AdamW applied": applied(torch.optim.AdamW),
    "optimi SGD": gradient_release("SGD", momentum=0.9),
    "optimi Adam": gradient_release("Adam"),
    "optimi AdamW": gradient_release("AdamW"),
    "GaLore": galore_layerwise,
}
UNHEARD: dict[str, Install] = {
    "Lomo": fused("lomo_optim", "Lomo"),
    "LOMO": fused("pytorch_optimizer", "LOMO"),
    "AdaLOMO": fused("pytorch_optimizer", "AdaLOMO", loss_scale=0.0),
}
REGIMES = HEARD | UNHEARD


def by_hand(model: nn.Module, install: Install, mode: str, scale: float = 1.0) -> Running:
    """The regime, behind hooks that decay by hand."""
    running: list[Running] = []

    def hook(p: Tensor) -> None:
        if mode == "coupled":
            p.grad.add_(p, alpha=scale * λ)
        else:
            p.mul_(1 - running[0].group_of(p)["lr"] * λ)

    for weight in weights(model) if mode != "none" else ():
        weight.register_post_accumulate_grad_hook(hook)
    running.append(install(model, 0.0))
    return running[0]
