"""Reads the type of an owner: torch's layers, their subclasses, torch's reparametrizations."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .evidence import shape_of
from .verdict import Verdict
from .vocabulary import Role

Types = tuple[type[nn.Module], ...]

_NORMS: Types = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS: Types = (nn.Embedding, nn.EmbeddingBag)
_SLOPES: Types = (nn.PReLU,)
_WEIGHTS: Types = (
    nn.Linear,
    _ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)

_WEIGHT_NAME = re.compile(
    r"(?:weight(?:_[ih]h|_hr)?|(?:in|q|k|v)_proj_weight)(?:_l\d+)?(?:_reverse)?(?:_orig|_raw|_v)?"
)
_BIAS_NAME = re.compile(
    r"(?:bias(?:_[ih]h|_k|_v)?|in_proj_bias)(?:_l\d+)?(?:_reverse)?(?:_orig|_raw)?"
)


def class_name(owner: nn.Module) -> str:
    """The class name as written: scripting keeps it aside, FSDP2 puts a class in front."""
    if isinstance(owner, torch.jit.ScriptModule):
        return str(owner.original_name)
    names = [base.__name__ for base in type(owner).__mro__]
    written = names[0]
    if "FSDPModule" in names:
        written = names[names.index("FSDPModule") + 1]
    return written.removeprefix("Parametrized")


def shown_class(owner: nn.Module) -> str:
    """The class name for a reader: a private class of torch goes by the name of its public base.

    So the ``NonDynamicallyQuantizableLinear`` in ``nn.MultiheadAttention`` is a ``Linear``.
    """
    if type(owner).__module__.startswith("torch.nn.modules."):
        return next(_public_bases(owner)).__name__
    return class_name(owner)


def _public_bases(owner: nn.Module) -> Iterator[type]:
    """The classes of ``torch.nn`` that the owner is an instance of, the closest first."""
    for base in type(owner).__mro__:
        if getattr(nn, base.__name__, None) is base:
            yield base


def by_reparametrization(owner: nn.Module, local: str) -> Verdict | None:
    """Find the magnitude of the older ``weight_norm``, which splits a weight into `_g` and `_v`.

    The magnitude is smaller than the direction, except in a layer of torch with one input. Twins of
    one shape in another class only happen to be called so.
    """
    if not local.endswith("_g"):
        return None
    direction, magnitude = owner._parameters.get(f"{local[:-2]}_v"), owner._parameters[local]
    if direction is None or magnitude is None:
        return None
    if not isinstance(owner, _WEIGHTS) and shape_of(magnitude) == shape_of(direction):
        return None
    return Verdict(Role.SCALE, "magnitude of a weight norm")


def by_torch_type(owner: nn.Module, local: str) -> Verdict | None:
    """Decide `weight` and `bias` of torch's own classes and their subclasses, at any shape."""
    if _BIAS_NAME.fullmatch(local):
        role = Role.BIAS
    elif _WEIGHT_NAME.fullmatch(local):
        role = Role.WEIGHT
    else:
        return None
    for bases, own_role in (
        (_WEIGHTS, role),
        (_NORMS, Role.NORM),
        (_EMBEDDINGS, Role.EMBEDDING),
        (_SLOPES, Role.SCALE),
    ):
        if isinstance(owner, bases):
            return Verdict(own_role, _owner_is(owner, bases))
    return None


def _owner_is(owner: nn.Module, bases: Types) -> str:
    """Name the owner: 'owner is nn.Linear', or 'owner is Router, an nn.Linear' for a subclass."""
    known = (base for base in _public_bases(owner) if issubclass(base, bases))
    name, own = f"nn.{next(known, bases[0]).__name__}", shown_class(owner)
    return f"owner is {name}" if name == f"nn.{own}" else f"owner is {own}, an {name}"
