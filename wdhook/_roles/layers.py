"""Reads layers of other libraries: the class name of the owner, the local name, structure, shape.

Each rule takes a `Case` and answers with a verdict, or with None where its evidence says nothing.
The rules of families and of hints stand in two tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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
    Meaning,
    Role,
    family_of,
    is_firm_name,
    is_matrix_name,
    is_plural,
    meaning_of,
    names_a_matrix_layer,
    names_positions,
    names_waves,
    siblings_of,
    words_of,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One parameter with all that its rules look at."""

    owner: nn.Module
    local: str
    parameter: torch.Tensor
    shape: Shape

    @property
    def named(self) -> str:
        """The reason of a verdict by the local name."""
        return f"named {self.local!r}"

    @property
    def called(self) -> str:
        """The reason of a verdict by the class name."""
        return f"owner is called {class_name(self.owner)}"

    @property
    def meaning(self) -> Meaning | None:
        """The meaning of the local name."""
        return meaning_of(self.local)

    @property
    def is_vector(self) -> bool:
        """True where at most one dimension is larger than one."""
        return is_vectorlike(self.shape)

    @property
    def is_constant(self) -> bool:
        """True where all first values are the same number, and not zero."""
        return fill_of(self.parameter) is Fill.CONSTANT

    @property
    def holds_matrices(self) -> bool:
        """True where the owner is a matrix layer by its name, or has children with parameters."""
        return names_a_matrix_layer(class_name(self.owner)) or has_weighted_children(self.owner)


Rule = Callable[[Case], "Verdict | None"]

_PLAIN_WEIGHT = re.compile(r"weight(?:_orig|_v)?|w\d*")
_TABLE_NAME = re.compile(r"weight|table|embed")
_PLACE_NAME = re.compile(r"pos|token|quer|latent|prompt|cls")
_ATTENTION_VECTOR = re.compile(r"[avu](?:_[a-z])?")
_EPSILONS = frozenset({"eps", "epsilon", "variance_epsilon", "norm_eps"})


# -------------------------------------------------------------------------- the sibling parameters


def by_siblings(case: Case) -> Verdict | None:
    """Find the scale of an elementwise affine map: a matrix beside a bias of the same shape.

    The bias of a layer that contracts is smaller than its weight.
    """
    if case.is_vector or case.meaning not in (Hint.MATRIX, Hint.GATE):
        return None
    if family(case.owner) is Family.NORM:
        return None
    twin = _bias_of(case, case.shape)
    return None if twin is None else Verdict(Role.SCALE, f"of the shape of {twin!r}", guess=True)


def _bias_of(case: Case, *shapes: Shape) -> str | None:
    """The name of a bias beside the parameter that has one of these shapes."""
    for name, other in case.owner._parameters.items():
        if meaning_of(name) is not Role.BIAS or other is None:
            continue
        if shape_of(other) in shapes:
            return name
    return None


# ---------------------------------------------------------------------------------- the class name


def by_family(case: Case) -> Verdict | None:
    """Decide by the name of the owner's class."""
    kind = family(case.owner)
    rule = None if kind is None else _FAMILY_RULES.get(kind)
    return None if rule is None else rule(case)


def family(owner: nn.Module) -> Family | None:
    """The family that the class speaks of, or the first of its bases that speaks of one.

    Mixins are left out: they name an ability of a class, and not the class.
    """
    found = family_of(class_name(owner))
    for base in type(owner).__mro__:
        if found is not None:
            break
        if not base.__module__.startswith("torch.") and not base.__name__.endswith("Mixin"):
            found = family_of(base.__name__)
    return found


def _in_a_norm(case: Case) -> Verdict | None:
    """A normalization holds scales and shifts; a fused one, such as a LayerNormLinear, more."""
    if case.is_vector:
        return Verdict(Role.NORM, case.called)
    if case.holds_matrices:
        return None
    return Verdict(Role.NORM, case.called, guess=fill_of(case.parameter) is Fill.ELSE)


