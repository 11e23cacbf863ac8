"""Faces of a plan: example inputs, frozen and tied parameters, data, HTML, and answers to slips."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import Tensor, nn

import wdhook
from wdhook import Plan


class Net(nn.Module):
    """A matrix that scales and a vector that contracts, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.mixer = nn.Parameter(torch.linspace(0.5, 1.5, 24).reshape(4, 6))
        self.readout = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return (self.fc(x) * self.mixer + shift) @ self.readout


X = torch.ones(2, 4, 6)


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}, {"x": X, "shift": 1.0}])
def test_example_inputs_settle_guesses(inputs: object) -> None:
    """A plan with inputs is a plan with an audit on these inputs, and without them it guesses."""
    model = Net()
    guessed, settled = wdhook.plan(model, 0.5), wdhook.plan(model, 0.5, inputs=inputs)
    assert settled == wdhook.plan(model, 0.5, audit=wdhook.audit(model, X))
    assert (guessed["mixer"].weight_decay, settled["mixer"].weight_decay) == (0.5, 0.0)
    assert (guessed["readout"].weight_decay, settled["readout"].weight_decay) == (0.0, 0.5)
    assert [d.guess for d in guessed.values()].count(True) == 2
    assert not any(d.guess for d in settled.values())
    (group,) = [
        group
        for group in wdhook.param_groups(model, 0.5, inputs=inputs)
        if any(parameter is model.readout for parameter in group["params"])
    ]
    assert group["weight_decay"] == 0.5


def test_overrides_win_over_example_inputs() -> None:
    """What a user says counts, whatever the pass has seen."""
    plan = wdhook.plan(Net(), 0.5, inputs=X, overrides={"mixer": True})
    assert plan["mixer"].weight_decay == 0.5


def test_a_plan_with_inputs_changes_nothing() -> None:
    """The pass runs on copies: no gradient, no version, no random number."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    wdhook.plan(model, 0.5, inputs=torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_the_error_of_a_model_is_passed_on() -> None:
    """Inputs of the wrong shape: the model's own error, and not one of ours."""
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        wdhook.plan(Net(), 0.5, inputs=torch.ones(2, 3))


def test_the_table_offers_example_inputs() -> None:
    """Where guesses are left the first line says how to settle them, and where none are it
    does not.
    """
    assert "2 guesses: an audit or inputs= settles them" in str(wdhook.plan(Net(), 0.5))
    assert "guess" not in str(wdhook.plan(Net(), 0.5, inputs=X)).splitlines()[0]
    assert "guess" not in str(wdhook.plan(nn.Linear(2, 2), 0.5))
    lone = wdhook.plan(Net(), 0.5, overrides={"mixer": 0.0})
    assert "1 guess: an audit or inputs= settles it" in str(lone)


def test_frozen_parameters_are_not_counted_as_decayed() -> None:
    """They keep their decision, and the headline, their row and the totals say that they
    are frozen.
    """
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    model[0].requires_grad_(False)
    plan = wdhook.plan(model, 0.5)
    head, *lines = str(plan).splitlines()
    assert head == "weight decay 0.5 on 1 of 4 tensors, 128 of 4,290 elements; 1 more is frozen"
    assert next(line for line in lines if line.startswith("0.weight")).endswith("; frozen")
    assert lines[-1].split() == ["all", "4", "1", "4,290", "128"]
    assert (plan["0.weight"].weight_decay, plan["0.weight"].trainable) == (0.5, False)
    assert "frozen" not in str(wdhook.plan(model.requires_grad_(True), 0.5))


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_tied_parameters_show_all_names() -> None:
    """The decision lists the further names, the table shows them; a module used twice
    counts too.
    """
    plan = wdhook.plan(tied(), 0.5)
    assert plan["embed.weight"].aliases == ("head.weight",)
    assert "tied to head.weight" in str(plan)
    layer = nn.Linear(2, 2)
    shared = wdhook.plan(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}), 0.5)
    assert shared["a.weight"].aliases == ("b.0.weight",)
    assert wdhook.plan(nn.Linear(2, 2), 0.5)["weight"].aliases == ()


