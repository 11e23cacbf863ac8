"""Reads layers of other libraries: the class name of the owner, the local name, structure, shape.

Each function answers with a verdict, or with None where its evidence says nothing.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from .evidence import (
    Fill,
    Shape,
    dimensions,
    fill_of,
    is_broadcast,
    is_column,
    is_vectorlike,
    shape_of,
)
from .torch_types import class_name
from .verdict import Verdict
from .vocabulary import (
    Family,
    Hint,
    Role,
    family_of,
    meaning_of,
    names_a_matrix_layer,
    names_positions,
    siblings_of,
    words_of,
)

_PLAIN_WEIGHT = re.compile(r"weight(?:_orig|_v)?|w\d*")
_NUMBERED_WEIGHT = re.compile(r"w\d+")
_PLACE_NAME = re.compile(r"pos|token|quer|latent|prompt|cls")
_EPSILONS = frozenset({"eps", "epsilon", "variance_epsilon", "norm_eps"})


def family(owner: nn.Module) -> Family | None:
    """The family that the class speaks of, or the first of its bases that speaks of one.

    Mixins are left out: they name what a class can do, and not the class.
    """
    names = [class_name(owner)]
    for base in type(owner).__mro__:
        if not base.__module__.startswith("torch.") and not base.__name__.endswith("Mixin"):
            names.append(base.__name__)
    for name in names:
        found = family_of(name)
        if found is not None:
            return found
    return None


# -------------------------------------------------------------------------- the sibling parameters


def by_siblings(owner: nn.Module, local: str, shape: Shape) -> Verdict | None:
    """Find the scale of an elementwise affine map: a matrix beside a bias of the same shape.

    The bias of a layer that contracts is smaller than its weight.
    """
    if is_vectorlike(shape) or meaning_of(local) not in (Hint.MATRIX, Hint.GATE):
        return None
    if family(owner) is Family.NORM:
        return None
    for name, other in owner._parameters.items():
        if other is None or shape_of(other) != shape:
            continue
        if meaning_of(name) is Role.BIAS:
            return Verdict(Role.SCALE, f"of the same shape as {name!r}", guess=True)
    return None


# ---------------------------------------------------------------------------------- the class name


def by_family(
    owner: nn.Module, local: str, parameter: torch.Tensor, shape: Shape
) -> Verdict | None:
    """Decide by the name of the owner's class."""
    kind = family(owner)
    reason = f"owner is called {class_name(owner)}"
    if kind is Family.NORM:
        return _in_a_norm(owner, shape, reason)
    if kind is Family.SCALE:
        return _in_a_scale(owner, local, shape, reason)
    if kind is Family.EMBEDDING:
        return _in_an_embedding(owner, local, shape, reason)
    if kind is Family.FLAT and local.startswith("weight"):
        return Verdict(Role.WEIGHT, reason, guess=is_vectorlike(shape))
    if kind is Family.WEIGHT and _PLAIN_WEIGHT.fullmatch(local):
        return _in_a_weight_layer(owner, local, parameter, shape, reason)
    return None


def _in_a_norm(owner: nn.Module, shape: Shape, reason: str) -> Verdict | None:
    """A normalization holds scales and shifts; a fused one, such as a LayerNormLinear, more."""
    holds_more = names_a_matrix_layer(class_name(owner)) or has_weighted_children(owner)
    if holds_more and not is_vectorlike(shape):
        return None
    return Verdict(Role.NORM, reason)


def _in_a_scale(owner: nn.Module, local: str, shape: Shape, reason: str) -> Verdict | None:
    if is_vectorlike(shape):
        return Verdict(Role.SCALE, reason)
    if names_a_matrix_layer(class_name(owner)) or has_weighted_children(owner):
        return None
    if meaning_of(local) in (Hint.MATRIX, None) and not is_capital(local):
        return Verdict(Role.SCALE, reason, guess=True)
    return None


def is_capital(local: str) -> bool:
    """True for a capital letter, which names a matrix by custom."""
    return re.fullmatch(r"[A-Z]\d*", local) is not None


def _in_an_embedding(owner: nn.Module, local: str, shape: Shape, reason: str) -> Verdict | None:
    """A `weight` is the table, and so is an only parameter that is a matrix and no position."""
    if names_positions(class_name(owner)) and re.match("weight|table|embed", local):
        return Verdict(Role.POSITION, reason, guess=not is_vectorlike(shape))
    if _PLAIN_WEIGHT.fullmatch(local):
        return Verdict(Role.EMBEDDING, reason)
    is_only = len(list(owner.parameters())) == 1
    if not is_only or _PLACE_NAME.search(local) or len(shape or ()) != 2:
        return None
    return None if is_vectorlike(shape) else Verdict(Role.EMBEDDING, reason)


def _in_a_weight_layer(
    owner: nn.Module, local: str, parameter: torch.Tensor, shape: Shape, reason: str
) -> Verdict:
    """A linear or convolution layer; a bare vector in it multiplies, unless it stores a matrix."""
    is_bare = shape is not None and len(shape) <= 1
    is_letter = local == "w" and is_vectorlike(shape) and not is_column(shape)
    if _NUMBERED_WEIGHT.fullmatch(local) or not (is_bare or is_letter):
        return Verdict(Role.WEIGHT, reason)
    if any("numel" in name or "irreps" in name for name in owner.__dict__):
        return Verdict(Role.WEIGHT, f"{reason}, a matrix stored flat", guess=True)
    return weight_or_scale(f"named {local!r}", parameter, shape)