def _in_a_scale(case: Case) -> Verdict | None:
    if case.is_vector:
        return Verdict(Role.SCALE, case.called)
    if case.holds_matrices or is_matrix_name(case.local):
        return None
    if case.meaning in (Hint.MATRIX, None):
        return Verdict(Role.SCALE, case.called, guess=True)
    return None


def _in_an_embedding(case: Case) -> Verdict | None:
    """A `weight` is the table, and so is an only parameter that is a matrix and no position."""
    if names_positions(class_name(case.owner)) and _TABLE_NAME.match(case.local):
        return Verdict(Role.POSITION, case.called, guess=not case.is_vector)
    if _PLAIN_WEIGHT.fullmatch(case.local):
        return Verdict(Role.EMBEDDING, case.called)
    if case.is_vector or len(case.shape or ()) != 2 or _PLACE_NAME.search(case.local):
        return None
    is_only = len(list(case.owner.parameters())) == 1
    return Verdict(Role.EMBEDDING, case.called) if is_only else None


def _in_a_tensor_product(case: Case) -> Verdict | None:
    """The matrices of all paths, in one vector."""
    if not case.local.startswith("weight"):
        return None
    return Verdict(Role.WEIGHT, case.called, guess=case.is_vector)


def _in_a_matrix_layer(case: Case) -> Verdict | None:
    """The weight of a linear or convolution layer; a bare vector multiplies."""
    if not _PLAIN_WEIGHT.fullmatch(case.local):
        return None
    if not _is_bare(case):
        return Verdict(Role.WEIGHT, case.called)
    if any("numel" in name or "irreps" in name for name in case.owner.__dict__):
        return Verdict(Role.WEIGHT, f"{case.called}, a matrix stored flat", guess=True)
    return _matrix(case)


def _is_bare(case: Case) -> bool:
    """True for a 1-D weight, and for a `w` that broadcasts; `w1` counts the matrices of a layer."""
    if re.fullmatch(r"w\d+", case.local) or case.shape is None:
        return False
    if len(case.shape) <= 1:
        return True
    return case.local == "w" and case.is_vector and not is_column(case.shape)


_FAMILY_RULES: dict[Family, Rule] = {
    Family.NORM: _in_a_norm,
    Family.SCALE: _in_a_scale,
    Family.EMBEDDING: _in_an_embedding,
    Family.FLAT: _in_a_tensor_product,
    Family.WEIGHT: _in_a_matrix_layer,
}


# ---------------------------------------------------------------------------------- the local name


def by_name(case: Case) -> Verdict | None:
    """Decide by the local name, where it must together with the shape and the first values."""
    meaning = case.meaning
    if meaning is None:
        return _open(case)
    if isinstance(meaning, Hint):
        return _HINT_RULES[meaning](case)
    if meaning is Role.EMBEDDING and case.is_vector:
        return Verdict(Role.POSITION, f"{case.named}, a vector")
    is_letter = len(case.local.rstrip("0123456789")) == 1
    is_open = is_letter or not is_firm_name(case.local)
    return Verdict(meaning, case.named, guess=is_open and not case.is_vector)


def _open(case: Case) -> Verdict | None:
    """The vector of an additive attention, such as `v` or `a`, is summed over."""
    if not case.is_vector or not _ATTENTION_VECTOR.fullmatch(case.local):
        return None
    if {"attention", "attn"}.isdisjoint(words_of(class_name(case.owner))):
        return None
    return Verdict(Role.WEIGHT, f"{case.named}, in an attention", guess=True)


def _firm(case: Case) -> Verdict:
    return Verdict(Role.WEIGHT, case.named, guess=case.is_vector)


def _matrix(case: Case) -> Verdict:
    """A `weight` multiplies: as a matrix it contracts, as a vector it scales.

    First values say otherwise: a matrix of one repeated value is a scale, and a vector that is
    drawn around zero contracts.
    """
    if case.is_vector and not is_column(case.shape):
        return _vector(case)
    if case.is_constant and not (case.is_vector and is_plural(case.local)):
        return Verdict(Role.SCALE, f"{case.named}, all values equal", guess=True)
    if case.is_vector:
        return Verdict(Role.WEIGHT, f"{case.named}, a column", guess=True)
    return Verdict(Role.WEIGHT, case.named, guess=is_broadcast(case.shape))


