"""The argument `toward`: which parameter is drawn to which value, and slips."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from twins import perceptron, λ

import wdhook


def targets(toward: object, **how: object) -> dict[str, str]:
    """Name → target, of the decayed parameters of the perceptron."""
    plan = wdhook.plan(perceptron(), λ, toward=toward, **how)  # type: ignore[arg-type]
    return {name: d.target for name, d in plan.decayed.items()}


def test_a_number_for_all() -> None:
    assert targets(1) == {"0.weight": "1", "3.weight": "1", "5.weight": "1"}


def test_the_last_match_wins_and_others_go_to_zero() -> None:
    toward = {"*.weight": "init", "3.*": 0.5, nn.Linear: 2.0, "5.weight": 0.0}
    assert targets(toward) == {"0.weight": "2", "3.weight": "2", "5.weight": "0"}
    assert targets({"3.*": "init"}) == {"0.weight": "0", "3.weight": "init", "5.weight": "0"}


def test_gains_become_eligible_by_overrides() -> None:
    """Gains toward 1, weights toward 0."""
    plan = wdhook.plan(perceptron(), λ, overrides={"norm": True}, toward={"norm": 1.0})
    assert {n: d.toward for n, d in plan.decayed.items()} == {
        "0.weight": 0.0,
        "2.weight": 1.0,
        "2.bias": 1.0,
        "3.weight": 0.0,
        "5.weight": 0.0,
    }


def test_exempt_parameters_have_no_target() -> None:
    plan = wdhook.plan(perceptron(), λ, toward="init")
    assert {d.toward for d in plan.exempt.values()} == {0.0}


def test_a_selector_of_exempt_parameters_alone_is_a_slip() -> None:
    with pytest.raises(wdhook.SelectorError, match=r"overrides=.'bias': True"):
        targets({"bias": 1.0})


def test_a_selector_that_matches_nothing() -> None:
    with pytest.raises(wdhook.SelectorError, match=r"`toward` matches nothing[\s\S]*'0.weight'"):
        targets({"0.weigth": 1.0})


@pytest.mark.parametrize(
    "toward",
    [True, float("nan"), float("inf"), "start", nn.Linear(1, 1), {"*": None}, [1.0], torch.ones(3)],
    ids=repr,
)
def test_targets_without_meaning(toward: object) -> None:
    with pytest.raises(wdhook.ArgumentError, match="toward"):
        targets(toward)


@pytest.mark.parametrize("source", ["start", 3, {"a": 1}, [torch.ones(3)]], ids=repr)
def test_sources_without_meaning(source: object) -> None:
    with pytest.raises(wdhook.ArgumentError, match="Anchor"):
        wdhook.Anchor(source)  # type: ignore[arg-type]


def test_the_table_and_the_data_say_the_target() -> None:
    toward = {"0.*": "init", "3.*": 1.0, "5.*": wdhook.Anchor(perceptron())}
    plan = wdhook.plan(perceptron(), λ, toward=toward)
    said = [line for line in str(plan).splitlines() if "toward" in line]
    assert [line.split("toward ")[1].strip() for line in said] == ["init", "1", "given"]
    rows = json.loads(json.dumps(plan.to_dict()))["parameters"]
    assert [row["toward"] for row in rows if row["weight_decay"]] == ["init", 1.0, "given"]


def test_a_copy_of_a_plan_has_no_tensors() -> None:
    """A model that carries its handle can be copied and sent without the other model."""
    plan = wdhook.plan(perceptron(), λ, toward=wdhook.Anchor(perceptron()))
    assert len(pickle.dumps(plan)) < 3000
    assert copy.deepcopy(plan)["0.weight"].target == "given"


def test_an_optimizer_cannot_have_it() -> None:
    model = perceptron()
    plan = wdhook.plan(model, λ, toward="init")
    with pytest.raises(wdhook.TargetError, match="attach"):
        plan.param_groups()


def test_a_ready_plan_has_its_targets() -> None:
    model = perceptron()
    plan = wdhook.plan(model, λ, toward=1.0)
    with pytest.raises(wdhook.ArgumentError, match="ready plan"):
        wdhook.attach(model, plan, toward=2.0)
    with wdhook.attach(model, plan) as decay:
        assert decay.plan["0.weight"].toward == 1.0


def test_a_source_with_the_names_of_wrappers() -> None:
    """A checkpoint of a DistributedDataParallel of a compiled model."""
    source = {f"module._orig_mod.{n}": p for n, p in perceptron().state_dict().items()}
    anchor = wdhook.Anchor(source)
    assert anchor.value(["0.weight"], (5, 4)) is not None
    assert anchor.value(["head.weight", "0.weight"], (5, 4)) is not None
    assert anchor.value(["0.weight"], (4, 5)) is None
    assert anchor.value(["7.weight"], (4, 5)) is None
    assert wdhook.Anchor().value(["0.weight"], (5, 4)) is None


def test_names_that_differ_by_a_prefix_alone() -> None:
    """`module.` is a wrapper's prefix, and may be the name of a sub-module."""
    one, other = torch.zeros(2), torch.ones(2)
    anchor = wdhook.Anchor({"fc.weight": one, "module.fc.weight": other})
    assert anchor.value(["fc.weight"], (2,)) is not None
    assert torch.equal(anchor.value(["fc.weight"], (2,)), one)
    assert torch.equal(anchor.value(["module.fc.weight"], (2,)), other)


def test_a_state_dict_may_hold_objects_beside_tensors() -> None:
    """`get_extra_state` of modules; but nothing else than those is no source."""
    assert (
        wdhook.Anchor({"w": torch.ones(2), "_extra_state": {"a": 1}}).value(["w"], (2,)) is not None
    )
    with pytest.raises(wdhook.ArgumentError, match="Anchor"):
        wdhook.Anchor(nn.Linear(2, 2, device="meta"))


def test_a_number_that_the_parameter_cannot_hold() -> None:
    model = perceptron(torch.float16)
    with pytest.raises(wdhook.ArgumentError, match="toward"):
        wdhook.plan(model, λ, toward=1e5)
    assert wdhook.plan(model, λ, toward=1e4)["0.weight"].toward == 1e4


@pytest.mark.parametrize("source", ["init", "given"])
def test_a_copy_of_an_anchor_says_where_it_is_kept(source: str) -> None:
    anchor = wdhook.Anchor(
        "init" if source == "init" else perceptron(), device="cpu", dtype=torch.bfloat16
    )
    again = pickle.loads(pickle.dumps(anchor))
    assert (again.is_init, again.device, again.dtype) == (
        source == "init",
        torch.device("cpu"),
        torch.bfloat16,
    )
