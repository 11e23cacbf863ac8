"""What the trace says of each way to use a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import wdhook
from wdhook._audit.operations import Use


class Of(nn.Module):
    """A module made of parameters and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 5


def _written(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = m.p
    return x


def _standardised(m: Any, x: Tensor) -> Tensor:
    w = m.p
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return F.conv2d(x, w * m.gain[:, None, None, None])


def _modulated(m: Any, x: Tensor, style: Tensor) -> Tensor:
    b, c, h, w = x.shape
    weight = (m.p[None] * style[:, None, :, None, None]).flatten(0, 1)
    return F.conv2d(x.reshape(1, b * c, h, w), weight, groups=b)


def _scan(m: Any, x: Tensor) -> Tensor:
    state, decay = torch.zeros(x.shape[0], 4), -torch.exp(m.p)
    for t in range(x.shape[1]):
        state = state * torch.exp(decay * 0.1) + x[:, t]
    return state


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, m.p, m.b)


CASES: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, str]]] = {
    "matmul": (Of(lambda m, x: x @ m.p, p=(4, 3)), (x(2, 4),), {"p": "contraction"}),
    "matmul from the left": (Of(lambda m, x: m.p @ x, p=(3, 2)), (x(2, 4),), {"p": "contraction"}),
    "matmul with a vector": (Of(lambda m, x: x @ m.p, p=(4,)), (x(2, 4),), {"p": "contraction"}),
    "transposed, cast and cloned": (
        Of(lambda m, x: x.double() @ m.p.t().double().clone(), p=(3, 4)),
        (x(2, 4),),
        {"p": "contraction"},
    ),
    "einsum": (
        Of(lambda m, x: torch.einsum("bti,hio->btho", x, m.p), p=(2, 4, 3)),
        (x(2, 5, 4),),
        {"p": "contraction"},
    ),
    "slices of one matrix": (
        Of(lambda m, x: torch.cat([x @ w.t() for w in m.p.chunk(3)], -1), p=(12, 4)),
        (x(2, 4),),
        {"p": "contraction"},
    ),
    "low rank": (
        Of(lambda m, x: F.linear(x, m.w + 0.5 * (m.b @ m.a)), w=(3, 4), a=(2, 4), b=(3, 2)),
        (x(2, 4),),
        {"w": "contraction", "a": "contraction", "b": "contraction"},
    ),
    "weight standardisation": (
        Of(_standardised, p=(3, 2, 3, 3), gain=(3,)),
        (x(2, 2, 5, 5),),
        {"p": "contraction", "gain": "multiplication"},
    ),
    "modulated convolution": (
        Of(_modulated, p=(3, 2, 3, 3)),
        (x(2, 2, 5, 5), x(2, 2)),
        {"p": "contraction"},
    ),
    "experts that the data pick": (
        Of(lambda m, x, i: torch.bmm(m.p[i], x.unsqueeze(-1)), p=(5, 3, 4)),
        (x(2, 4), ids(2)),
        {"p": "contraction"},
    ),
    "autocast": (
        Of(_autocast, p=(3, 4), b=(3,)),
        (x(2, 4),),
        {"p": "contraction", "b": "addition"},
    ),
    "scaled dot product": (
        Of(
            lambda m, x: F.scaled_dot_product_attention(m.q.expand(2, 1, 3, 4), x, x),
            q=(1, 1, 3, 4),
        ),
        (x(2, 1, 5, 4),),
        {"q": "token"},
    ),
    "attention bias": (
        Of(lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.mask), mask=(5, 5)),
        (x(2, 1, 5, 4),),
        {"mask": "addition"},
    ),
    "looked up": (Of(lambda m, i: m.p[i], p=(5, 4)), (ids(2, 3),), {"p": "lookup"}),
    "looked up, then a layer": (
        Of(lambda m, i: F.linear(m.p[i], m.w), p=(5, 4), w=(3, 4)),
        (ids(2, 3),),
        {"p": "lookup", "w": "contraction"},
    ),
    "relative positions by constant indices": (
        Of(lambda m, x: x + m.p[torch.tensor([[0, 1], [1, 0]])], p=(2,)),
        (x(3, 2, 2),),
        {"p": "addition"},
    ),
    "gain": (Of(lambda m, x: x * m.p, p=(1, 1, 4)), (x(2, 3, 4),), {"p": "multiplication"}),
    "gain in place": (
        Of(lambda m, x: (x + 0).mul_(m.p), p=(4,)),
        (x(2, 4),),
        {"p": "multiplication"},
    ),
    "norm that is written out": (
        Of(
            lambda m, x: m.p * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + m.b,
            p=(4,),
            b=(4,),
        ),
        (x(2, 4),),
        {"p": "multiplication", "b": "addition"},
    ),
    "temperature": (Of(lambda m, x: x @ x.t() * m.p.exp(), p=()), (x(2, 4),), {"p": "constant"}),
    "state space": (Of(_scan, p=(4,)), (x(2, 3, 4),), {"p": "constant"}),
    "position": (Of(lambda m, x: x + m.p, p=(1, 3, 4)), (x(1, 3, 4),), {"p": "addition"}),
    "interpolated position": (
        Of(lambda m, x: x + F.interpolate(m.p, size=(6, 6), mode="bilinear"), p=(1, 4, 3, 3)),
        (x(2, 4, 6, 6),),
        {"p": "addition"},
    ),
    "class token": (
        Of(lambda m, x: torch.cat([m.p.expand(2, 1, 4), x], 1), p=(1, 1, 4)),
        (x(2, 3, 4),),
        {"p": "token"},
    ),
    "mask token": (Of(lambda m, x: torch.where(x > 0, m.p, x), p=(4,)), (x(2, 4),), {"p": "token"}),
    "written into the data": (Of(_written, p=(4,)), (x(2, 3, 4),), {"p": "token"}),
    "queries through a layer": (
        Of(lambda m, x: F.linear(m.p, m.w) @ x.t(), p=(3, 4), w=(4, 4)),
        (x(2, 4),),
        {"p": "token", "w": "contraction"},
    ),
    "slope": (nn.PReLU(3), (x(2, 3, 4),), {"weight": "slope"}),
    "unused": (
        Of(lambda m, x: x @ m.p, p=(4, 3), idle=(4,)),
        (x(2, 4),),
        {"p": "contraction", "idle": "unused"},
    ),
    "returned": (Of(lambda m, x: (x @ m.p, m.t.exp()), p=(4, 3), t=()), (x(2, 4),), {"t": "other"}),
    "bilinear": (
        nn.Bilinear(3, 4, 5),
        (x(2, 3), x(2, 4)),
        {"weight": "contraction", "bias": "addition"},
    ),
    "bag": (nn.EmbeddingBag(5, 4), (ids(2, 3),), {"weight": "lookup"}),
    "lstm": (
        nn.LSTM(4, 3, proj_size=2),
        (x(5, 2, 4),),
        {
            "weight_ih_l0": "contraction",
            "weight_hh_l0": "contraction",
            "weight_hr_l0": "contraction",
            "bias_ih_l0": "addition",
        },
    ),
    "gru cell": (nn.GRUCell(4, 3), (x(2, 4),), {"weight_hh": "contraction", "bias_hh": "addition"}),
    "attention": (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        (x(3, 2, 4), x(3, 2, 4), x(3, 2, 4)),
        {
            "in_proj_weight": "contraction",
            "in_proj_bias": "addition",
            "bias_k": "token",
            "out_proj.weight": "contraction",
        },
    ),
    "encoder layer in eval mode": (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        (x(2, 3, 4),),
        {
            "self_attn.in_proj_weight": "contraction",
            "linear1.weight": "contraction",
            "norm1.weight": "norm",
        },
    ),
    "transposed convolution": (
        nn.ConvTranspose2d(2, 3, 3),
        (x(1, 2, 4, 4),),
        {"weight": "contraction", "bias": "addition"},
    ),
    "instance norm": (
        nn.InstanceNorm2d(3, affine=True),
        (x(2, 3, 4, 4),),
        {"weight": "norm", "bias": "norm"},
    ),
    "group norm": (nn.GroupNorm(1, 3), (x(2, 3, 4),), {"weight": "norm", "bias": "norm"}),
    "weight norm": (
        parametrizations.weight_norm(nn.Linear(4, 3)),
        (x(2, 4),),
        {
            "parametrizations.weight.original0": "multiplication",
            "parametrizations.weight.original1": "contraction",
        },
    ),
    "spectral norm": (
        parametrizations.spectral_norm(nn.Linear(4, 3)),
        (x(2, 4),),
        {"parametrizations.weight.original": "contraction"},
    ),
    "orthogonal": (
        parametrizations.orthogonal(nn.Linear(4, 4)),
        (x(2, 4),),
        {"parametrizations.weight.original": "contraction", "bias": "addition"},
    ),
    "checkpointed": (
        Of(lambda m, x: checkpoint(lambda y: y @ m.p, x, use_reentrant=False), p=(4, 3)),
        (x(2, 4),),
        {"p": "contraction"},
    ),
    "frozen": (
        nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2)),
        (x(2, 4),),
        {"0.weight": "contraction"},
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings(
    "ignore:.*cpu.amp.autocast:FutureWarning"
)  # checkpoints of torch 2.4 use it
@pytest.mark.parametrize("case", CASES)
def test_each_use_is_recognized(case: str) -> None:
    """The trace tells every way to use a parameter, through views, casts, copies and functions
    of it.
    """
    model, inputs, expected = CASES[case]
    found = wdhook.audit(model, *inputs)
    assert {name: str(found[name].use) for name in expected} == expected


