"""Models whose scale invariance is known by analysis: no verdict is wrong, for any seed.

Each parameter is T (invariant), F (its scale matters) or N (the outputs do not depend on it: no
verdict).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from modules import Of
from torch import Tensor, nn

import wdhook

SEEDS = 5
WORDS = {True: "T", False: "F", None: "N"}
Case = tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, str]]


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def normed(norm: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A linear layer, a norm in Python, and another linear layer."""
    a, h = (lambda: nn.Linear(8, 6, bias=False)), (lambda: nn.Linear(6, 3))
    return lambda: Of(lambda m, x: m.h(norm(m.a(x))), a=a(), h=h())


def mean_square(y: Tensor) -> Tensor:
    return y.pow(2).mean(-1, keepdim=True)


NORMED = {"a.weight": "T", "h.weight": "F"}
EPS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm with eps in code": lambda y: F.layer_norm(y, (6,), None, None, 1e-5),
    "sqrt(var + eps)": lambda y: y / torch.sqrt(y.var(-1, keepdim=True) + 1e-5),
    "var + eps, expanded later": lambda y: y / (y.var(-1) + 1e-5).sqrt()[:, None].expand(-1, 6),
    "rsqrt": lambda y: y * torch.rsqrt(mean_square(y) + 1e-6),
    "a power": lambda y: y * (mean_square(y) + 1e-6) ** -0.5,
    "std + eps": lambda y: y / (y.std(-1, keepdim=True) + 1e-4),
    "norm + eps": lambda y: y / (y.norm(dim=-1, keepdim=True) * 6**-0.5 + 1e-3),
    "1 / (std + eps)": lambda y: y * (1 / (y.std(-1, keepdim=True) + 1e-5)),
    "F.normalize": lambda y: F.normalize(y, dim=-1),
}


class WithEps(nn.Module):
    """An RMS norm in Python with an eps attribute."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(mean_square(x) + self.eps)


def standardised(m: Any, x: Tensor) -> Tensor:
    w = m.p - m.p.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5)) * m.g[:, None, None]


CASES: dict[str, Case] = {
    **{name: (normed(norm), lambda: r(5, 8), NORMED) for name, norm in EPS.items()},
    **{
        f"an eps attribute of {eps}": (
            lambda eps=eps: nn.Sequential(
                nn.Linear(8, 6, bias=False), WithEps(eps), nn.Linear(6, 3)
            ),
            lambda: r(5, 8),
            {"0.weight": "T", "2.weight": "F"},
        )
        for eps in (1e-6, 0.02, 0.2)
    },
    "a BatchNorm with eps 0.02": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, eps=0.02), nn.Linear(6, 3)),
        lambda: r(9, 8),
        {"0.weight": "T", "0.bias": "N", "2.weight": "F"},
    ),
    "weight standardisation": (
        lambda: Of(standardised, p=r(4, 3, 3, 3) * 0.2, g=torch.ones(4)),
        lambda: r(2, 3, 6, 6),
        {"p": "T", "g": "F"},
    ),
    "a BatchNorm over two samples": (
        lambda: nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 3)),
        lambda: r(2, 8),
        {"0.weight": "N", "0.bias": "N", "2.weight": "F"},
    ),
    "a LayerNorm of two": (
        lambda: nn.Sequential(nn.Linear(8, 2, bias=False), nn.LayerNorm(2), nn.Linear(2, 3)),
        lambda: r(5, 8),
        {"0.weight": "N", "2.weight": "F"},
    ),
    "a depthwise 1×1 convolution before a BatchNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
        ),
        lambda: r(4, 4, 6, 6),
        {"0.weight": "N", "2.weight": "F"},
    ),
    "a scale before a BatchNorm": (
        lambda: Of(
            lambda m, x: m.n(m.a(x) * m.g),
            a=nn.Linear(8, 6, bias=False),
            g=r(6),
            n=nn.BatchNorm1d(6),
        ),
        lambda: r(7, 8),
        {"a.weight": "T", "g": "N", "n.weight": "F"},
    ),
    "complex weights": (
        lambda: Of(
            lambda m, x: (x @ (m.v / m.v.abs().norm())) @ m.w,
            v=r(8, 4, dtype=torch.cfloat),
            w=r(4, 3, dtype=torch.cfloat),
        ),
        lambda: r(5, 8, dtype=torch.cfloat),
        {"v": "T", "w": "F"},
    ),
    "an output that is exactly zero": (
        lambda: Of(
            lambda m, x: (m.h(F.layer_norm(m.a(x), (6,))), F.relu(m.h(m.a(x)).mean() - 1e6)),
            a=nn.Linear(8, 6, bias=False),
            h=nn.Linear(6, 3),
        ),
        lambda: r(5, 8),
        NORMED,
    ),
    "finite masks": (
        lambda: Of(lambda m, x: m.a(x).masked_fill(torch.eye(6).bool(), -1e30), a=nn.Linear(6, 6)),
        lambda: r(6, 6),
        {"a.weight": "F"},
    ),
    "a scalar loss": (
        lambda: Of(
            lambda m, x: m.h(F.layer_norm(m.a(x), (6,))).square().mean(),
            a=nn.Linear(8, 6, bias=False),
            h=nn.Linear(6, 3),
        ),
        lambda: r(5, 8),
        NORMED,
    ),
    "a norm of small activations beside others": (
        lambda: Of(
            lambda m, x: m.h(F.layer_norm(m.b(F.layer_norm(m.a(x), (6,)) * 1e-4), (6,))),
            a=nn.Linear(8, 6, bias=False),
            b=nn.Linear(6, 6, bias=False),
            h=nn.Linear(6, 3),
        ),
        lambda: r(9, 8),
        {**NORMED, "b.weight": "T"},
    ),
    "LayerScale at its start": (
        lambda: Of(
            lambda m, x: m.h(x + m.g * m.a(F.layer_norm(x, (6,)))),
            a=nn.Linear(6, 6),
            g=torch.full((6,), 1e-6),
            h=nn.Linear(6, 3),
        ),
        lambda: r(9, 6),
        {"a.weight": "F", "g": "F", "h.weight": "F"},
    ),
    "softmax with its maximum detached, normalized": (
        lambda: Of(
            lambda m, x: F.normalize(
                (m.a(x) - m.a(x).amax(-1, keepdim=True).detach()).exp(), p=1, dim=-1
            ),
            a=nn.Linear(6, 4),
        ),
        lambda: r(5, 6),
        {"a.weight": "F"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_verdict_is_wrong(case: str) -> None:
    """What analysis says of a model, the audit says for each draw of weights and inputs."""
    build, inputs, expected = CASES[case]
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = build()
        found = wdhook.audit(model, inputs())
        for name, wanted in expected.items():
            assert WORDS[found[name].invariant] == wanted, (seed, found[name])


def test_the_cases_hold_all_answers() -> None:
    """Twin: an audit that said one thing always would fail."""
    wanted = [answer for _, _, expected in CASES.values() for answer in expected.values()]
    assert min(wanted.count(answer) for answer in "TFN") >= 5


class Float32Inside(nn.Module):
    """Cannot run in float64: a constant is in float32."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) @ torch.ones(self.width, 4)