def test_a_missing_name_is_answered() -> None:
    """The error names near names, or the name under which a tied parameter is decided."""
    plan = wdhook.plan(tied(), 0.5)
    with pytest.raises(KeyError, match=r"Did you mean 'embed\.weight'"):
        plan["embed.weigth"]
    with pytest.raises(KeyError, match=r"'head\.weight' is tied: .* 'embed\.weight'"):
        plan["head.weight"]
    with pytest.raises(KeyError, match=r"list\(plan\) has the names"):
        plan["x"]
    assert plan.get("head.weight") is None
    assert "head.weight" not in plan
    with pytest.raises(KeyError) as caught:
        plan["head.weight"]
    assert caught.value.args == ("head.weight",)


def test_a_plan_as_plain_data() -> None:
    """`to_dict` has every attribute of every decision, and JSON takes it."""
    plan = wdhook.plan(tied(), 0.5)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data == {
        "weight_decay": 0.5,
        "parameters": [
            {
                "name": "embed.weight",
                "role": "embedding",
                "weight_decay": 0.5,
                "reason": "owner is nn.Embedding",
                "shape": [4, 3],
                "numel": 12,
                "guess": False,
                "follows": True,
                "trainable": True,
                "aliases": ["head.weight"],
                "toward": 0.0,
            }
        ],
    }
    assert set(data["parameters"][0]) == set(wdhook.Decision.__dataclass_fields__)
    assert pickle.loads(pickle.dumps(plan)).to_dict() == plan.to_dict()


def test_a_plan_as_a_frame() -> None:
    """Where pandas is installed: a row for each parameter, the names as index."""
    pytest.importorskip("pandas")
    frame = wdhook.plan(tied(), 0.5).to_pandas()
    assert list(frame.index) == ["embed.weight"]
    assert frame.loc["embed.weight", "numel"] == 12
    empty = wdhook.plan(nn.ReLU(), 0.5).to_pandas()
    assert (len(empty), list(empty.columns)) == (0, list(frame.columns))


def test_a_frame_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the package and the way around it."""
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas(.|\n)*to_dict"):
        wdhook.plan(tied(), 0.5).to_pandas()


def test_a_plan_in_a_notebook() -> None:
    """HTML with the rows of the table; names and reasons are escaped."""
    model = nn.ModuleDict({"a<b": nn.Linear(2, 2)})
    text = wdhook.plan(model, 0.5)._repr_html_()
    assert text.count("<tr>") == 3 + 4
    assert "a&lt;b.weight" in text
    assert "a<b" not in text
    diff = wdhook.plan(model, 0.5).diff(wdhook.plan(model, 0.25))
    assert diff._repr_html_().count("<tr>") == 2
    assert "1 tensor with 4 elements gets a different λ" in diff._repr_html_()
    assert "<table>" not in wdhook.plan(model, 0.5).diff(wdhook.plan(model, 0.5))._repr_html_()


# --------------------------------------------------------------------------------------- selectors


def decays(model: nn.Module, **arguments: object) -> set[str]:
    plan = wdhook.plan(model, 0.5, **arguments)
    return {name for name, decision in plan.items() if decision.weight_decay}


def test_an_exact_name_wins_over_its_reading_as_a_glob() -> None:
    """`w[0].weight` is a name here, and not the glob that `w0.weight` matches."""
    model = nn.ModuleDict({"w[0]": nn.Linear(2, 2), "w0": nn.Linear(2, 2)})
    assert decays(model, overrides={"w[0].weight": 0.0}) == {"w0.weight"}
    only = nn.ModuleDict({"w0": nn.Linear(2, 2), "v": nn.Linear(2, 2)})
    assert decays(only, overrides={"w[0].weight": 0.0}) == {"v.weight"}


class Head(nn.Module):
    """A head that must not run."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(2, 2))

    def forward(self, *features: object) -> Tensor:
        raise AssertionError("a selector was run")


def test_a_module_as_a_selector_means_all_in_it() -> None:
    """`overrides={model.head: 0.0}` selects the sub-tree, and does not call the module."""
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": Head()})
    assert decays(model, overrides={model["head"]: 0.0}) == {"body.weight"}
    assert decays(model, overrides={model: 0.0, model["head"].out[0]: True}) == {
        "head.out.0.weight",
        "head.out.0.bias",
    }
    with pytest.raises(wdhook.SelectorError, match="no part of this model"):
        wdhook.plan(model, 0.5, overrides={nn.Linear(2, 2): 0.0})


