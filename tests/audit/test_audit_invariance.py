"""On which weights decay acts on the step size alone: known cases, and a slow twin that scales
each weight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wdhook
from wdhook._audit.invariance import Projections, scales, threshold


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Self-attention of one head or more, with norms of queries and keys on demand."""

    def __init__(self, qk_norm: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(4) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)


class Fused(nn.Module):
    """Queries and keys in one matrix, of which only the queries are normalized, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(6, 8, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return self.norm(q) * k


class Residual(nn.Module):
    """A branch before a norm, with or without the stream beside it."""

    def __init__(self, stream: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.stream = nn.Linear(8, 8, bias=False), nn.LayerNorm(8), stream

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc(x) if self.stream else self.fc(x))


class LayerScaled(nn.Module):
    """A branch that is switched off by a gain of zero, as at the start of many trainings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.last = nn.Conv1d(4, 3, 1)
        self.gain = nn.Parameter(torch.zeros(3, 1))
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.last(self.norm(self.conv(x)))


def conv_norm(training: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    ).train(training)


def ready(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The model after its lazy parameters were made."""
    model(*inputs)
    return model


IMAGE, ROWS = x(4, 3, 6, 6), x(6, 8)
# model, inputs, parameter -> (invariant, rows that are)
CASES: dict[str, tuple[nn.Module, Tensor, dict[str, tuple[bool, int]]]] = {
    "before a BatchNorm": (
        ready(conv_norm(True), IMAGE),
        IMAGE,
        {"0.weight": (True, 4), "4.weight": (False, 0)},
    ),
    "before a BatchNorm that stands still": (
        ready(conv_norm(False), IMAGE),
        IMAGE,
        {"0.weight": (False, 0)},
    ),
    "before a LayerNorm": (Residual(stream=False), ROWS, {"fc.weight": (True, 0)}),
    "before a LayerNorm, beside a bias": (
        nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)),
        ROWS,
        {"0.weight": (False, 0)},
    ),
    "beside a residual stream": (Residual(stream=True), ROWS, {"fc.weight": (False, 0)}),
    "two layers before a norm": (
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5)),
        ROWS,
        {"0.weight": (False, 0), "2.weight": (True, 5)},
    ),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
        IMAGE,
        {"0.weight": (True, 4)},
    ),
    "direction of a weight norm": (
        parametrizations.weight_norm(nn.Linear(8, 3)),
        ROWS,
        {
            "parametrizations.weight.original1": (True, 3),
            "parametrizations.weight.original0": (False, 0),
        },
    ),
    "spectral norm": (
        parametrizations.spectral_norm(nn.Linear(8, 3)),
        ROWS,
        {"parametrizations.weight.original": (True, 0)},
    ),
    "norms of queries and keys": (
        Attention(qk_norm=True),
        x(2, 5, 8),
        {"q.weight": (True, 0), "k.weight": (True, 0), "v.weight": (False, 0)},
    ),
    "queries and keys without norms": (
        Attention(qk_norm=False),
        x(2, 5, 8),
        {"q.weight": (False, 0)},
    ),
    "half of a matrix": (Fused(), x(7, 6), {"qk.weight": (False, 4)}),
    "behind zeros": (
        LayerScaled(),
        x(4, 3, 9),
        {"conv.weight": (True, 4), "last.weight": (False, 0)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_known_cases(case: str) -> None:
    """Euler's identity tells the scale that matters from the one that does not, as a whole and
    row by row.
    """
    model, inputs, expected = CASES[case]
    found = wdhook.audit(model, inputs)
    assert {n: (found[n].invariant, (found[n].rows or (0, 0))[0]) for n in expected} == expected
    assert found.dtype == "float64"


def test_what_has_no_gradient_is_not_called_invariant() -> None:
    """Behind a dead ReLU, and a bias before a BatchNorm: the outputs do not depend on them at
    all.
    """
    dead = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    found = wdhook.audit(dead, ROWS)
    assert [found[n].invariant for n in ("0.weight", "2.weight", "2.bias")] == [None, None, False]
    assert found["0.weight"].sensitivity is None
    assert "no gradient" in str(found)
    shifted = wdhook.audit(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), ROWS)
    assert shifted["0.bias"].sensitivity is None
    assert shifted["1.bias"].sensitivity is not None


def test_a_gradient_that_is_zero_would_pass_eulers_identity() -> None:
    """Twin: ⟨w, 0⟩ = 0, so the identity alone does not tell the two apart."""
    w = torch.ones(3)
    assert torch.dot(w, torch.zeros(3)) == 0


# ---------------------------------------------------------------------------------------------- a
# slow twin


def scale_matters(model: nn.Module, inputs: Tensor, name: str) -> bool:
    """Whether the outputs change when one parameter is multiplied by two, in float64."""
    model, inputs = model.double(), inputs.double()
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        before = model(inputs)
        parameter.mul_(2)
        after = model(inputs)
        parameter.div_(2)
    # By the mean value theorem the change is at most log 2 · max |∂y/∂log α|; for an invariant
    # weight this is ε/(σ² + ε) · |y| with ε = 1e-14 below and σ² > 1e-4, so 1e-10 · |y|, and
    # rounding is smaller still.
    return bool((after - before).abs().max() > 1e-8 * before.abs().max())


def _random_network(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    width = 6
    for kind in torch.randint(0, 7, (6,), generator=generator).tolist():
        layers += [
            [nn.Linear(width, width)],
            [nn.Linear(width, width, bias=False)],
            [nn.BatchNorm1d(width, eps=1e-14)],
            [nn.LayerNorm(width, eps=1e-14)],
            [nn.ReLU()],
            [nn.GELU()],
            [nn.RMSNorm(width, eps=1e-14)],
        ][kind]
    model = nn.Sequential(nn.Linear(width, width, bias=False), *layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("seed", range(40))
def test_the_slow_twin_agrees(seed: int) -> None:
    """For random stacks of layers, multiplying each weight by two says the same as one backward
    pass for all.
    """
    model = _random_network(seed)
    inputs = x(16, 6)
    found = wdhook.audit(model, inputs)
    for name, finding in found.items():
        if name.endswith("weight"):
            matters = scale_matters(model, inputs, name)
            assert matters is (finding.invariant is False), (name, finding, model)


def test_the_slow_twin_sees_both() -> None:
    """Twin of the twin: among the weights above there are many of both kinds."""
    said = [
        f.invariant
        for s in range(40)
        for n, f in wdhook.audit(_random_network(s), x(16, 6)).items()
        if "weight" in n
    ]
    assert min(said.count(True), said.count(False)) > 20


# ----------------------------------------------------------------------------------------------
# arithmetic


class Float32Inside(nn.Module):
    """Holds a constant that only float32 matrices can be multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(x)) @ torch.ones(8, 8, dtype=torch.float32))


