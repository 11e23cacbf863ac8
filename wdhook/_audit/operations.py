"""The table that the trace reads: the use of each argument of the operations of PyTorch."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


class Use(str, enum.Enum):
    """The use of a parameter in a forward pass: the first operation that mixes it with data."""

    CONTRACTION = "contraction"
    """Summed over with data: matrix products, convolutions, recurrent layers, bilinear forms."""
    LOOKUP = "lookup"
    """Rows are picked by the data: embeddings, codebooks."""
    NORM = "norm"
    """Scale or shift argument of a normalization."""
    MULTIPLICATION = "multiplication"
    """Multiplies data, broadcast: gains, LayerScale, the scale of a normalization in Python."""
    ADDITION = "addition"
    """Is added to data: biases, position tables."""
    TOKEN = "token"
    """Becomes data: concatenated, substituted, or fed to a layer, like class tokens and prompts."""
    SLOPE = "slope"
    """Slope of an activation (PReLU)."""
    CONSTANT = "constant"
    """Multiplies data behind a function of its own, such as ``-exp(A_log)``."""
    OTHER = "other"
    """Meets data in an operation whose meaning is not known."""
    OPAQUE = "opaque"
    """Goes into a custom autograd function or operator, which a trace cannot see through."""
    UNUSED = "unused"
    """No operation of this forward pass read the parameter."""

    def __str__(self) -> str:
        return self.value


DECAYED_USES = frozenset({Use.CONTRACTION, Use.LOOKUP})
SILENT_USES = frozenset({Use.OTHER, Use.OPAQUE, Use.UNUSED})
"""Uses that say nothing about a role."""

_CONTRACTION, _ADDITION, _TOKEN, _MULTIPLICATION = (
    Use.CONTRACTION,
    Use.ADDITION,
    Use.TOKEN,
    Use.MULTIPLICATION,
)

# operation -> argument -> axis of the argument that the output keeps
_PRODUCTS: dict[str, dict[str, int]] = {
    "mm": {"self": 0, "mat2": 1},
    "_int_mm": {"self": 0, "mat2": 1},
    "_scaled_mm": {"self": 0, "mat2": 1},
    "_grouped_mm": {"self": -2, "mat2": -1},
    "_scaled_grouped_mm": {"self": -2, "mat2": -1},
    "addmm": {"mat1": 0, "mat2": 1},
    "_addmm_activation": {"mat1": 0, "mat2": 1},
    "bmm": {"self": 1, "mat2": 2},
    "baddbmm": {"batch1": 1, "batch2": 2},
    "addbmm": {"batch1": 1, "batch2": 2},
    "mv": {"self": 0, "vec": 0},
    "addmv": {"mat": 0, "vec": 0},
    "addr": {"vec1": 0, "vec2": 0},
    "dot": {"self": 0, "tensor": 0},
    "vdot": {"self": 0, "other": 0},
    "_trilinear": {"i2": 0},
    "linear": {"weight": 0},
    "_cdist_forward": {"x1": 0, "x2": 0},
}
LEFT = frozenset({"self", "mat1", "batch1", "mat"})
"""The side of a product on which `nn.Linear` has its data."""
WITH_BIAS = frozenset({"addmm", "_addmm_activation", "baddbmm", "addbmm", "addmv", "addr"})

_ARGUMENTS: dict[tuple[str, str], Use] = {
    **{(op, "self"): _ADDITION for op in WITH_BIAS},
    ("linear", "bias"): _ADDITION,
    ("linear", "input"): _TOKEN,
    ("embedding", "weight"): Use.LOOKUP,
    ("_embedding_bag", "weight"): Use.LOOKUP,
    ("_embedding_bag_forward_only", "weight"): Use.LOOKUP,
    ("_prelu_kernel", "weight"): Use.SLOPE,
    ("_weight_norm_interface", "g"): _MULTIPLICATION,
    ("_thnn_fused_lstm_cell", "input_bias"): _ADDITION,
    ("_thnn_fused_lstm_cell", "hidden_bias"): _ADDITION,
    ("_thnn_fused_gru_cell", "input_bias"): _ADDITION,
    ("_thnn_fused_gru_cell", "hidden_bias"): _ADDITION,
    ("grid_sampler_2d", "input"): _TOKEN,
    ("grid_sampler_3d", "input"): _TOKEN,
}

_POINTWISE: dict[tuple[str, str], Use] = {
    ("mul", "self"): _MULTIPLICATION,
    ("mul", "other"): _MULTIPLICATION,
    ("div", "self"): _MULTIPLICATION,
    ("div", "other"): _MULTIPLICATION,
    ("true_divide", "self"): _MULTIPLICATION,
    ("true_divide", "other"): _MULTIPLICATION,
    ("add", "self"): _ADDITION,
    ("add", "other"): _ADDITION,
    ("sub", "self"): _ADDITION,
    ("sub", "other"): _ADDITION,
    ("rsub", "self"): _ADDITION,
    ("rsub", "other"): _ADDITION,
    ("lerp", "self"): _ADDITION,
    ("lerp", "end"): _ADDITION,
    ("lerp", "weight"): _MULTIPLICATION,
    ("pow", "exponent"): Use.CONSTANT,
    ("addcmul", "self"): _ADDITION,
    ("addcmul", "tensor1"): _MULTIPLICATION,
    ("addcmul", "tensor2"): _MULTIPLICATION,
    ("addcdiv", "self"): _ADDITION,
    ("addcdiv", "tensor1"): _MULTIPLICATION,
    ("addcdiv", "tensor2"): _MULTIPLICATION,
    ("where", "self"): _TOKEN,
    ("where", "other"): _TOKEN,
    ("masked_fill", "value"): _TOKEN,
    ("copy", "src"): _TOKEN,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_JOINING = _names(
    "cat stack copy index_put scatter masked_scatter index_copy fill select_scatter slice_scatter "
    "_index_put_impl where masked_fill index_add scatter_add"
)
_PICKING = _names("index index_select gather take embedding _unsafe_index")
_REDUCING = _names(
    "sum mean var var_mean std std_mean norm linalg_vector_norm amax amin max min prod logsumexp "
    "median aminmax"
)
_ALSO_POINTWISE = _names("native_dropout where masked_fill copy addcmul lerp")
# Pointwise operations after which a parameter is still the same quantity.
_KEEPING = _names(
    "neg mul div add sub rsub clone _to_copy copy conj positive view_as_real _conj _conj_physical "
    "where masked_fill dropout native_dropout fill"
)


@dataclass(frozen=True, slots=True)
class Operation:
    """The facts about an operation that the trace needs, looked up once for each.

    Attributes:
        name: without namespace and overload; in-place variants are called the same.
        full_name: with the namespace.
        custom: defined by somebody else than PyTorch.
        arguments: names of the arguments, in the order of the schema.
        writes: changes an argument in place.
        pointwise: each output element depends on the elements at its own place alone.
        bends: makes another quantity of a parameter (exp, softplus, sigmoid, softmax).
        joins: puts one tensor among others; a parameter put there is data from then on.
        picks: picks parts by indices.
        reduces: computes a statistic.
        fourier: a Fourier transform.
        creates: takes the shape of an argument alone, not its values.
        mixes: combines elements of one tensor in a way of its own: softmax, normalization.
    """

    name: str
    full_name: str
    custom: bool
    arguments: tuple[str, ...]
    writes: bool
    pointwise: bool
    bends: bool
    joins: bool
    picks: bool
    reduces: bool
    fourier: bool
    creates: bool
    mixes: bool

    @property
    def is_product(self) -> bool:
        """Whether the operation is a product of matrices or vectors."""
        return self.name in _PRODUCTS


@lru_cache(maxsize=4096)
def operation_of(func: Any) -> Operation:
    """Return the facts about an overload: `aten.add_.Tensor` is an ``add`` that writes."""
    schema = func._schema
    name: str = schema.name.partition("::")[2]
    if not name.startswith("__"):
        name = name.removesuffix("_")
    tagged = torch.Tag.pointwise in func.tags
    return Operation(
        name=name,
        full_name=schema.name,
        custom=func.namespace not in ("aten", "prims", "prim"),
        arguments=tuple(argument.name for argument in schema.arguments),
        writes=schema.is_mutable,
        pointwise=tagged or name in _ALSO_POINTWISE,
        bends=(tagged and name not in _KEEPING) or name == "_softmax",
        joins=name in _JOINING,
        picks=name in _PICKING,
        reduces=name in _REDUCING,
        fourier=name.startswith("_fft_"),
        creates=name.endswith("_like") or name.startswith("new_"),
        mixes="softmax" in name or "norm" in name,
    )


@lru_cache(maxsize=4096)
def use_of(name: str, argument: str, is_vector: bool) -> Use | None:
    """Return the use that an operation makes of one argument, or None where its name says nothing.

    Args:
        name: of the operation, see `Operation`.
        argument: its name in the schema of the operation.
        is_vector: the tensor has one dimension at most.
    """
    if argument in _PRODUCTS.get(name, ()):
        return _CONTRACTION
    if (name, argument) in _ARGUMENTS:
        return _ARGUMENTS[name, argument]
    for part, rule in _FAMILIES:
        if part in name:
            return rule(argument, is_vector)
    return None


def _in_fused_layer(argument: str, is_vector: bool) -> Use:
    """Return the use in a layer that PyTorch runs as one operation, by the words of a name."""
    if "norm" in argument:
        return Use.NORM
    if "weight" in argument:
        return _CONTRACTION
    return _ADDITION if "bias" in argument or "mask" in argument else _TOKEN


def _in_convolution(argument: str, is_vector: bool) -> Use:
    return {"weight": _CONTRACTION, "bias": _ADDITION}.get(argument, _TOKEN)


def _in_weight_norm(argument: str, is_vector: bool) -> None:
    """Return None: the direction is on its way to its layer."""


def _in_norm(argument: str, is_vector: bool) -> Use | None:
    return Use.NORM if argument in ("weight", "bias") else None


def _in_attention(argument: str, is_vector: bool) -> Use:
    return _ADDITION if argument in ("attn_mask", "attn_bias", "bias") else _TOKEN


def _in_recurrent_layer(argument: str, is_vector: bool) -> Use | None:
    if not argument.startswith("weight"):
        return None
    return _ADDITION if is_vector else _CONTRACTION


# Part of the name of an operation → the rule for its arguments; the first that fits counts.
_FAMILIES: tuple[tuple[str, Callable[[str, bool], Use | None]], ...] = (
    ("multi_head_attention", _in_fused_layer),
    ("encoder_layer", _in_fused_layer),
    ("conv", _in_convolution),
    ("weight_norm", _in_weight_norm),
    ("norm", _in_norm),
    ("attention", _in_attention),
    ("rnn", _in_recurrent_layer),
)


def pointwise_use(name: str, argument: str) -> Use:
    """Return the use that a pointwise operation with data makes of a parameter."""
    return _POINTWISE.get((name, argument), Use.OTHER)


def kept_axis(name: str, argument: str, transposed: bool) -> int:
    """Return the axis of a contracted argument that the output keeps: its output channels."""
    return _PRODUCTS.get(name, {}).get(argument, 1 if transposed else 0)
