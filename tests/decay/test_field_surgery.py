"""A decision belongs to a tensor, whatever surgery calls it afterwards: one situation a test."""

from __future__ import annotations

from typing import Any

import pytest
from field import DECAY, RIGHT, chain, check, dyadic, everywhere, pull, sgd, train_step
from torch import nn


@everywhere
@pytest.mark.parametrize("change", ["delete", "insert"])
def test_the_layers_of_a_sequential_get_other_numbers(mode: str, at: str, change: str) -> None:
    """A layer without parameters is deleted from a Sequential, or inserted, and the optimizer is
    made anew.

    Then `2.weight` is another parameter than before. The decisions go with the parameters:
    LayerNorm stays exempt, both linear layers are decayed. (Docs: "what attach decided stays
    decided", "by its role".)
    """

    def loop(decay: Any) -> Any:
        layers = [nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)]
        model = chain(*([nn.Dropout(0.0), *layers] if change == "delete" else layers))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for step in range(3):
            if step == 1:
                if change == "delete":
                    del model[0]
                else:
                    model.insert(0, nn.Dropout(0.0))
                optimizer = sgd(model.parameters())
            train_step(decay, model, optimizer)
            yield model

    check(loop, RIGHT)


@everywhere
@pytest.mark.parametrize("change", ["linear to norm", "norm to linear"])
def test_a_head_is_replaced_by_one_of_another_role(mode: str, at: str, change: str) -> None:
    """`model["head"]` becomes a LayerNorm where it was Linear, or the other way round; the
    optimizer is made anew.

    Docs: "a head is added or replaced: from its first step on, by its role".
    """

    def loop(decay: Any) -> Any:
        kinds = [nn.Linear(2, 2), nn.LayerNorm(2)]
        old, new = kinds if change == "linear to norm" else reversed(kinds)
        model = dyadic(nn.ModuleDict({"body": nn.Linear(2, 2), "head": old}))
        dyadic(new)
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for step in range(3):
            if step == 1:
                model["head"] = new
                optimizer = sgd(model.parameters())
                decay.weights = [p for p in model.parameters() if p.ndim > 1]
            train_step(decay, model, optimizer)
            yield model

    check(loop, RIGHT)


@everywhere
@pytest.mark.parametrize("optimizer_is", ["new", "extended"])
def test_a_sub_module_is_called_module(mode: str, at: str, optimizer_is: str) -> None:
    """A block that is added later is called "module": `module.proj.weight` is not `proj.weight`.
    Both are decayed.
    """

    def loop(decay: Any) -> Any:
        model = dyadic(nn.ModuleDict({"proj": nn.Linear(2, 2)}))
        optimizer = sgd(model.parameters())
        decay.attach(model, mode=mode, at=at, optimizer=optimizer)
        yield model
        for step in range(3):
            if step == 1:
                model["module"] = dyadic(nn.ModuleDict({"proj": nn.Linear(2, 2)}))
                if optimizer_is == "new":
                    optimizer = sgd(model.parameters())
                else:
                    optimizer.add_param_group({"params": list(model["module"].parameters())})
                decay.weights = [p for p in model.parameters() if p.ndim > 1]
            train_step(decay, model, optimizer)
            yield model

    check(loop, RIGHT)


class LowRank(nn.Module):
    """A hand-made LoRA: the layer goes on inside, under another name."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.linear = inside
        self.down = nn.Linear(2, 1, bias=False)


@everywhere
def test_an_exempt_layer_and_one_with_its_own_λ_are_wrapped(mode: str, at: str) -> None:
    """Two layers with overrides (λ = 0, and an absolute λ) are wrapped by a module of the user, and
    get other names.

    pytorch/pytorch#98568 (fusing renames), hand-made LoRA. "What attach decided stays decided": the
    first is never decayed, the second with its own λ; the new adapters are weights like others.
    """

    def loop(decay: Any) -> Any:
        model = chain(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = sgd(model.parameters())
        _, second, third = (layer.weight for layer in model)
        more = {} if decay.by_hand else {"overrides": {"0.weight": 0.0, "1.weight": DECAY / 2}}
        decay.attach(model, mode=mode, at=at, optimizer=optimizer, weights=[third], **more)
        yield model
        for step in range(3):
            if step == 1:
                model[0], model[1] = LowRank(model[0]), LowRank(model[1])
                dyadic(model[0].down), dyadic(model[1].down)
                optimizer = sgd(model.parameters())
                decay.weights = [third, model[0].down.weight, model[1].down.weight]
            optimizer.zero_grad()
            pull(model).backward()
            decay.now()
            decay.now(weight_decay=DECAY / 2, only=[second])
            optimizer.step()
            yield model

    check(loop, RIGHT)
