"""The truth about real architectures: what their forward pass does with each parameter, against our
verdict.

`support/data/truth.jsonl.gz` was traced from the forward pass, not read off names. `eligible` must
be decayed, `exempt` must not; `policy` (tokens and positions) may go either way, and `unknown` is
not scored.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from torch import nn
from truth import TRUTH
from twins import assert_linear, calls

import wdhook
from wdhook._plan.recipes import RECIPES

ROOT = Path(__file__).parents[2]

MARKED = {
    ("timm", "coatnet_rmlp_nano_rw_224"): r"\.rel_pos\.mlp\.fc\d\.weight$",
    ("timm", "swinv2_tiny_window8_256"): r"\.cpb_mlp\.\d\.weight$",
}
"""Matrices that the model's own no_weight_decay() lists: what its author says outranks what they
do.
"""


_DIGITS = re.compile(r"(?<!original)\d+")


class Truth:
    """Looks up the verdict on a parameter of one architecture."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self._rows: dict[tuple[str, str, int], list[tuple[str, list[str]]]] = {}
        for owner, local, ndim, verdict, _, names in rows:
            self._rows.setdefault((owner, _bare(local), ndim), []).append((verdict, names))

    def verdict(self, owner: nn.Module, local: str, name: str, ndim: int) -> str | None:
        """What the forward pass said, or None where this version has a parameter that was not
        there.
        """
        kind = f"{type(owner).__module__}.{type(owner).__qualname__}"
        rows = self._rows.get((kind, _bare(local), ndim), [])
        named = [verdict for verdict, names in rows if name in names or _bare(name) in names]
        return next(iter(named or [verdict for verdict, _ in rows]), None)


def _bare(name: str) -> str:
    return _DIGITS.sub("#", name)


def mistakes(
    model: nn.Module, rows: list[list[Any]], decayed: Mapping[str, bool]
) -> tuple[set[str], float]:
    """The names decided against the truth, and the share of parameters that the truth knows."""
    truth, wrong, known = Truth(rows), set(), 0
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, local = name.rpartition(".")
        verdict = truth.verdict(modules[path], local, name, parameter.ndim)
        known += verdict is not None
        if verdict == ("exempt" if decayed[name] else "eligible"):
            wrong.add(name)
    return wrong, known / len(decayed)


@pytest.mark.parametrize(("library", "name"), sorted(TRUTH))
def test_no_false_decay_and_no_false_exemption(library: str, name: str) -> None:
    """Every parameter is decided as its use demands, but for those whose author lists them."""
    model = build(library, name)
    plan = wdhook.plan(model, 1.0)
    wrong, known = mistakes(model, TRUTH[library, name], {n: d.eligible for n, d in plan.items()})
    marked = re.compile(MARKED.get((library, name), "(?!)"))
    assert {n: plan[n].reason for n in wrong if not marked.search(n)} == {}
    assert all(plan[n].reason.startswith("listed by ") for n in wrong)
    assert known > 0.9, "the truth is about another version of this model"


@pytest.mark.parametrize("recipe", ["forum", "nanogpt"])
def test_the_score_can_see_mistakes(recipe: str) -> None:
    """The comparison is not blind: rules by shape or BatchNorm alone are found wrong."""
    model = build("torch", "weight_norm_param" if recipe == "nanogpt" else "Transformer")
    rows = TRUTH["torch", "weight_norm_param" if recipe == "nanogpt" else "Transformer"]
    plan = wdhook.plan(model, 1.0, recipe=recipe)
    assert mistakes(model, rows, {n: d.eligible for n, d in plan.items()})[0]


BIG = [
    ("torchvision", "maxvit_t"),
    ("timm", "coat_mini"),
    ("transformers", "Wav2Vec2ConformerForPreTraining"),
]


