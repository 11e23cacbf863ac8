"""The decision as data: roles, overrides, groups, differences, and the table that people read."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from twins import assert_bit_equal, convnet, perceptron

import wdhook
from wdhook import Decision, Plan, Role


def decided(model: nn.Module, **arguments: object) -> dict[str, float]:
    return {name: d.weight_decay for name, d in wdhook.plan(model, 0.5, **arguments).items()}


def test_weights_yes_biases_and_norms_no() -> None:
    """The default: convolution and linear weights are decayed; biases, BatchNorm and LayerNorm are
    not.
    """
    assert decided(convnet()) == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "4.weight": 0.5,
        "4.bias": 0.0,
        "5.weight": 0.0,
        "5.bias": 0.0,
        "7.weight": 0.5,
    }


def test_the_decision_says_everything() -> None:
    """Name, role, λ, reason, shape and number of elements of each parameter."""
    plan = wdhook.plan(nn.Sequential(nn.Linear(3, 2)), 0.5)
    weight = plan["0.weight"]
    assert (weight.name, weight.role, weight.weight_decay) == ("0.weight", Role.WEIGHT, 0.5)
    assert (weight.shape, weight.numel, weight.eligible) == ((2, 3), 6, True)
    assert "Linear" in weight.reason
    assert plan["0.bias"].role == "bias"
    assert not plan["0.bias"].eligible
    assert f"{weight.role}" == "weight"


def test_a_plan_is_pure_and_immutable() -> None:
    """Planning changes no parameter, buffer, flag, hook or random state; a plan cannot be
    changed.
    """
    model = convnet()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state, chance = torch.get_rng_state(), random.getstate()
    plan = wdhook.plan(model, 0.5)
    str(plan), plan.param_groups()
    assert_bit_equal(before, model.state_dict())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(state, torch.get_rng_state())
    assert chance == random.getstate()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(TypeError):
        plan["0.weight"] = plan["0.bias"]
    with pytest.raises(AttributeError):
        plan["0.weight"].weight_decay = 0.0


def test_decayed_and_exempt_are_plans() -> None:
    """The two parts are mappings of names, ordered as the model, and together the whole."""
    plan = wdhook.plan(convnet(), 0.5)
    assert list(plan.decayed) == ["0.weight", "4.weight", "7.weight"]
    assert list(plan.exempt) == [n for n in plan if n not in plan.decayed]
    assert isinstance(plan.decayed, Plan)
    assert len(plan.decayed) + len(plan.exempt) == len(plan)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"4.weight": 0.0}, {"4.weight": 0.0}),
        (
            {"*.weight": 0.25},
            dict.fromkeys(("0.weight", "1.weight", "4.weight", "5.weight", "7.weight"), 0.25),
        ),
        ({Role.BIAS: True}, {"0.bias": 0.5, "4.bias": 0.5}),
        ({"bias": 0.125}, {"0.bias": 0.125, "4.bias": 0.125}),
        ({nn.LayerNorm: True}, {"5.weight": 0.5, "5.bias": 0.5}),
        ({lambda name, module, parameter: parameter.numel() == 18: 0.0}, {"7.weight": 0.0}),
        (
            {lambda name, module, parameter: isinstance(module, nn.Conv1d): 0.0},
            {"0.weight": 0.0, "0.bias": 0.0},
        ),
        ({"*": 0.0, "0.weight": True}, {"0.weight": 0.5, "4.weight": 0.0, "7.weight": 0.0}),
        ({"0.weight": True, "*": 0.0}, {"0.weight": 0.0, "4.weight": 0.0, "7.weight": 0.0}),
        ({"0.*": False}, {"0.weight": 0.0}),
    ],
)
def test_overrides(overrides: dict[object, float], changed: dict[str, float]) -> None:
    """A role or its string, a glob, a class and a predicate select; λ is absolute, True means "as
    given"; last wins.
    """
    assert decided(convnet(), overrides=overrides) == {**decided(convnet()), **changed}


def test_an_override_is_the_reason() -> None:
    """The table names the override that decided."""
    plan = wdhook.plan(convnet(), 0.5, overrides={"4.*": 0.0, nn.Conv1d: 0.25})
    assert plan["4.weight"].reason == "override '4.*'"
    assert plan["0.weight"].reason == "override Conv1d"
    assert plan["1.weight"].reason != plan["0.weight"].reason


def test_overrides_reach_tied_and_wrapped_parameters() -> None:
    """A tied parameter is selected by each of its names, a wrapped one also without the wrapper's
    prefix.
    """
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert decided(model, overrides={"head.weight": 0.25}) == {"embed.weight": 0.25}
    assert decided(model, overrides={nn.Linear: 0.25}) == {"embed.weight": 0.25}
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    assert decided(wrapped, overrides={"fc.*": 0.25})["module.fc.weight"] == 0.25


def test_param_groups() -> None:
    """One group for each λ, in order of appearance, every parameter once."""
    model = convnet()
    groups = wdhook.param_groups(model, 0.5, overrides={"7.*": 0.25})
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.25]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    torch.optim.SGD(groups, lr=0.1)
    plan = wdhook.plan(convnet(), 0.5)
    with pytest.raises(wdhook.WdhookError, match="no longer exists"):
        plan.param_groups()
    plan = wdhook.plan(model, 0.5)
    model[7] = nn.Identity()
    with pytest.raises(wdhook.WdhookError, match=r"7\.weight"):
        plan.param_groups()


def test_a_plan_is_data() -> None:
    """A plan can be compared, copied and pickled; a copy knows no model."""
    model = convnet()
    plan = wdhook.plan(model, 0.5)
    assert plan == wdhook.plan(convnet(seed=3), 0.5)
    assert plan != wdhook.plan(model, 0.25)
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
        assert str(twin) == str(plan)
        with pytest.raises(wdhook.WdhookError, match="no longer exists"):
            twin.param_groups()


def test_a_ready_plan_can_be_attached() -> None:
    """`attach` takes a plan in place of a number."""
    model = convnet()
    with wdhook.attach(model, wdhook.plan(model, 0.5, overrides={"7.*": 0.0})) as handle:
        assert handle.weight_decay == 0.5
        assert list(handle.plan.decayed) == ["0.weight", "4.weight"]


def test_diff() -> None:
    """What two rules decide differently, with both reasons and the number of elements."""
    model = convnet()
    diff = wdhook.plan(model, 0.5).diff(
        wdhook.plan(model, 0.5, overrides={"7.*": 0.0, "*.bias": True})
    )
    assert set(diff) == {"7.weight", "0.bias", "1.bias", "4.bias", "5.bias"}
    assert diff.numel == 18 + 4 + 4 + 6 + 6
    assert "38 elements" in str(diff)
    assert "override '7.*'" in str(diff)
    assert repr(diff) == "PlanDiff(5 tensors, 38 elements)"
    same = wdhook.plan(model, 0.5).diff(wdhook.plan(model, 0.5))
    assert (len(same), same.numel, str(same)) == (
        0,
        0,
        "0 tensors with 0 elements get a different λ",
    )
    other = wdhook.plan(model, 0.5).diff(wdhook.plan(nn.Linear(2, 2), 0.5))
    assert "absent" in str(other)
    assert len(other) == len(list(model.parameters())) + 2


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters() -> None:
    """A lazy module is decided by its type before it has a shape, and decayed once it has one."""
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyConv1d(2, 1))
    plan = wdhook.plan(model, 0.5)
    assert {n: d.weight_decay for n, d in plan.items()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.5,
        "2.bias": 0.0,
    }
    assert plan["0.weight"].shape == ()
    assert "lazy" in str(plan)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("at", ["backward", "step"])
def test_lazy_parameters_are_decayed_from_their_first_step(at: str) -> None:
    """A parameter that had no shape when it was attached is decayed at its first step, and then in
    its backward.
    """
    lazy = nn.Sequential(nn.LazyLinear(3, bias=False))
    with wdhook.attach(lazy, 0.5, at=at):
        lazy(torch.zeros(1, 4)).sum().backward()
        weight = lazy[0].weight
        optimizer = torch.optim.SGD(lazy.parameters(), lr=1.0)
        for _ in range(3):
            before = weight.detach().clone()
            optimizer.step()
            assert torch.equal(weight, before - 0.5 * before)
            lazy.zero_grad()
            lazy(torch.zeros(1, 4)).sum().backward()
        assert torch.equal(weight.grad, 0.5 * weight if at == "backward" else torch.zeros(3, 4))


def block(width: int) -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "norm": nn.LayerNorm(width)})


def test_the_table_folds_layers_that_differ_in_their_number() -> None:
    """Twelve equal layers are one row for each of their parameters; unequal ones are not folded."""
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList([block(4) for _ in range(12)] + [block(6)]),
            "head": nn.Linear(4, 2),
        }
    )
    table = str(wdhook.plan(model, 1e-4))
    lines = [line.split() for line in table.splitlines()]
    assert ["layers.0-11.qkv.weight", "×12", "12×4", "weight", "0.0001"] in [
        line[:5] for line in lines
    ]
    assert any(line[:1] == ["layers.12.qkv.weight"] for line in lines)
    assert len(lines) < 25


def test_the_table_folds_two_numbers() -> None:
    """Stages of blocks fold along both numbers where they are equal, and only neighbours are
    joined.
    """
    model = nn.ModuleList(
        [nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)]) for _ in range(4)]
    )
    assert "0-3.0-2.weight ×12" in str(wdhook.plan(model, 0.5))
    gap = nn.ModuleList([nn.Linear(2, 3 if i == 1 else 2, bias=False) for i in range(4)])
    table = str(wdhook.plan(gap, 0.5))
    assert "2-3.weight ×2" in table
    assert "0.weight " in table


def test_the_table_keeps_the_order_of_the_model() -> None:
    """A folded run stands where its first member stands, also if an earlier layer has the same
    shape elsewhere.
    """
    model = nn.ModuleList(
        [nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 4)]), nn.Linear(3, 3), nn.Linear(3, 2)]
    )
    rows = [line.split()[0] for line in str(wdhook.plan(model, 0.5)).splitlines()[4:10]]
    assert rows == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.weight", "1.bias"]
    unequal = nn.ModuleList([nn.ModuleList([nn.Linear(2, w), nn.Linear(w, 2)]) for w in (4, 2, 2)])
    rows = [line.split()[0] for line in str(wdhook.plan(unequal, 0.5)).splitlines()[4:10]]
    assert rows == [
        "0.0.weight",
        "0.0.bias",
        "0.1.weight",
        "0.1.bias",
        "1-2.0-1.weight",
        "1-2.0-1.bias",
    ]


def test_the_table_adds_up() -> None:
    """Totals by role, and what is decayed of all; 300 parameters stay readable."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)) for _ in range(75)])
    table = str(wdhook.plan(model, 1e-4)).splitlines()
    assert table[0] == "weight decay 0.0001 on 75 of 300 tensors, 1,875 of 3,000 elements"
    assert table[-1].split() == ["all", "300", "75", "3,000", "1,875"]
    assert len(table) < 20
    assert max(map(len, table)) < 120


