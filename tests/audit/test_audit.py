"""The audit against the plan: contradictions, selectors to paste, plans that follow it, its
table and its JSON.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wdhook
from wdhook import Role
from wdhook._audit.table import audit_rows


class Block(nn.Module):
    """Names that mislead: a matrix that scales, a vector that contracts, a layer that is a
    table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.linspace(0.5, 1.5, 24).reshape(4, 6))
        self.readout = nn.Parameter(torch.ones(6))
        self.table = nn.Linear(6, 9, bias=False)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(x * self.mixer + self.table.weight[i])
        return x, x @ self.readout


class Stack(nn.Module):
    """Several blocks."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, i: Tensor) -> list[Tensor]:
        outs = []
        for block in self.blocks:
            x, out = block(x, i)
            outs.append(out)
        return [x, *outs]


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(
        8
    ).reshape(2, 4)


def audited(model: nn.Module) -> wdhook.Audit:
    return wdhook.audit(model, *inputs())


def test_contradictions_and_what_mends_them() -> None:
    """A use that contradicts the static role is flagged, with a selector that makes the plan
    follow the use.
    """
    model = Stack()
    found = audited(model)
    assert {f.name.rpartition(".")[2] for f in found.contradictions} == {"mixer", "readout"}
    assert found.overrides == {"blocks.*.mixer": 0.0, "blocks.*.readout": True}
    static, mended = wdhook.plan(model, 0.1), wdhook.plan(model, 0.1, overrides=found.overrides)
    assert set(static.diff(mended)) == {f.name for f in found.contradictions}
    assert {n: d.weight_decay > 0 for n, d in mended.items()} == {
        n: f.should_decay for n, f in found.items()
    }


def test_a_glob_takes_no_other_parameter_along() -> None:
    """Where a glob would match a parameter that is right, the names are listed one by one."""
    model = Stack()
    model.blocks[1].mixer._no_weight_decay = True  # marked: its use does not contradict anything
    overrides = audited(model).overrides
    assert overrides["blocks.0.mixer"] == overrides["blocks.2.mixer"] == 0.0
    assert "blocks.*.mixer" not in overrides
    assert overrides["blocks.*.readout"] is True


def test_names_with_brackets_are_selected() -> None:
    """A selector to paste is a glob: what is special in globs is escaped in names."""
    model = nn.Module()
    model.weights = nn.ParameterDict({"a[0]": nn.Parameter(torch.ones(4, 6))})
    model.forward = lambda x: x * model.weights["a[0]"]
    found = wdhook.audit(model, inputs()[0])
    assert list(wdhook.plan(model, 0.1, overrides=found.overrides).decayed) == []


def test_a_plan_follows_an_audit() -> None:
    """`plan(audit=)` uses the traced roles, says so, and needs no overrides."""
    model = Stack()
    made = wdhook.plan(model, 0.1, audit=audited(model))
    assert made["blocks.0.mixer"].role is Role.SCALE
    assert made["blocks.0.mixer"].weight_decay == 0.0
    assert made["blocks.0.mixer"].reason == "traced: mul[other]"
    assert made["blocks.1.readout"].weight_decay == 0.1
    assert made["blocks.1.table.weight"].role is Role.EMBEDDING
    assert made["blocks.1.table.weight"].reason == "traced: index[self]"
    assert not any(d.guess for d in made.values())
    assert (
        wdhook.param_groups(model, 0.1, audit=audited(model))[0]["params"]
        == made.param_groups()[0]["params"]
    )
    with wdhook.attach(model, made) as decay:
        assert decay.plan == made


def test_marks_and_overrides_outrank_the_trace() -> None:
    """What somebody said on purpose holds, about the role or about the decay."""
    model = Stack(1)
    model.blocks[0].fc.weight._no_weight_decay = True
    model.blocks[0].wdhook_role = {"mixer": "weight"}
    found = audited(model)
    assert [found[f"blocks.0.{n}"].agrees for n in ("fc.weight", "mixer", "fc.bias")] == [
        None,
        None,
        True,
    ]
    made = wdhook.plan(model, 0.1, audit=found, overrides={"*.readout": 0.5})
    assert made["blocks.0.fc.weight"].weight_decay == 0.0
    assert made["blocks.0.mixer"].weight_decay == 0.1
    assert made["blocks.0.readout"].weight_decay == 0.5
    assert "traced" not in "".join(
        made[f"blocks.0.{n}"].reason for n in ("fc.weight", "mixer", "readout")
    )


def test_where_the_trace_is_silent_the_static_role_stays() -> None:
    """Unused and opaque parameters, and those that are new since, are decided by type and name
    as before.
    """
    model = Stack(1)
    found = audited(model)
    model.new = nn.Linear(2, 2)
    static = wdhook.plan(model, 0.1)
    made = wdhook.plan(model, 0.1, audit=found)
    assert made["new.weight"] == static["new.weight"]
    idle = wdhook.audit(model, *inputs())
    assert idle["new.weight"].use == "unused"
    assert wdhook.plan(model, 0.1, audit=idle)["new.bias"] == static["new.bias"]


def test_uses_that_contradict_one_another_are_not_flagged() -> None:
    """A parameter that contracts here and scales there is left to its static role."""
    model = nn.Module()
    model.p = nn.Parameter(torch.randn(6, 6))
    model.forward = lambda x: (x @ model.p) * model.p[0]
    found = wdhook.audit(model, torch.randn(3, 6))["p"]
    assert found.operations == ("mm[mat2]", "mul[other]")
    assert found.agrees is None


def test_the_table() -> None:
    """Contradictions come first and say what was planned; layers that are alike share a row;
    overrides are code.
    """
    model = Stack()
    text = str(audited(model))
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    assert lines[first].startswith("blocks.0-2.mixer ×3 ")
    assert re.split(" {2,}", lines[first])[2:5] == [
        "multiplication: mul[other]",
        "scale, planned as weight",
        "yes, wrong",
    ]
    assert lines[first + 1].startswith("blocks.0-2.readout ×3 ")
    pasted: dict[str, Any] = {}
    exec(text[text.index("overrides={") :], pasted)
    assert pasted["overrides"] == audited(model).overrides
    assert "to follow the uses" not in str(wdhook.audit(nn.Linear(3, 2), torch.randn(2, 3)))


def test_the_words_of_the_table() -> None:
    """What decay acts on, in each of its words."""
    model = nn.Sequential(
        nn.Linear(6, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 4, bias=False),
        nn.LayerNorm(4),
        nn.Linear(4, 3),
    )
    model.append(nn.Linear(3, 2).requires_grad_(False))
    found = wdhook.audit(model, torch.randn(7, 6))
    said = {name: found[name].acts_on for name in ("0.weight", "2.weight", "4.weight")}
    assert said == {
        "0.weight": "step size, row by row",
        "2.weight": "step size",
        "4.weight": "function",
    }
    text = str(found)
    assert "decay acts on the step size alone in 2 decayed tensors, 50 elements" in text
    assert "frozen" in text


def test_the_dict_is_json() -> None:
    """`to_dict` survives JSON unchanged and holds a row for each parameter."""
    found = audited(Stack())
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [row["name"] for row in data["parameters"]] == list(found)
    assert data["parameters"][0]["use"] == "multiplication"
    assert data["overrides"] == found.overrides


def test_the_mapping() -> None:
    """An audit is an ordered mapping in the order of the model, and prints as one line in repr."""
    model = Stack(1)
    found = audited(model)
    assert list(found) == [n for n, _ in model.named_parameters()]
    assert repr(found) == "Audit(5 tensors, 2 contradict the plan, 0 invariant)"
    assert found.training


def _lazy() -> nn.Module:
    return nn.LazyLinear(3)


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(3, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        (lambda: torch.ones(3), ["`model` must be a torch.nn.Module", "got: Tensor"]),
        (_lazy, ["`model` cannot be audited", "weight: a lazy parameter", "Run the model once"]),
        (
            _scripted,
            ["`model` cannot be audited", "a scripted module", "Audit it before torch.jit"],
        ),
    ],
)
def test_what_cannot_be_audited(model: Any, pieces: list[str]) -> None:
    """Errors name what stands in the way and what to do, before anything runs."""
    with pytest.raises(wdhook.ArgumentError) as error:
        wdhook.audit(model(), torch.randn(2, 3))
    for piece in pieces:
        assert piece in str(error.value)


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        (
            {"audit": {"weight": 1}},
            ["`audit` must be an Audit", "got: dict", "wdhook.audit(model, *inputs)"],
        ),
        (
            {"audit": "other"},
            [
                "`audit` is of another model",
                "of the audit: a.weight",
                "of the model: blocks.0.mixer",
            ],
        ),
        (
            {"audit": "own", "recipe": "timm"},
            ["`audit` and `recipe`", "recipe: timm", "Give one of them"],
        ),
    ],
)
def test_audits_that_a_plan_cannot_follow(options: dict[str, Any], pieces: list[str]) -> None:
    """A plan refuses what is no audit, one of another model, and one beside a recipe."""
    model = Stack(1)
    other = nn.Sequential()
    other.add_module("a", nn.Linear(6, 2))
    made = {"own": lambda: audited(model), "other": lambda: wdhook.audit(other, inputs()[0])}
    audit = options["audit"]
    options = {**options, "audit": made[audit]() if isinstance(audit, str) else audit}
    with pytest.raises(wdhook.ArgumentError) as error:
        wdhook.plan(model, 0.1, **options)
    for piece in pieces:
        assert piece in str(error.value)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _grown(model: nn.Module) -> nn.Module:
    model.add_module("new", nn.Linear(2, 2))
    return model


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (lambda: Stack(2), True),
        (lambda: Stack(1), True),  # shallower: its names are all among those of the audit
        (lambda: Stack(3), True),  # deeper
        (lambda: _grown(Stack(2)), True),
        (lambda: nn.DataParallel(Stack(2)), True),
        (lambda: nn.Sequential(Stack(2)), False),
        (lambda: _grown(Stack(1)), False),
        (lambda: nn.Linear(6, 2), False),
    ],
    ids=["same", "shallower", "deeper", "grown", "wrapped", "renamed", "another", "unlike"],
)
def test_an_audit_knows_its_model(other: Any, same: bool) -> None:
    """The names of one model are among those of the other, or the audit is refused."""
    model = other()
    found = audited(Stack(2))
    assert found.is_of(_shapes(model)) is same
    assert bool(found.differences(_shapes(model))) is not same


def test_an_audit_of_a_model_of_another_shape_is_refused() -> None:
    """Equal names are not enough: each shared parameter has one shape."""
    found = wdhook.audit(nn.Linear(6, 3), torch.randn(2, 6))
    assert not found.is_of(_shapes(nn.Linear(6, 4)))
    with pytest.raises(wdhook.ArgumentError) as error:
        wdhook.plan(nn.Linear(6, 4), 0.1, audit=found)
    assert "first difference: weight: (3, 6) in the audit, (4, 6) in the model" in str(error.value)
    assert wdhook.plan(nn.Linear(6, 3), 0.1, audit=found).decayed


def test_why_there_is_no_verdict_is_told() -> None:
    """The table tells an absent gradient from an absent effect, and neither is printed for the
    other.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2, bias=False), nn.LayerNorm(2), nn.Linear(2, 3)
    )
    dead = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    signs, silent = wdhook.audit(model, x), wdhook.audit(dead, x)
    assert signs["2.weight"].doubt == "no effect on the outputs"
    assert silent["0.weight"].doubt == "no gradient"
    assert "no effect on the outputs" in str(signs)
    assert "no gradient" in str(silent)
    assert "no effect on the outputs" not in str(silent)
    assert signs["4.weight"].doubt == ""
    meta = wdhook.audit(nn.Linear(6, 2, device="meta"), torch.randn(2, 6, device="meta"))
    assert meta["weight"].doubt == "not measured"
    assert "no gradient" not in str(meta)