@pytest.mark.parametrize("case", ["matmul", "gain", "looked up", "weight norm", "lstm"])
def test_uses_are_told_on_the_meta_device(case: str) -> None:
    """Without memory or arithmetic the uses are the same; invariance is not told."""
    model, inputs, _ = CASES[case]
    expected = [f.use for f in wdhook.audit(model, *inputs).values()]
    found = wdhook.audit(Of.to(model, "meta"), *(t.to("meta") for t in inputs))
    assert [f.use for f in found.values()] == expected
    assert found.threshold is None
    assert all(f.invariant is None for f in found.values())


class Straight(torch.autograd.Function):
    """Multiplies, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum(0)


@torch.library.custom_op(
    "wdhook_tests::scaled", mutates_args=(), schema="(Tensor x, Tensor w) -> Tensor"
)
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w


scaled.register_autograd(lambda ctx, grad: (grad, grad.sum(0)))


@pytest.mark.parametrize(
    "function", [lambda m, x: Straight.apply(x, m.p[None].squeeze(0)), lambda m, x: scaled(x, m.p)]
)
def test_what_cannot_be_seen_through_is_opaque(function: Callable[..., Tensor]) -> None:
    """Custom autograd functions and operators are not guessed at: the static role stays, and
    nothing is flagged.
    """
    found = wdhook.audit(Of(function, p=(4,)), x(2, 4))["p"]
    assert found.use is Use.OPAQUE
    assert found.agrees is None
    assert found.role is found.static_role
    assert found.operations in (("Straight",), ("wdhook_tests::scaled",))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_operators_that_take_functions_are_opaque() -> None:
    """`flex_attention` is no operator with a schema: what it is given is opaque, what comes out
    is data.
    """
    flex = pytest.importorskip(
        "torch.nn.attention.flex_attention"
    ).flex_attention  # since torch 2.5

    def forward(m: Any, x: Tensor) -> Tensor:
        return flex(m.p.expand(2, 1, 16, 16), x, x) * m.q

    model = Of(forward, p=(1, 1, 16, 16), q=(16,)).requires_grad_(
        False
    )  # on the CPU it has no backward pass
    found = wdhook.audit(model, x(2, 1, 16, 16))
    assert [(str(f.use), f.operations) for f in found.values()] == [
        ("opaque", ("flex_attention",)),
        ("multiplication", ("mul[other]",)),
    ]


def test_compiled_functions_are_seen_through() -> None:
    """A function that the forward pass calls compiled runs as it was written."""

    @torch.compile(backend="eager")
    def gained(x: Tensor, p: Tensor) -> Tensor:
        return torch.sin(x) * p

    found = wdhook.audit(Of(lambda m, x: gained(x, m.p), p=(4,)), x(2, 4))
    assert found["p"].operations == ("mul[other]",)


@dataclass
class Output:
    """As libraries return them."""

    logits: Tensor
    hidden: dict[str, list[Tensor]]


def test_inputs_and_outputs_may_be_nested() -> None:
    """Keyword inputs in containers are followed, and every output tensor counts, also in a
    dataclass.
    """

    def forward(m: Any, batch: dict[str, list[Tensor]], *, extra: tuple[Tensor, Tensor]) -> Output:
        return Output(batch["a"][0] @ m.p, {"h": [extra[1] * m.q]})

    found = wdhook.audit(Of(forward, p=(4, 3), q=(4,)), {"a": [x(2, 4)]}, extra=(x(2, 4), x(2, 4)))
    assert [str(f.use) for f in found.values()] == ["contraction", "multiplication"]
    assert all(f.sensitivity is not None for f in found.values())


def test_an_output_that_is_hidden_is_missed() -> None:
    """Twin: what only an object that the audit cannot enter holds has no gradient."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Any]:
        y = x @ m.q
        return x @ m.p, lambda: y

    assert wdhook.audit(Of(forward, p=(4, 3), q=(4, 3)), x(2, 4))["q"].sensitivity is None