@pytest.mark.parametrize("answer", [None, 1, "yes", torch.tensor(True)])
def test_a_predicate_must_return_a_bool(answer: object) -> None:
    """A forgotten `return` is an error, and not a selector that matches nothing or everything."""
    with pytest.raises(wdhook.ArgumentError, match="must return True or False"):
        wdhook.plan(nn.Linear(2, 2), 0.5, overrides={lambda *place: answer: 0.0})
    assert decays(nn.Linear(2, 2), overrides={lambda *place: True: 0.0}) == set()


def test_a_selector_that_matches_nothing_names_near_ones() -> None:
    """Did you mean: by names and by roles."""
    with pytest.raises(wdhook.SelectorError, match=r"Did you mean '0\.weight'"):
        wdhook.plan(nn.Sequential(nn.Linear(2, 2)), 0.5, overrides={"0.wieght": 0.0})
    with pytest.raises(wdhook.SelectorError, match=r"Did you mean 'head\.\*'"):
        wdhook.plan(nn.ModuleDict({"head": nn.Linear(2, 2)}), 0.1, overrides={"haed.*": 0.0})


# ------------------------------------------------------------------------------------------- slips

BIG = 10**400
MODEL = nn.Linear(2, 2)
SLIPS = {
    "swapped": (lambda: wdhook.plan(1e-4, MODEL), ["`model`", "The model comes first"]),
    "an optimizer": (
        lambda: wdhook.plan(torch.optim.SGD(MODEL.parameters(), lr=0.1), 1e-4),
        ["`model`", "SGD", "wdhook.adopt(model, optimizer)"],
    ),
    "a class": (lambda: wdhook.plan(nn.Linear, 1e-4), ["`model`", "Linear(...)"]),
    "a schedule": (
        lambda: wdhook.plan(MODEL, wdhook.schedules.cosine),
        ["`weight_decay` must be a number", "wdhook.attach(model, schedule)"],
    ),
    "a plan": (
        lambda: wdhook.plan(MODEL, wdhook.plan(MODEL, 0.5)),
        ["`weight_decay` must be a number", "plan.weight_decay"],
    ),
    "a mapping": (lambda: wdhook.plan(MODEL, {"*.bias": 0.0}), ["number", "`overrides`"]),
    "a tensor": (lambda: wdhook.plan(MODEL, torch.tensor(0.5)), ["number", ".item()"]),
    "text": (lambda: wdhook.plan(MODEL, "0.5"), ["`weight_decay` must be a number", "str"]),
    "an integer beyond floats": (lambda: wdhook.plan(MODEL, BIG), ["finite", "1329 bits"]),
    "an override beyond floats": (
        lambda: wdhook.plan(MODEL, 0.5, overrides={"weight": BIG}),
        ["overrides['weight']", "finite"],
    ),
    "infinite in float32": (
        lambda: wdhook.plan(MODEL, 1e308),
        ["finite in the type", "weight", "float32", "1e+308"],
    ),
    "inputs and an audit": (
        lambda: wdhook.plan(MODEL, 0.5, inputs=(), audit=wdhook.audit(MODEL, torch.ones(1, 2))),
        ["`audit` and `inputs`"],
    ),
    "inputs and a recipe": (
        lambda: wdhook.plan(MODEL, 0.5, inputs=(), recipe="timm"),
        ["`inputs` and `recipe`", "timm"],
    ),
    "inputs of no kind": (
        lambda: wdhook.plan(MODEL, 0.5, inputs=3),
        ["`inputs` must be a tensor", "int", "inputs=(x,)"],
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_answered_in_words(slip: str) -> None:
    """The argument, what it was, and the call that was probably meant."""
    call, words = SLIPS[slip]
    with pytest.raises(wdhook.ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_a_large_λ_that_fits_is_taken() -> None:
    """The limit is that of the parameter's own type, and exempt parameters have none."""
    assert isinstance(wdhook.plan(nn.Linear(2, 2).double(), 1e308), Plan)
    assert isinstance(wdhook.plan(nn.Linear(2, 2), 1e38), Plan)
    assert isinstance(wdhook.plan(nn.LayerNorm(2), 1e308), Plan)
    with pytest.raises(wdhook.ArgumentError, match="float16"):
        wdhook.plan(nn.Linear(2, 2).half(), 1e5)
