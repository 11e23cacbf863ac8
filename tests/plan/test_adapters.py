"""Adapters: LoRA by hand and by peft, attached before and after, merged; and a model of
transformers that grows.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from phases import MODES, Optimize, attached, in_phases, own, plain
from torch import nn
from twins import LR, assert_bit_equal, batches, perceptron, train, twins, λ

import wdhook

SGD = torch.optim.SGD
LAYERS = (0, 3, 5)  # the linear ones


class Adapted(nn.Module):
    """LoRA as peft writes it: x·W + x·A·B, with W kept as `base_layer`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merged(self) -> nn.Linear:
        """W + A·B, as one layer that can be trained again."""
        with torch.no_grad():
            self.base_layer.weight += self.lora_B["default"].weight @ self.lora_A["default"].weight
        return self.base_layer.requires_grad_(True)


def adapt(model: nn.Module) -> None:
    torch.manual_seed(7)
    for layer in LAYERS:
        model[layer] = Adapted(model[layer])


def merge(model: nn.Module) -> None:
    for layer in LAYERS:
        model[layer] = model[layer].merged()


def adapted_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices are decayed, biases and LayerNorm are not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim == 2], "weight_decay": λ},
        {"params": [p for p in params if p.ndim != 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@MODES
def test_adapters_and_their_merging(mode: str, at: str, when: str) -> None:
    """Attached before or after: adapters are decayed, the frozen base is not; merged, the base is
    again.
    """
    model, twin = twins(perceptron())
    changes = (adapt, merge) if when == "before" else (merge,)
    if when == "after":
        adapt(model)
        adapt(twin)
    with attached(model, mode, at):
        in_phases(model, changes, plain(mode))
    in_phases(twin, changes, own(mode, adapted_groups))
    assert_bit_equal(model.state_dict(), twin.state_dict())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.score = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.norm(self.v(self.q(x).tanh())))


def peft_model(base: nn.Module, dora: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    options = {
        "r": 2,
        "target_modules": ["q", "v"],
        "modules_to_save": ["score"],
        "init_lora_weights": False,
    }
    return peft.get_peft_model(base, peft.LoraConfig(use_dora=dora, **options))


PEFT_DECAYED = re.compile(
    r".*(lora_[AB]\.default|score\.modules_to_save\.default|\b[qv]|\bscore)\.weight"
)


def peft_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What is trained: matrices of weights decayed, biases, LayerNorm and magnitudes not."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if PEFT_DECAYED.fullmatch(n)]
    assert len(decayed) == (5 if any("lora" in n for n, _ in named) else 3)
    others = [p for n, p in named if not PEFT_DECAYED.fullmatch(n)]
    return [{"params": decayed, "weight_decay": λ}, {"params": others, "weight_decay": 0.0}]


@MODES
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when: str, dora: bool, mode: str, at: str) -> None:
    """Adapters and trained copies are decayed, magnitudes and frozen weights are not; merged, the
    weights are again.
    """

    def run(base: nn.Module, attach: Callable[[nn.Module], Any], optimize: Optimize) -> nn.Module:
        if when == "before":
            attach(base)
        model = peft_model(base, dora)
        if when == "after":
            attach(model)
        train(model, optimize(model), batches(model, 3))
        model = model.merge_and_unload().requires_grad_(True)
        train(model, optimize(model), batches(model, 3, seed=2))
        return model

    got = run(Classifier(), lambda m: attached(m, mode, at), plain(mode))
    expected = run(Classifier(), lambda m: None, own(mode, peft_groups))
    assert_bit_equal(got.state_dict(), expected.state_dict())


@pytest.mark.parametrize("at", ["backward", "step"])
def test_exemptions_under_peft(at: str) -> None:
    """What was exempt, or had a λ of its own, keeps it under the names that peft gives it, and
    afterwards.
    """
    base = Classifier()
    with wdhook.attach(base, λ, at=at, overrides={"q.weight": 0.0, "score.weight": 0.25}) as handle:
        model = peft_model(base, dora=False)
        train(model, SGD(model.parameters(), lr=LR), batches(model, 2))
        λs = {name: decision.weight_decay for name, decision in handle.plan.items()}
        assert λs["q.base_layer.weight"] == 0.0
        assert λs["score.modules_to_save.default.weight"] == 0.25
        assert λs["q.lora_A.default.weight"] == λs["v.lora_B.default.weight"] == λ
        merged = model.merge_and_unload().requires_grad_(True)
        merged.zero_grad()
        before = merged.q.weight.detach().clone()
        merged.q.weight.grad = torch.zeros_like(before)
        SGD(merged.parameters(), lr=LR).step()
        assert torch.equal(merged.q.weight, before)


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_peft_model_that_died_and_a_head_that_came_later(at: str) -> None:
    """Attached to the wrapper, thrown away after merging: the model inside is decayed still, new
    head and all.
    """
    model = peft_model(Classifier(), dora=False)
    wdhook.attach(model, λ, mode="decoupled", at=at, lr=LR)
    model = model.merge_and_unload().requires_grad_(True)
    gc.collect()
    model.score = nn.Linear(4, 3)
    before = {
        n: p.detach().clone() for n, p in model.named_parameters() if PEFT_DECAYED.fullmatch(n)
    }
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    SGD(model.parameters(), lr=LR).step()
    assert list(before) == ["q.weight", "v.weight", "score.weight"]
    assert_bit_equal(
        {n: model.get_parameter(n).detach() for n in before},
        {n: p * (1 - LR * λ) for n, p in before.items()},
    )


@pytest.mark.parametrize("at", ["backward", "step"])
def test_resize_token_embeddings(at: str) -> None:
    """transformers replaces the table (and the head tied to it) by a larger one, which has the old
    one's role.
    """
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=6, **sizes))
    with wdhook.attach(model, λ, mode="decoupled", at=at, lr=LR) as handle:
        for size in (6, 9):
            model.resize_token_embeddings(size)
            table = model.transformer.wte.weight
            before = table.detach().clone()
            table.grad = torch.zeros_like(table)
            SGD(model.parameters(), lr=LR).step()
            assert table.shape == (size, 4)
            assert torch.equal(table, before * (1 - LR * λ))
            table.grad = None
        assert handle.plan["transformer.wte.weight"].role == "embedding"
