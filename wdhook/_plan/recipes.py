"""The rules of known projects, so that their results can be reproduced. wdhook's own is `classify`.

Each rule says what its project would do with a bare model, frozen parameters included. Where a
project decays everything unless it is configured, the rule is the configuration that its own users
train with.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .._base.validate import check_choice

Recipe = Literal[
    "forum",
    "timm",
    "huggingface",
    "nanogpt",
    "detectron2",
    "mmengine",
    "megatron",
    "fastai",
    "swin",
]
"""Names of the rules that can be followed."""

Rule = Callable[[nn.Module], Iterable[tuple[str, str | None]]]
"""Model → (parameter name, why it is exempt or None) for every parameter."""


def follow(model: nn.Module, recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """Parameter name → (decayed?, reason) by the rule of a known project.

    Torch's own wrappers are looked through, as the projects build their optimizer before they wrap.

    Raises:
        ArgumentError: there is no recipe of that name.
    """
    check_choice("recipe", recipe, RECIPES)
    rule = RECIPES[recipe]
    bare = _unwrapped(model)
    outer = {parameter: name for name, parameter in model.named_parameters()}
    inner = dict(bare.named_parameters())
    return {
        outer[inner[name]]: (why is None, f"recipe {recipe}: {why or 'no exception for it'}")
        for name, why in rule(bare)
    }


# ------------------------------------------------------------------------------------------ by name


def _forum(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """The rule of the PyTorch forum's thread 16994, "Weight decay in the optimizers is a bad idea".

    Everything is decayed but what a BatchNorm owns and what has "bias" anywhere in its full name;
    LayerNorm is decayed. The thread holds several snippets, and people copy this rule under many
    names; its other one, "one-dimensional tensors", has become timm's.
    """
    for seat in _seats(model):
        batch_norm = "owner is a BatchNorm" if isinstance(seat.owner, _BatchNorm) else None
        yield seat.name, batch_norm or ("bias in the name" if "bias" in seat.name else None)


def _timm(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """timm 1.0.31: `timm.optim.create_optimizer_v2(model)`, which calls
    `param_groups_weight_decay`.

    Exempt are tensors of at most one dimension, names that end with ".bias", and what the model's
    own `no_weight_decay()` lists (globs allowed); the lists of its sub-modules are not asked.
    """
    listed = _listed_by(model, "no_weight_decay")
    for name, parameter in model.named_parameters():
        matched = any(fnmatch.fnmatch(name, pattern) for pattern in listed)
        short = _dims(parameter) if parameter.ndim <= 1 else None
        yield (
            name,
            short or _ends_with_bias(name) or ("listed by no_weight_decay()" if matched else None),
        )


def _swin(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Swin Transformer: `set_weight_decay` in optimizer.py of microsoft/Swin-Transformer (commit
    f82860b).

    As timm, with exact names in `no_weight_decay()`, with the substrings of the model's
    `no_weight_decay_keywords()`, and with scalars decayed.
    """
    listed = _listed_by(model, "no_weight_decay")
    keywords = _listed_by(model, "no_weight_decay_keywords")
    for name, parameter in model.named_parameters():
        matched = "listed by no_weight_decay()" if name in listed else None
        keyword = next((f"keyword {word!r}" for word in keywords if word in name), None)
        yield name, _one_dim(parameter) or _ends_with_bias(name) or matched or keyword