def test_a_notebook_shows_a_table() -> None:
    """The HTML holds the headlines, a row for each row of the text, and the overrides, all
    escaped.
    """
    model = Stack()
    found = audited(model)
    html = found._repr_html_()
    lines = str(found).splitlines()
    assert f"<p>{lines[0]}</p>" in html
    assert html.count("<tr>") == len(audit_rows(found))
    assert "<pre>to follow the uses:" in html
    odd = nn.Module()
    odd.weights = nn.ParameterDict({"a<b>": nn.Parameter(torch.ones(4, 6))})
    odd.forward = lambda x: x @ odd.weights["a<b>"].T
    assert "a&lt;b&gt;" in wdhook.audit(odd, inputs()[0])._repr_html_()
    assert "<pre>" not in wdhook.audit(nn.Linear(6, 2), inputs()[0])._repr_html_()


def test_a_mistake_in_the_inputs_is_the_models_own_error() -> None:
    """Inputs that the model does not take raise what the model raises."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wdhook.audit(nn.Linear(3, 2), torch.randn(2, 4))


def test_a_thousand_parameters_print_fast() -> None:
    """The table is linear in the number of parameters: no comparison of each with each.

    Counted, not timed: the number of Python calls for 1,000 parameters is at most 12 times that
    for 100.
    """

    def calls(depth: int) -> int:
        found = audited(Stack(depth))
        count = 0

        def tracer(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(tracer)
        try:
            str(found)
        finally:
            sys.setprofile(None)
        return count

    assert calls(200) < 12 * calls(20)


def test_the_model_runs_once() -> None:
    """One forward pass, through the model's own hooks."""
    ran: list[bool] = []
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[0].register_forward_hook(lambda *_: ran.append(True))
    wdhook.audit(model, torch.randn(7, 6))
    assert ran == [True]