@pytest.mark.parametrize("case", ["std + eps", "a BatchNorm over two samples", "rsqrt"])
def test_the_verdicts_in_float32_are_those_in_float64(case: str) -> None:
    """Coarser arithmetic may lose a verdict, and never turns one over."""
    build, inputs, expected = CASES[case]
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        found = wdhook.audit(Float32Inside(build(), 3), inputs())
        assert found.dtype == "float32"
        for name, wanted in expected.items():
            assert WORDS[found[f"body.{name}"].invariant] in (wanted, "N")
    assert (
        WORDS[found["body.2.weight" if "2.weight" in expected else "body.h.weight"].invariant]
        == "F"
    )


def test_no_weight_and_no_row_is_invariant_by_chance() -> None:
    """Blocks with an eps in their code and a scalar loss: no scale does not matter, in 400
    weights.
    """
    invariant = rows = 0
    for seed in range(20):
        torch.manual_seed(seed)
        layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(20))

        def forward(m: Any, x: Tensor) -> Tensor:
            for layer in m.layers:
                x = x + layer(F.layer_norm(x, (12,), None, None, 1e-2))
            return x.square().mean()

        found = wdhook.audit(Of(forward, layers=layers), r(6, 12) * 0.05)
        for finding in found.values():
            invariant += finding.invariant is True
            rows += finding.rows[0] if finding.rows else 0
    assert (invariant, rows) == (0, 0)


# ----------------------------------------------------------------------------------------------
# disagreement


class Sign(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


DISAGREE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a norm behind a stop-gradient": lambda m, x: x @ (m.w / m.w.norm().detach()),
    "a gradient that is projected": lambda m, x: x @ (m.w / m.w.norm() * m.w.norm().detach()),
    "a straight-through sign": lambda m, x: x @ (m.w + (m.w.sign() - m.w).detach()),
    "an estimator of its own": lambda m, x: x @ Sign.apply(m.w),
    "under no_grad": lambda m, x: x @ (m.w / torch.no_grad()(torch.norm)(m.w)),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_outputs_and_gradients_that_disagree_are_named(case: str) -> None:
    """Euler's identity is about gradients: where they are not those of the outputs, no verdict
    is given.
    """
    torch.manual_seed(0)
    found = wdhook.audit(Of(DISAGREE[case], w=r(8, 4)), r(5, 8))
    assert found["w"].invariant is None
    assert found["w"].doubt == "undecided: outputs and gradients disagree"
    assert found.stopped == ("w",)
    assert "outputs and gradients disagree for 1 tensor" in str(found)


AGREE: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "no stop-gradient": (lambda m, x: x @ (m.w / m.w.norm()), True),
    "a shift that does not matter": (
        lambda m, x: ((x @ m.w) - (x @ m.w).amax(-1, keepdim=True).detach()).softmax(-1),
        False,
    ),
    "a detached output": (lambda m, x: (x @ m.w, (x @ m.w).detach().norm()), False),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", AGREE)
def test_stop_gradients_that_change_nothing_are_not_named(case: str) -> None:
    """Twin: where outputs and gradients agree all the same, the verdict stays."""
    torch.manual_seed(0)
    function, invariant = AGREE[case]
    found = wdhook.audit(Of(function, w=r(8, 4)), r(5, 8))
    assert found["w"].invariant is invariant
    assert found.stopped == ()