def _nanogpt(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """nanoGPT: `GPT.configure_optimizers` in karpathy/nanoGPT: two dimensions or more."""
    for name, parameter in model.named_parameters():
        yield name, _dims(parameter) if parameter.ndim < 2 else None


def _megatron(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Megatron-LM: `get_standard_config_overrides` in megatron/core/optimizer (commit 0044db1).

    Exempt (`wd_mult=0`) are one-dimensional tensors and names that match "*.bias". This is the
    default, `apply_wd_to_qk_layernorm=False`.
    """
    for name, parameter in model.named_parameters():
        yield name, _one_dim(parameter) or _ends_with_bias(name)


_HF_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")


def _huggingface(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """transformers 5.23: `Trainer.get_decay_parameter_names`, also what `Trainer` itself optimizes
    by.

    Exempt is what lies in an `nn.LayerNorm` below the root, and every name with "bias",
    "layernorm", "rmsnorm" or a component that is, or ends with, "norm".
    """
    layer_norms = {
        path for path, module in model.named_modules() if path and isinstance(module, nn.LayerNorm)
    }
    for name, _ in model.named_parameters():
        found = _HF_NAMES.search(name.lower())
        inside = "in nn.LayerNorm" if not layer_norms.isdisjoint(_paths_above(name)) else None
        yield name, inside or (f"{found[0].strip('.')!r} in the name" if found else None)


# ----------------------------------------------------------------------------------------- by the o

_DETECTRON2_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def _detectron2(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """detectron2: `get_default_optimizer_params` in detectron2/solver/build.py (commit 02b5c4e).

    With the values that its configuration starts from: `SOLVER.WEIGHT_DECAY_NORM = 0.0`, and
    `SOLVER.WEIGHT_DECAY_BIAS = None`, so that biases are decayed. Its own sub-classes of these
    norms (NaiveSyncBatchNorm) are exempt, FrozenBatchNorm2d has no parameters.
    """
    for seat in _seats(model):
        yield seat.name, _owned_by(seat.owner, _DETECTRON2_NORMS)


_MMENGINE_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def _mmengine(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """mmengine 0.10.7: `DefaultOptimWrapperConstructor`, which decays all that `paramwise_cfg`
    leaves alone.

    With `paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0., bypass_duplicate=True)`, as in
    the configurations of mmpretrain and mmdetection that spare norms and biases. The biases of the
    offset layers of mmcv's deformable convolutions are decayed, as there.
    """
    offsets = {
        child
        for module in model.modules()
        if _is_mmcv_deformable(module)
        for child in module.children()
    }
    for seat in _seats(model):
        bias = "a bias" if seat.local == "bias" and seat.owner not in offsets else None
        yield seat.name, _owned_by(seat.owner, _MMENGINE_NORMS) or bias


def _is_mmcv_deformable(module: nn.Module) -> bool:
    return any(
        base.__name__ in ("DeformConv2d", "ModulatedDeformConv2d")
        and base.__module__.startswith("mmcv.")
        for base in type(module).__mro__
    )


_FASTAI_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
)


def _fastai(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """fastai 2.8.12: `Learner(wd_bn_bias=False)`, its default, by
    `fastai.torch_core.norm_bias_params`.

    Exempt is all that lies in a BatchNorm, InstanceNorm or LayerNorm, and every parameter that some
    module calls `bias`. GroupNorm, RMSNorm and SyncBatchNorm are decayed.
    """
    why: dict[torch.Tensor, str] = {}
    for module in model.modules():
        if isinstance(module, _FASTAI_NORMS):
            why.update(
                {parameter: f"in {_public_name(module)}" for parameter in module.parameters()}
            )
        elif "bias" in module._parameters and module._parameters["bias"] is not None:
            why.setdefault(module._parameters["bias"], "a bias")
    for name, parameter in model.named_parameters():
        yield name, why.get(parameter)


# --------------------------------------------------------------------------------------------------


class _Seat(NamedTuple):
    """A parameter and the first module that holds it, under the name that it has there."""

    name: str
    local: str
    owner: nn.Module


def _seats(model: nn.Module) -> Iterator[_Seat]:
    """One seat for each parameter, under the names and in the order of `named_parameters()`."""
    first: dict[torch.Tensor, tuple[str, nn.Module]] = {}
    for module in model.modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                first.setdefault(parameter, (local, module))
    for name, parameter in model.named_parameters():
        yield _Seat(name, *first[parameter])


_WRAPPED = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, torch.compile and the like."""
    while type(model).__module__.startswith("torch."):
        inner = [child for name, child in model.named_children() if name in _WRAPPED]
        if len(inner) != 1 or len(list(model.parameters())) != len(list(inner[0].parameters())):
            break
        model = inner[0]
    return model


def _listed_by(model: nn.Module, method: str) -> Collection[str]:
    """What the model's method of that name lists; nothing where it has none."""
    said = getattr(model, method, None)
    return tuple(said() or ()) if callable(said) else ()


def _paths_above(name: str) -> Iterator[str]:
    """The paths of the modules around a parameter: a.b and a for a.b.weight."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _owned_by(owner: nn.Module, types: tuple[type[nn.Module], ...]) -> str | None:
    return f"owner is {_public_name(owner)}" if isinstance(owner, types) else None


def _public_name(module: nn.Module) -> str:
    """The class of torch.nn that a module is: `nn.BatchNorm2d` also for a sub-class of it."""
    known = (
        base.__name__ for base in type(module).__mro__ if getattr(nn, base.__name__, None) is base
    )
    name = next(known, "Module")
    return type(module).__name__ if name == "Module" else f"nn.{name}"


def _dims(parameter: torch.Tensor) -> str:
    return f"{parameter.ndim}-D"


def _one_dim(parameter: torch.Tensor) -> str | None:
    return _dims(parameter) if parameter.ndim == 1 else None


def _ends_with_bias(name: str) -> str | None:
    return "named .bias" if name.endswith(".bias") else None


RECIPES: Mapping[str, Rule] = {
    "forum": _forum,
    "timm": _timm,
    "huggingface": _huggingface,
    "nanogpt": _nanogpt,
    "detectron2": _detectron2,
    "mmengine": _mmengine,
    "megatron": _megatron,
    "fastai": _fastai,
    "swin": _swin,
}