def _vector(case: Case) -> Verdict:
    fill = fill_of(case.parameter)
    found = None if fill is Fill.CONSTANT else _beside_one_bias(case)
    if found is not None:
        return found
    scales = names_waves(class_name(case.owner)) or _bias_of(case, case.shape) is not None
    if fill is Fill.RANDOM and not scales:
        return Verdict(Role.WEIGHT, f"{case.named}, a vector random around zero", guess=True)
    is_open = fill is not Fill.CONSTANT or is_plural(case.local)
    return Verdict(Role.SCALE, f"{case.named}, a vector", guess=is_open)


def _beside_one_bias(case: Case) -> Verdict | None:
    """A layer with one output has a bias of one number, and a vector that is summed over."""
    if case.shape is None or dimensions(case.shape) != 1:
        return None
    bias = _bias_of(case, (), (1,))
    if bias is None:
        return None
    return Verdict(Role.WEIGHT, f"{case.named}, beside {bias!r} of one number", guess=True)


def _gate(case: Case) -> Verdict:
    """A gate is computed with a matrix; where it broadcasts it multiplies."""
    if is_broadcast(case.shape):
        return Verdict(Role.SCALE, f"{case.named}, broadcast", guess=True)
    return _matrix(case)


def _read_out(case: Case) -> Verdict:
    if not case.is_vector:
        return Verdict(Role.WEIGHT, case.named, guess=True)
    if case.is_constant:
        return Verdict(Role.SCALE, f"{case.named}, all values equal", guess=True)
    return Verdict(Role.WEIGHT, f"{case.named}, a vector that is summed over", guess=True)


def _place(case: Case) -> Verdict:
    """A token, unless a key or a value stands beside it: then the projection of the query."""
    if case.is_vector or is_broadcast(case.shape):
        return Verdict(Role.POSITION, case.named)
    for sibling in siblings_of(case.local):
        other = case.owner._parameters.get(sibling)
        if other is not None and len(shape_of(other) or ()) == len(case.shape or ()):
            return Verdict(Role.WEIGHT, f"{case.named}, beside {sibling!r}", guess=True)
    return Verdict(Role.POSITION, case.named, guess=True)


_HINT_RULES: dict[Hint, Rule] = {
    Hint.MATRIX: _matrix,
    Hint.GATE: _gate,
    Hint.FIRM_WEIGHT: _firm,
    Hint.READ_OUT: _read_out,
    Hint.PLACE: _place,
    Hint.SHAPE: _open,
}


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


def by_shape(case: Case) -> Verdict:
    """Decide by the number of dimensions larger than one: the last resort."""
    if case.shape is None:
        return Verdict(Role.WEIGHT, "shape not known yet, owner unknown", guess=True)
    count = dimensions(case.shape)
    if count == 1 and len(case.shape) > 1 and is_matrix_name(case.local):
        return Verdict(Role.WEIGHT, f"{case.named}, a matrix of one line", guess=True)
    if count <= 1:
        return Verdict(Role.OTHER, f"{count}-D, owner unknown", guess=True)
    if is_broadcast(case.shape):
        return Verdict(Role.OTHER, "broadcast over its first dimension, owner unknown", guess=True)
    fill = fill_of(case.parameter)
    if fill is Fill.ZERO and is_matrix_name(case.local):
        fill = Fill.ELSE  # the second factor of a product of low rank, which starts at zero
    role, values = _BY_FILL.get(fill, (Role.WEIGHT, ""))
    return Verdict(role, f"{count}-D{values}, owner unknown", guess=True)


# First values → the role of a matrix that nothing else speaks of.
_BY_FILL: dict[Fill, tuple[Role, str]] = {
    Fill.CONSTANT: (Role.SCALE, ", all values equal"),
    Fill.ZERO: (Role.OTHER, ", all values zero"),
}
