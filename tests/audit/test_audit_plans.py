"""Modules whose uses are known by construction: a plan that follows the audit is right, and
never worse.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from modules import Of
from torch import Tensor, nn

import wdhook


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rotated(m: Any, x: Tensor) -> Tensor:
    """OFT: an orthogonal matrix from a skew-symmetric one, multiplied onto a weight."""
    skew, one = m.r - m.r.T, torch.eye(4)
    return F.linear(x, (torch.linalg.solve(one + skew, one - skew) @ m.w.T).T)


def delta(m: Any, x: Tensor, c: Tensor) -> Tensor:
    """A weight to which a network adds, for one sample."""
    return F.linear(x, m.w + m.h(c).view(3, 4))


def state_space(m: Any, x: Tensor) -> Tensor:
    decay, h = -torch.exp(m.A_log), torch.zeros(2, 3, 4)
    dt = F.softplus(m.dt(x))
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * decay) * h + x[:, t, :, None]
    return h.sum(-1)


def fourier(m: Any, x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, n=8) * torch.fft.rfft(m.kernel, n=8), n=8)


def attended(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q(m.latents)[None], m.k(x), x)


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


ENCODER = {
    "self_attn.in_proj_weight": "contraction",
    "self_attn.in_proj_bias": "addition",
    "self_attn.out_proj.weight": "contraction",
    "linear1.weight": "contraction",
    "linear1.bias": "addition",
    "norm1.weight": "norm",
    "norm2.bias": "norm",
}

# name → (module, inputs, parameter → its use); contractions and lookups are decayed, the others
# are not.
CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, str]]] = {
    "U @ V.T as a weight": (
        Of(lambda m, x: F.linear(x, m.U @ m.V.T), U=r(3, 2), V=r(4, 2)),
        (r(5, 4),),
        {"U": "contraction", "V": "contraction"},
    ),
    "U @ V.T from the left": (
        Of(lambda m, x: (m.U @ m.V.T) @ x, U=r(3, 2), V=r(4, 2)),
        (r(4, 5),),
        {"U": "contraction", "V": "contraction"},
    ),
    "F.linear of two parameters": (
        Of(lambda m, x: F.linear(x, F.linear(m.U, m.V)), U=r(3, 2), V=r(4, 2)),
        (r(5, 4),),
        {"U": "contraction", "V": "contraction"},
    ),
    "einsum of two parameters": (
        Of(lambda m, x: F.linear(x, torch.einsum("ir,jr->ij", m.U, m.V)), U=r(3, 2), V=r(4, 2)),
        (r(5, 4),),
        {"U": "contraction", "V": "contraction"},
    ),
    "a singular value decomposition": (
        Of(lambda m, x: F.linear(x, (m.U * m.s) @ m.V.mT), U=r(3, 2), V=r(4, 2), s=r(2)),
        (r(5, 4),),
        {"U": "contraction", "V": "contraction"},
    ),
    "LoRA, merged": (
        Of(
            lambda m, x: F.linear(x, m.w + (m.lora_A.T @ m.lora_B.T).T),
            w=r(3, 4),
            lora_A=r(2, 4),
            lora_B=r(3, 2),
        ),
        (r(5, 4),),
        {"w": "contraction", "lora_A": "contraction", "lora_B": "contraction"},
    ),
    "OFT": (Of(rotated, r=r(4, 4), w=r(3, 4)), (r(5, 4),), {"w": "contraction"}),
    "kron": (
        Of(lambda m, x: F.linear(x, torch.kron(m.a, m.b)), a=r(2, 2), b=r(3, 4)),
        (r(5, 8),),
        {"a": "contraction", "b": "contraction"},
    ),
    "kernels that are merged": (
        Of(
            lambda m, x: F.conv2d(x, F.conv2d(m.k1, m.k2.permute(1, 0, 2, 3))),
            k1=r(3, 2, 3, 3),
            k2=r(2, 2, 1, 1),
        ),
        (r(1, 2, 5, 5),),
        {"k2": "contraction"},
    ),
    "a weight and what a network adds": (
        Of(delta, w=r(3, 4), h=nn.Linear(5, 12)),
        (r(2, 4), r(1, 5)),
        {"w": "contraction", "h.weight": "contraction", "h.bias": "addition"},
    ),
    "attention vectors": (
        Of(lambda m, x: (x * m.a).sum(-1), a=r(1, 2, 4)),
        (r(5, 2, 4),),
        {"a": "contraction"},
    ),
    "convolution by Fourier transform": (
        Of(fourier, kernel=r(3, 8)),
        (r(2, 3, 8),),
        {"kernel": "contraction"},
    ),
    "attention on the fast path": (
        nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False),
        (r(2, 5, 8),) * 3,
        {
            "in_proj_weight": "contraction",
            "in_proj_bias": "addition",
            "out_proj.weight": "contraction",
            "out_proj.bias": "addition",
        },
    ),
    "an encoder layer on the fast path": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False),
        (r(2, 5, 8),),
        ENCODER,
    ),
    "experts that the data pick": (
        Of(lambda m, x, i: torch.bmm(m.w[i], x[..., None]), w=r(4, 3, 4)),
        (r(5, 4), torch.tensor([0, 1, 2, 3, 0])),
        {"w": "contraction"},
    ),
    "a table larger than the batch": (
        Of(
            lambda m, x: (x.mean(1, keepdim=True) + m.pos_embed) @ m.w,
            pos_embed=r(1, 6, 4),
            w=r(4, 3),
        ),
        (r(1, 3, 4),),
        {"pos_embed": "addition", "w": "contraction"},
    ),
    "a gain larger than the batch": (
        Of(lambda m, x: (x * m.scale) @ m.w, scale=r(1, 6, 4), w=r(4, 3)),
        (r(1, 1, 4),),
        {"scale": "multiplication", "w": "contraction"},
    ),
    "a gain larger than the batch, then a convolution": (
        Of(lambda m, x: F.conv1d(x * m.gain, m.w), gain=r(1, 4, 6), w=r(3, 4, 3)),
        (r(1, 4, 1),),
        {"gain": "multiplication", "w": "contraction"},
    ),
    "a bias larger than the sample": (
        Of(lambda m, x: x + m.time_bias, time_bias=r(6, 4)),
        (r(1, 4),),
        {"time_bias": "addition"},
    ),
    "outer gains": (
        Of(lambda m, x: x * (m.row_scale[:, None] * m.col_scale), row_scale=r(3), col_scale=r(4)),
        (r(2, 3, 4),),
        {"row_scale": "multiplication", "col_scale": "multiplication"},
    ),
    "a state space": (
        Of(state_space, A_log=r(3, 4), dt=nn.Linear(3, 3)),
        (r(2, 5, 3),),
        {"A_log": "constant", "dt.weight": "contraction", "dt.bias": "addition"},
    ),
    "queries through a layer": (
        Of(attended, latents=r(6, 4), q=linear(), k=linear()),
        (r(1, 3, 4),),
        {"latents": "token", "q.weight": "contraction", "k.weight": "contraction"},
    ),
    "a gain, summed over the batch": (
        Of(lambda m, x: (x * m.gamma).sum(0), gamma=r(4)),
        (r(5, 4),),
        {"gamma": "multiplication"},
    ),
    "an embedding that is renormed": (
        nn.Embedding(7, 4, max_norm=1.0),
        (torch.tensor([1, 2]),),
        {"weight": "lookup"},
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("case", CASES)
def test_uses_and_plans(case: str) -> None:
    """Each use is what the module was built for, and so is the plan that follows the audit."""
    model, inputs, expected = CASES[case]
    found = wdhook.audit(model, *inputs)
    assert {name: str(found[name].use) for name in expected} == expected
    made = wdhook.plan(model, 0.1, audit=found)
    decayed = {name for name in expected if made[name].weight_decay > 0}
    assert decayed == {n for n, use in expected.items() if use in ("contraction", "lookup")}


# name → (module, inputs, parameter): the operations have two meanings, and the plan outranks them.
UNDECIDED: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "a gain whose product is summed": (
        Of(lambda m, x: (F.normalize(x) * m.gamma).sum(-1), gamma=r(4)),
        (r(5, 4),),
        "gamma",
    ),
    "positions of one sample that meet keys": (
        Of(lambda m, x, k: (x + m.pos_embed) @ k, pos_embed=r(1, 6, 4)),
        (r(1, 6, 4), r(1, 4, 3)),
        "pos_embed",
    ),
    "memory that is fed to keys": (
        Of(lambda m, x: x @ m.k(m.mem_tokens).mT, mem_tokens=r(3, 4), k=linear()),
        (r(2, 5, 4),),
        "mem_tokens",
    ),
    "single elements that are picked, as of a histogram": (
        Of(lambda m, i: m.unnormalized_heights.gather(1, i), unnormalized_heights=r(3, 4)),
        (torch.ones(3, 2, dtype=torch.long),),
        "unnormalized_heights",
    ),
    "a bias for each user": (
        Of(lambda m, i: m.user_bias[i], user_bias=r(5)),
        (torch.ones(3, dtype=torch.long),),
        "user_bias",
    ),
    "a weight of full rank from the left": (
        Of(lambda m, x: F.linear(m.weight_u, m.weight_v) @ x, weight_u=r(3, 4), weight_v=r(5, 4)),
        (r(5, 2),),
        "weight_u",
    ),
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_where_operations_have_two_meanings_the_plan_stays(case: str) -> None:
    """Evidence that is weaker than a name does not overturn a plan: undecided, and said as that."""
    model, inputs, name = UNDECIDED[case]
    found = wdhook.audit(model, *inputs)
    assert found[name].agrees is None
    assert found.traced_role(name) is None
    assert found[name] in found.undecided
    assert wdhook.plan(model, 0.1, audit=found)[name] == wdhook.plan(model, 0.1)[name]


def test_one_meaning_overturns_a_plan() -> None:
    """Twin: a matrix that is broadcast over data is a gain, whatever its name and shape."""
    model = Of(lambda m, x: x * m.mixer, mixer=r(4, 6))
    found = wdhook.audit(model, r(2, 4, 6))
    assert found["mixer"].agrees is False
    assert wdhook.plan(model, 0.1)["mixer"].weight_decay == 0.1
    assert wdhook.plan(model, 0.1, audit=found)["mixer"].weight_decay == 0.0


def test_the_headline_counts_both() -> None:
    """The first line tells how many uses contradict the plan, and how many are undecided."""
    model = Of(lambda m, x: (x * m.mixer) @ m.w, mixer=r(4, 6), w=r(6, 3), idle=r(3))
    line = str(wdhook.audit(model, r(2, 4, 6))).splitlines()[0]
    assert line == "audit of 3 tensors in training mode: 1 contradicts the plan; 1 undecided"
