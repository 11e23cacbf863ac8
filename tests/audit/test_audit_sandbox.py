"""An audit changes nothing: each thing that a forward or backward pass could change is as it
was.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wdhook


class Meddler(nn.Module):
    """Changes in its forward pass whatever a module can change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 4)
        self.register_buffer("counter", torch.zeros(()))
        self.cache = torch.zeros(4)
        self.calls = 0
        self.history: list[int] = []
        self.nested: dict[str, list[int]] = {"seen": []}

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x.add_(1)
        self.calls += 1
        self.history.append(self.calls)
        self.nested["seen"].append(self.calls)
        self.counter.add_(1)
        self.cache.add_(x.detach().mean(0).float())
        self.extra = x
        with torch.no_grad():
            self.last.weight.mul_(0.5)
        self.last.bias.requires_grad_(False)
        self.last.eval()
        random.random()
        np.random.rand()
        y = self.last(self.drop(self.norm(self.fc(x))))
        if fail:
            raise KeyError("in the middle")
        return y


def observed(model: Meddler, x: Tensor) -> dict[str, Any]:
    """Copies of everything that `Meddler` and a backward pass change, in comparable form."""
    return {
        "buffers": [b.tolist() for b in model.buffers()],
        "parameters": [p.tolist() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [
            None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()
        ],
        "modes": [m.training for m in model.modules()],
        "numbers": model.calls,
        "lists": list(model.history),
        "nested": copy.deepcopy(model.nested),
        "plain tensors": model.cache.tolist(),
        "attributes": sorted(vars(model)),
        "inputs": x.tolist(),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
    }


def made() -> tuple[Meddler, Tensor]:
    """A model with gradients, and an input."""
    torch.manual_seed(0)
    model, x = Meddler(), torch.randn(6, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model, x


KEYS = list(observed(*made()))


@pytest.mark.parametrize("key", KEYS)
def test_an_audit_changes_nothing(key: str) -> None:
    """What a pass would change is equal before and after, gradients are the same objects."""
    model, x = made()
    before, ids = observed(model, x), {n: id(p) for n, p in model.named_parameters()}
    wdhook.audit(model, x)
    assert observed(model, x)[key] == before[key]
    assert {n: id(p) for n, p in model.named_parameters()} == ids


@pytest.mark.parametrize("key", [key for key in KEYS if key != "grad mode"])
def test_a_plain_pass_would_be_seen(key: str) -> None:
    """Twin: a forward and a backward pass of the user's own changes every one of these."""
    model, x = made()
    before = observed(model, x)
    model(x).sum().backward()
    assert observed(model, x)[key] != before[key]


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_changed_where_the_model_fails(key: str) -> None:
    """An error of the forward pass is the user's own, and everything is as it was."""
    model, x = made()
    before = observed(model, x)
    with pytest.raises(KeyError, match="in the middle"):
        wdhook.audit(model, x, fail=True)
    assert observed(model, x)[key] == before[key]


@pytest.mark.filterwarnings(
    "ignore:A parameter got a second gradient"
)  # in the twin, for decoupled decay
@pytest.mark.parametrize("options", [{}, {"at": "step"}, {"mode": "decoupled", "lr": 0.1}], ids=str)
def test_an_attached_handle_does_not_notice(options: dict[str, Any]) -> None:
    """Between two micro-batches of a window an audit is no event: training goes on to the last
    bit as without it.
    """

    def trained(between: Callable[[nn.Module], object]) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        xs = torch.randn(4, 5, 4)
        with wdhook.attach(model, 0.1, optimizer=optimizer, **options) as decay:
            for pair in xs.chunk(2):
                optimizer.zero_grad()
                model(pair[0]).square().sum().backward()
                between(model)
                if options.get("mode") is None:
                    model(pair[1]).square().sum().backward()
                optimizer.step()
            return list(model.state_dict().values()), repr(decay)

    plain, said = trained(lambda model: None)
    audited, same = trained(
        lambda model: wdhook.audit(model, torch.randn(5, 4, generator=torch.Generator()))
    )
    assert same == said
    assert all(torch.equal(a, b) for a, b in zip(plain, audited, strict=True))
    moved, _ = trained(lambda model: model(torch.ones(5, 4)).sum().backward())
    assert not all(
        torch.equal(a, b) for a, b in zip(plain, moved, strict=True)
    )  # a pass of its own is an event


def test_inputs_that_require_a_gradient_get_none() -> None:
    """The audit differentiates copies of the inputs too."""
    x = torch.randn(3, 4, requires_grad=True)
    wdhook.audit(nn.Linear(4, 2), x)
    assert x.grad is None
    assert x.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context: Callable[[], Any]) -> None:
    """In `no_grad` and `inference_mode` the findings are the same, and the mode stays."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    expected = wdhook.audit(model, x).to_dict()
    with context():
        assert wdhook.audit(model, x.clone()).to_dict() == expected
        assert not torch.is_grad_enabled()


def test_it_is_repeatable() -> None:
    """Two audits of one model say the same, to the last bit: the projections come from a
    generator of their own.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    assert wdhook.audit(model, x).to_dict() == wdhook.audit(model, x).to_dict()


def test_wrapped_models_keep_their_names() -> None:
    """torch.compile and DataParallel are looked through; the findings bear the names of the
    wrapped model.
    """
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    x = torch.randn(6, 4)
    expected = [(f.use, f.invariant) for f in wdhook.audit(plain, x).values()]
    for wrapped, prefix in (
        (torch.compile(plain, backend="eager"), "_orig_mod."),
        (nn.DataParallel(plain), "module."),
    ):
        found = wdhook.audit(wrapped, x)
        assert list(found) == [f"{prefix}{name}" for name, _ in plain.named_parameters()]
        assert [(f.use, f.invariant) for f in found.values()] == expected
        assert wdhook.plan(plain, 0.1, audit=found) == wdhook.plan(
            plain, 0.1, audit=wdhook.audit(plain, x)
        )
    plain.compile(backend="eager")
    assert [(f.use, f.invariant) for f in wdhook.audit(plain, x).values()] == expected
    assert plain._compiled_call_impl is not None


def test_tied_parameters_stay_tied() -> None:
    """A parameter with two owners is one leaf: it has one finding with both uses."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    found = wdhook.audit(model, torch.arange(5))
    assert list(found) == ["0.weight"]
    assert found["0.weight"].operations == ("embedding[weight]", "mm[mat2]")
    assert found["0.weight"].role is wdhook.Role.EMBEDDING