@pytest.mark.parametrize(("library", "name"), BIG)
def test_plan_changes_nothing(library: str, name: str) -> None:
    """Parameters, buffers, flags, attributes, hooks and the random state are as before."""
    model = build(library, name)
    before, state = snapshot(model), torch.get_rng_state()
    wdhook.plan(model, 1.0)
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_changes_no_number() -> None:
    """On a model with real numbers: every value and version counter stays, spectral norm
    included.
    """
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4),
        nn.MultiheadAttention(4, 2),
    )
    values = copy.deepcopy(model.state_dict())
    before = snapshot(model)
    for recipe in (None, *RECIPES):
        wdhook.plan(model, 1.0, recipe=recipe)
    assert_same(snapshot(model), before)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Identity, version and flags of every tensor, and the attributes of every module and
    parameter.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": [
            (n, id(t), t._version, t.requires_grad, t.is_leaf, sorted(t.__dict__))
            for n, t in tensors
        ],
        "hooks": [
            (n, bool(p._backward_hooks), bool(p._post_accumulate_grad_hooks))
            for n, p in model.named_parameters()
        ],
        "modules": [
            (n, id(m), m.training, sorted(m.__dict__), len(m._forward_hooks))
            for n, m in model.named_modules()
        ],
    }


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises at the first difference: a whole diff would be too long to read."""
    for part, rows in before.items():
        for now, then in zip(after[part], rows, strict=True):
            assert now == then


def test_the_snapshot_sees_changes() -> None:
    """The purity check can fail: a flag, an attribute and a value each show."""
    changes: list[Callable[[nn.Linear], object]] = [
        lambda m: m.weight.requires_grad_(False),
        lambda m: setattr(m.weight, "mark", 1),
        lambda m: m.weight.detach().add_(1),
        lambda m: setattr(m, "mark", 1),
        lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
    ]
    for change in changes:
        model = nn.Linear(2, 2)
        before = snapshot(model)
        change(model)
        with pytest.raises(AssertionError):
            assert_same(snapshot(model), before)


def test_the_cost_of_a_plan_is_linear() -> None:
    """Twice as many modules cost twice as many calls; a cost that grows faster is seen."""

    def cost(blocks: int) -> int:
        with torch.device("meta"):
            model = nn.Sequential(
                *[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(blocks)]
            )
        return calls(lambda: wdhook.plan(model, 1.0))

    assert_linear(cost, 300)
    with pytest.raises(AssertionError, match="times as much"):
        assert_linear(
            lambda size: calls(lambda: [abs(i) for _ in range(size) for i in range(size)]), 30
        )


CHECK = """
import json, os, sys
sys.path[:0] = sys.argv[1:]
import check, wdhook
import torch
torch.set_num_threads(1)
decided = lambda model: {name: d.eligible for name, d in wdhook.plan(model, 1.0).items()}
scores, info = check.run({"wdhook": decided}, quick=True)
score = scores["wdhook"]
cases = score.cases.items()
kinds = [[kind, owner, local, case["ex"][1]] for (kind, _, owner, local, *_), case in cases]
errors = [error for _, error in score.err if error != "build"]
models = sum(count for (_, what), count in score.c.items() if what == "models")
print(json.dumps({"kinds": kinds, "errors": errors, "models": models}))
"""


def test_the_whole_quick_check() -> None:
    """Where the full corpus is at hand, its quick part finds no mistake but in what authors list
    themselves.
    """
    beside = ROOT.parent / "shared" / "roles"
    roles = Path(os.environ.get("WDHOOK_ROLES", beside))
    if not (roles / "check.py").exists():
        pytest.skip(f"no corpus in {roles} (set WDHOOK_ROLES)")
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library, exc_type=ImportError)
    command = [sys.executable, "-B", "-c", CHECK, str(roles), str(ROOT)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    marked = re.compile("|".join(MARKED.values()))
    assert [kind for kind in found["kinds"] if not marked.search(kind[3])] == []
    assert found["errors"] == []
    assert found["models"] > 30