# ---------------------------------------------------------------------------------- the local name


def by_name(owner: nn.Module, local: str, parameter: torch.Tensor, shape: Shape) -> Verdict | None:
    """Decide by the local name, where it must together with the shape and the first values."""
    meaning, reason = meaning_of(local), f"named {local!r}"
    if meaning is None or meaning is Hint.SHAPE:
        return _one_letter_in_attention(owner, local, shape, reason)
    if meaning is Hint.FIRM_WEIGHT:
        return Verdict(Role.WEIGHT, reason)
    if meaning in (Hint.MATRIX, Hint.GATE):
        if meaning is Hint.GATE and is_broadcast(shape):
            return Verdict(Role.SCALE, f"{reason}, broadcast", guess=True)
        return weight_or_scale(reason, parameter, shape)
    if meaning is Hint.READ_OUT:
        return _read_out(reason, parameter, shape)
    if meaning is Hint.PLACE:
        return _place(owner, local, shape, reason)
    if meaning is Role.EMBEDDING and is_vectorlike(shape):
        return Verdict(Role.POSITION, f"{reason}, a vector")
    is_letter = len(local.rstrip("0123456789")) == 1
    return Verdict(Role(meaning), reason, guess=is_letter and not is_vectorlike(shape))


def _one_letter_in_attention(
    owner: nn.Module, local: str, shape: Shape, reason: str
) -> Verdict | None:
    """The vector of an additive attention, such as `v` or `a`, is summed over."""
    is_letter = re.fullmatch(r"[avu](?:_[a-z])?", local) is not None
    if not is_letter or not is_vectorlike(shape):
        return None
    if {"attention", "attn"}.isdisjoint(words_of(class_name(owner))):
        return None
    return Verdict(Role.WEIGHT, f"{reason}, in an attention", guess=True)


def _read_out(reason: str, parameter: torch.Tensor, shape: Shape) -> Verdict:
    if not is_vectorlike(shape):
        return Verdict(Role.WEIGHT, reason, guess=True)
    if fill_of(parameter) is Fill.CONSTANT:
        return Verdict(Role.SCALE, f"{reason}, all values equal", guess=True)
    return Verdict(Role.WEIGHT, f"{reason}, a vector that is summed over", guess=True)


def _place(owner: nn.Module, local: str, shape: Shape, reason: str) -> Verdict:
    """A token, unless there is a key and a value like it: then the projection of the query."""
    if is_vectorlike(shape) or is_broadcast(shape):
        return Verdict(Role.POSITION, reason)
    for sibling in siblings_of(local):
        other = owner._parameters.get(sibling)
        if other is not None and len(shape_of(other) or ()) == len(shape or ()):
            return Verdict(Role.WEIGHT, f"{reason}, beside {sibling!r}", guess=True)
    return Verdict(Role.POSITION, reason, guess=True)


def weight_or_scale(reason: str, parameter: torch.Tensor, shape: Shape) -> Verdict:
    """A `weight` or a `gate` multiplies: as a matrix it contracts, as a vector it scales.

    First values say otherwise: a matrix of one repeated value is a scale, and a vector that is
    initialized by its fan contracts.
    """
    if is_column(shape):
        return Verdict(Role.WEIGHT, f"{reason}, a column", guess=True)
    fill = fill_of(parameter)
    if is_vectorlike(shape):
        if fill is Fill.FAN:
            return Verdict(Role.WEIGHT, f"{reason}, a vector random by its fan", guess=True)
        return Verdict(Role.SCALE, f"{reason}, a vector", guess=fill is not Fill.CONSTANT)
    if fill is Fill.CONSTANT:
        return Verdict(Role.SCALE, f"{reason}, all values equal", guess=True)
    return Verdict(Role.WEIGHT, reason)


# ------------------------------------------------------------------------------ structure and shape


def by_structure(owner: nn.Module) -> Verdict | None:
    """A module with an `eps`, whose parameters are vectors of one length, normalizes."""
    if _EPSILONS.isdisjoint(owner.__dict__) or has_weighted_children(owner):
        return None
    lengths = set()
    for parameter in owner._parameters.values():
        if parameter is None:
            continue
        shape = shape_of(parameter)
        if shape is None or not is_vectorlike(shape):
            return None
        lengths.add(max(shape, default=1))
    if len(lengths) > 1 or family(owner) is Family.WEIGHT:
        return None
    return Verdict(Role.NORM, "owner has an eps and only vectors", guess=True)


def has_weighted_children(owner: nn.Module) -> bool:
    """True where a child of the owner, at any depth, holds a parameter."""
    for child in owner._modules.values():
        if child is not None and next(child.parameters(), None) is not None:
            return True
    return False


def by_shape(parameter: torch.Tensor, shape: Shape) -> Verdict:
    """Decide by the number of dimensions larger than one: the last resort."""
    if shape is None:
        return Verdict(Role.WEIGHT, "shape not known yet, owner unknown", guess=True)
    count = dimensions(shape)
    if count <= 1:
        return Verdict(Role.OTHER, f"{count}-D, owner unknown", guess=True)
    if is_broadcast(shape):
        return Verdict(Role.OTHER, "broadcast over its first dimension, owner unknown", guess=True)
    if fill_of(parameter) is Fill.CONSTANT:
        return Verdict(Role.SCALE, f"{count}-D, all values equal, owner unknown", guess=True)
    return Verdict(Role.WEIGHT, f"{count}-D, owner unknown", guess=True)