def test_what_does_not_run_in_float64_runs_in_its_own_type() -> None:
    """The findings are the same up to the wider threshold, and the audit says which arithmetic
    it used.
    """
    found = wdhook.audit(Float32Inside(), ROWS)
    assert found.dtype == "float32"
    assert found.threshold is not None
    assert threshold(torch.finfo(torch.float32).eps, 0) <= found.threshold < 1e-2
    assert [found[n].invariant for n in ("fc.weight", "out.weight")] == [True, False]


def test_norms_that_compute_in_float32_are_followed_in_float64() -> None:
    """A cast to float32 in the forward pass, as in most RMSNorms of language models, costs no
    digits of the audit.
    """

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.to(torch.float32)
            return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).to(x.dtype)

    found = wdhook.audit(nn.Sequential(nn.Linear(8, 8, bias=False), Norm(), nn.Linear(8, 3)), ROWS)
    assert found["0.weight"].invariant
    # Rounding alone: far below what float32 leaves, 1e-8 and more.
    assert found["0.weight"].sensitivity is not None
    assert found["0.weight"].sensitivity < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_every_type_are_audited_in_float64(dtype: torch.dtype) -> None:
    """A model in low precision is not judged by its rounding."""
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)
    found = wdhook.audit(model, ROWS.to(dtype))
    assert found.dtype == "float64"
    assert [found[n].invariant for n in ("0.weight", "2.weight")] == [True, False]
    assert next(model.parameters()).dtype is dtype


def test_under_autocast() -> None:
    """Autocast leaves float64 alone, so the audit under it says what it says without."""
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    plain = wdhook.audit(model, ROWS).to_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wdhook.audit(model, ROWS).to_dict() == plain


# ---------------------------------------------------------------------------------------------- eps


def _normed(eps: float, scale: float) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, eps=eps), nn.Linear(6, 3)), ROWS * scale


def test_eps_is_told_and_does_not_decide() -> None:
    """Whether the network normalizes a weight away is one question; how far eps spoils it now
    is another number.
    """
    for eps, scale in ((1e-5, 1.0), (1e-5, 1e-2), (1e-3, 1e-1)):
        model, inputs = _normed(eps, scale)
        found = wdhook.audit(model, inputs)
        assert found["0.weight"].invariant
        variance = model[0](inputs).var(0, unbiased=False).detach()
        κ = eps / (variance + eps)
        share = float((κ.square() * (1 - κ)).mean().sqrt())
        assert found.eps_share == pytest.approx(share, rel=1e-4)  # float32 against float64
        assert model[1].eps == eps


def _divided(eps: Any) -> nn.Module:
    """A linear layer, a norm whose eps is written into the code, and another linear layer."""

    class Hard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + eps)

    return nn.Sequential(nn.Linear(8, 6), Hard(), nn.Linear(6, 3))


def test_eps_in_code_is_told_and_does_not_decide() -> None:
    """An eps that is written into the code is taken out for the audit like that of a module."""
    found = wdhook.audit(_divided(1e-3), ROWS)
    assert found.threshold == threshold(torch.finfo(torch.float64).eps, 0)
    assert found.eps_share > 1e-4
    assert found["0.weight"].sensitivity is not None
    assert found["0.weight"].sensitivity < 1e-12  # rounding alone
    assert found["0.weight"].invariant
    assert found["2.weight"].invariant is False