def test_guesses_come_first() -> None:
    """What only the shape spoke for is shown before everything else."""

    class House(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.thing = nn.Parameter(torch.zeros(3))

    plan = wdhook.plan(House(), 0.5)
    assert plan["thing"].guess
    assert str(plan).splitlines()[4].startswith("thing")
    assert "guess: " in str(plan).splitlines()[4]


def test_recipes() -> None:
    """A recipe decides in place of wdhook's own rule, and overrides come after it."""
    model = nn.ModuleDict({"norm": nn.LayerNorm([2, 3]), "fc": nn.Linear(2, 2)})
    assert decided(model) == {
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "fc.weight": 0.5,
        "fc.bias": 0.0,
    }
    by_shape = wdhook.plan(model, 0.5, recipe="nanogpt")
    assert {n: d.weight_decay for n, d in by_shape.items()} == {
        "norm.weight": 0.5,
        "norm.bias": 0.5,
        "fc.weight": 0.5,
        "fc.bias": 0.0,
    }
    assert "nanogpt" in by_shape["norm.weight"].reason
    assert decided(model, recipe="nanogpt", overrides={"norm": 0.0})["norm.weight"] == 0.0


def test_dataclass_decision_is_hashable_and_equal() -> None:
    """Decisions are values."""
    one, other = (wdhook.plan(nn.Linear(2, 2), 0.5)["weight"] for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert isinstance(one, Decision)


def test_the_root_may_be_a_layer() -> None:
    """Names without a path: `weight` and `bias` of the root itself."""
    assert decided(nn.Linear(2, 2)) == {"weight": 0.5, "bias": 0.0}
    assert decided(nn.Linear(2, 2), overrides={"bias": True, "weight": 0.0}) == {
        "weight": 0.0,
        "bias": 0.5,
    }
    assert decided(perceptron()[2]) == {"weight": 0.0, "bias": 0.0}
