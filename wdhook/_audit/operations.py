"""What each operation of PyTorch does with each of its arguments: the table that the trace reads."""

from __future__ import annotations

import enum
from typing import Any

import torch


class Use(str, enum.Enum):
    """What a forward pass does with a parameter, by the first operation that mixes it with something else."""

    CONTRACTION = "contraction"
    """Summed over with data: matrix products, convolutions, recurrent layers, bilinear forms."""
    LOOKUP = "lookup"
    """Rows are picked by the data: embeddings, codebooks."""
    NORM = "norm"
    """Scale or shift argument of a normalization."""
    MULTIPLICATION = "multiplication"
    """Multiplies data, broadcast: gains, LayerScale, the scale of a normalization that is written out."""
    ADDITION = "addition"
    """Is added to data: biases, position tables."""
    TOKEN = "token"
    """Becomes data itself: joined to it, put in its place, fed to a layer: class tokens, queries, prompts."""
    SLOPE = "slope"
    """Of an activation (PReLU)."""
    CONSTANT = "constant"
    """Multiplies data behind a function of its own, such as ``-exp(A_log)``."""
    OTHER = "other"
    """Meets data in an operation whose meaning is not known."""
    OPAQUE = "opaque"
    """Goes into a custom autograd function or operator, which a trace cannot see through."""
    UNUSED = "unused"
    """No operation of this forward pass read it."""

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

# operation -> argument -> (use, axis of the argument that the output keeps)
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
_LEFT = {"self", "mat1", "batch1"}  # the side of a product on which nn.Linear has its data

_ARGUMENTS: dict[tuple[str, str], Use] = {
    **{
        (op, "self"): _ADDITION
        for op in ("addmm", "_addmm_activation", "baddbmm", "addbmm", "addmv", "addr")
    },
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
    **{
        (op, side): _MULTIPLICATION
        for op in ("mul", "div", "true_divide")
        for side in ("self", "other")
    },
    **{
        (op, side): _ADDITION
        for op in ("add", "sub", "rsub", "lerp")
        for side in ("self", "other", "end")
    },
    ("lerp", "weight"): _MULTIPLICATION,
    ("pow", "exponent"): Use.CONSTANT,
    **{
        (op, side): _ADDITION if side == "self" else _MULTIPLICATION
        for op in ("addcmul", "addcdiv")
        for side in ("self", "tensor1", "tensor2")
    },
    **{("where", side): _TOKEN for side in ("self", "other")},
    ("masked_fill", "value"): _TOKEN,
    ("copy", "src"): _TOKEN,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that put one tensor among others: what is put there is data from then on.
JOINING = _names(
    "cat stack copy index_put scatter masked_scatter index_copy fill select_scatter slice_scatter "
    "_index_put_impl where masked_fill index_add scatter_add"
)
PICKING = _names("index index_select gather take embedding _unsafe_index")
REDUCING = _names(
    "sum mean var var_mean std std_mean norm linalg_vector_norm amax amin max min prod logsumexp median aminmax"
)
_LINEAR = _names(
    "neg mul div add sub rsub clone _to_copy copy conj positive view_as_real _conj _conj_physical where "
    "masked_fill dropout native_dropout fill"
)


def name_of(op: Any) -> str:
    """`aten.add_.Tensor` → ``add``: in-place variants and overloads mean the same."""
    name: str = op._schema.name.partition("::")[2]
    return name.removesuffix("_") if not name.startswith("__") else name


def is_pointwise(op: Any, name: str) -> bool:
    """Whether output elements depend on the elements at their own place alone."""
    return torch.Tag.pointwise in op.tags or name in (
        "native_dropout",
        "where",
        "masked_fill",
        "copy",
        "addcmul",
        "lerp",
    )


def bends(op: Any, name: str) -> bool:
    """Whether a pointwise function of one parameter makes it another quantity (exp, softplus, sigmoid)."""
    return (torch.Tag.pointwise in op.tags and name not in _LINEAR) or name == "_softmax"


def use_of(name: str, argument: str, dims: int, both: bool) -> Use | None:
    """The use that an operation makes of one argument, or None where the argument says nothing by itself.

    Args:
        name: of the operation, see `name_of`.
        argument: its name in the operation's schema.
        dims: number of dimensions of the tensor.
        both: a product of two parameters of which the right one is transposed, as in ``F.linear(token, weight)``.
    """
    if name in _PRODUCTS and argument in _PRODUCTS[name]:
        return _TOKEN if both and argument in _LEFT else _CONTRACTION
    if (name, argument) in _ARGUMENTS:
        return _ARGUMENTS[name, argument]
    if "conv" in name:
        return {"weight": _CONTRACTION, "bias": _ADDITION}.get(argument, _TOKEN)
    if "norm" in name and name != "_weight_norm_interface":
        return Use.NORM if argument in ("weight", "bias") else None
    if "attention" in name:
        return _ADDITION if argument in ("attn_mask", "attn_bias", "bias") else _TOKEN
    if "rnn" in name and argument.startswith("weight"):
        return _CONTRACTION if dims > 1 else _ADDITION
    return None


def pointwise_use(name: str, argument: str) -> Use:
    """The use that a pointwise operation with data makes of a parameter."""
    return _POINTWISE.get((name, argument), Use.OTHER)


def kept_axis(name: str, argument: str, transposed: bool) -> int:
    """The axis of a contracted argument that the output keeps: its rows, or output channels."""
    return _PRODUCTS.get(name, {}).get(argument, 1 if transposed else 0)