def test_eps_that_cannot_be_seen_decides() -> None:
    """Twin: an eps in a tensor of ones is no constant that could be taken out, and the scale
    matters.
    """
    found = wdhook.audit(_divided(torch.full((6,), 1e-3)), ROWS)
    assert found["0.weight"].invariant is False


def test_small_activations_behind_an_eps_in_code_do_not_silence_the_model() -> None:
    """A norm that hardly normalizes today is told as a share; the verdicts on the model stay."""
    found = wdhook.audit(_divided(1e-2), ROWS * 0.1)
    assert found.eps_share > 0.1
    assert [found[n].invariant for n in ("0.weight", "2.weight")] == [True, False]
    assert "eps makes scale invariance approximate (" in str(found)


def test_where_eps_hides_everything_nothing_is_told() -> None:
    """With an eps that stays and a threshold of no use, invariance is not told, and that is
    said.
    """
    w = _matrix(5, 7).requires_grad_()
    outputs = [_matrix(9, 5) @ w]
    leak = 0.2
    assert threshold(1e-16, leak) > 1
    found = scales(Projections(outputs, {"w": w}), {"w": w}, {}, 1e-16, leak)["w"]
    assert found.invariant is None
    assert found.doubt == "undecided: eps or rounding hides it"


# ----------------------------------------------------------------------------------------------
# chance


def _matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_more_projections_guard_against_chance() -> None:
    """With a coarse threshold one projection calls some weights invariant by chance, several
    none.
    """
    leak = 0.01  # threshold 0.1
    c = _matrix(9, 5)
    once = often = 0
    for seed in range(400):
        w = _matrix(5, 7, seed=seed).requires_grad_()
        g = Projections([c @ w], {"w": w}, 1000 + seed).gradients(["w"])["w"]
        once += bool(35**0.5 * (w * g).sum().abs() <= threshold(1e-16, leak) * w.norm() * g.norm())
        found = scales(Projections([c @ w], {"w": w}, 1000 + seed), {"w": w}, {}, 1e-16, leak)["w"]
        often += bool(found.invariant)
    # P(|N(0, 1)| < 0.1) = 0.08: binomial with a mean of 32 in 400 draws, and a deviation of 5.4.
    assert 10 < once < 60
    # The chance of one is 1e-4 for each of the 400 models.
    assert often == 0


def _counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The number of parameters of each projection from now on."""
    calls: list[int] = []
    original = Projections.gradients

    def counting(self: Projections, names: Any) -> Any:
        calls.append(len(names))
        return original(self, names)

    patch.setattr(Projections, "gradients", counting)
    return calls


def test_one_projection_is_enough_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a second backward pass is not paid where chance errs in one of a million
    models.
    """
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    calls = _counted(monkeypatch)
    wdhook.audit(model, ROWS)
    assert calls == [6]


def test_more_projections_where_one_leaves_too_much_to_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twin: with a coarse threshold, what looks invariant is asked again until chance is
    negligible.
    """
    c, w = _matrix(50, 6), _matrix(6, 4).requires_grad_()
    leaves = {"w": w, "v": _matrix(3, 3, seed=1).requires_grad_()}
    outputs = [c @ (w / w.norm()) + 1e-3 * w.sum(), leaves["v"] * 2]
    calls = _counted(monkeypatch)
    found = scales(Projections(outputs, leaves), leaves, {}, 1e-16, 0.01)
    assert calls[0] == 2
    assert calls[1:] == [1] * (len(calls) - 1)
    assert len(calls) > 1
    assert [found[n].invariant for n in leaves] == [True, False]


@pytest.mark.parametrize("columns", [2, 200])
def test_the_sensitivity_is_of_the_order_of_one(columns: int) -> None:
    """For the linear function f(w) = Cw of random C and w, s is about |N(0, 1)|, whatever the
    size of w.
    """
    c = _matrix(50, 8)
    squares = []
    for seed in range(300):
        w = _matrix(8, columns, seed=seed).requires_grad_()
        s = scales(Projections([c @ w], {"w": w}, 1000 + seed), {"w": w}, {}, 1e-16, 0.0)[
            "w"
        ].sensitivity
        assert s is not None
        squares.append(s**2)
    # The mean of 300 squares of normal variables is 1 ± 0.08; that C and w are themselves random
    # adds some.
    assert 0.5 < sum(squares) / len(squares) < 2


@pytest.mark.filterwarnings(
    "ignore:.*cpu.amp.autocast:FutureWarning"
)  # checkpoints of torch 2.4 use it
def test_reentrant_checkpoints() -> None:
    """They know `backward` alone, and are told all the same."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(
                self.body, x.requires_grad_(), use_reentrant=True
            )

    found = wdhook.audit(Checkpointed(), ROWS)
    assert found["body.0.weight"].invariant
    assert found["body.1.weight"].invariant is False
    assert ROWS.requires_grad is False


def test_outputs_that_are_not_finite_are_left_out() -> None:
    """Masks of -inf in the outputs, as in logits of forbidden tokens, do not spoil the
    gradients.
    """

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    assert wdhook.audit(Masked(), ROWS)["fc.weight"].invariant is False
