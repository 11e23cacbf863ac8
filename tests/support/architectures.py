"""Real architectures on the meta device: their shapes and names without their numbers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

TORCH: dict[str, Callable[[], nn.Module]] = {
    "LSTM_proj": lambda: nn.LSTM(8, 16, 1, proj_size=4),
    "GRU": lambda: nn.GRU(8, 16, 2),
    "MHA": lambda: nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True),
    "MHA_kdim": lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=10, batch_first=True),
    "Transformer": lambda: nn.Transformer(16, 4, 2, 2, 32, batch_first=True),
    "Bilinear": lambda: nn.Bilinear(8, 6, 5),
    "EmbeddingBag": lambda: nn.EmbeddingBag(10, 8),
    "AdaptiveLogSoftmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 40, [10, 20]),
    "layernorm_3d": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 16, 16])),
    "weight_norm_param": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 16)),
        parametrizations.weight_norm(nn.Linear(16, 4), dim=1),
    ),
}


def build(library: str, name: str) -> nn.Module:
    """The architecture of that name; skips the test where its library, or its name, is absent."""
    try:
        return make(library, name)
    except UnknownNameError:
        pytest.skip(f"this version of {library} has no {name}")


def make(library: str, name: str) -> nn.Module:
    """The architecture of that name; skips the test where its library is absent."""
    if library != "torch":
        pytest.importorskip(library, exc_type=ImportError)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return BUILDERS[library](name)


class UnknownNameError(LookupError):
    """The installed version does not have that architecture."""


def _torch(name: str) -> nn.Module:
    return TORCH[name]()


def _torchvision(name: str) -> nn.Module:
    import torchvision

    if name not in torchvision.models.list_models():
        raise UnknownNameError(name)
    takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    options: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in takes}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": True}
    if name.startswith(("deeplab", "fcn")):
        options |= {"aux_loss": True}
    model: nn.Module = torchvision.models.get_model(name, **options)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UnknownNameError(name)
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _transformers(name: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None or type(kind).__name__ == "DummyObject":
        raise UnknownNameError(name)
    config = kind.config_class()
    config._attn_implementation = "eager"
    model: nn.Module = kind(config)
    return model


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
