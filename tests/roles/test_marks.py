"""The marks that other projects leave on modules and parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from twins import assert_linear, calls

import wdhook
from wdhook._roles.classifier import Role, Verdict, classified, classify
from wdhook._roles.marks import bare_name


class Attention(nn.Module):
    """A layer with two matrices that the shape rule would decay."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.mix = nn.Parameter(torch.eye(3))


class Listing(Attention):
    """The same, which lists names as timm's and many other models do."""

    def __init__(self, listed: Any) -> None:
        super().__init__()
        self.listed = listed

    def no_weight_decay(self) -> Any:
        return self.listed


class Keywords(Attention):
    """The same, which lists substrings as Swin does."""

    def no_weight_decay_keywords(self) -> Iterable[str]:
        return {"ro", "absent"}


def exempt(model: nn.Module) -> set[str]:
    """The names that an explicit mark exempts."""
    return {name for name, verdict in classify(model).items() if verdict.weight_decay == 0.0}


@pytest.mark.parametrize(
    "listed", [{"mix"}, ["mix"], ("mix",), {"mix": 0}, "mix", {"m?x"}, ["mi*", "nothing"]]
)
def test_no_weight_decay_lists(listed: Any) -> None:
    """A set, list, dict, lone name or glob exempts exactly what it names; the reason says who
    listed it.
    """
    model = nn.Sequential(Listing(listed))
    assert exempt(model) == {"0.mix"}
    assert classify(model)["0.mix"].reason == "listed by 0.no_weight_decay()"


@pytest.mark.parametrize("listed", [set(), [], {}, None, {"mi"}, {"ix"}, {"0.mix"}, False])
def test_names_must_match_whole(listed: Any) -> None:
    """A part of a name, or a name that has the module's own path before it, exempts nothing."""
    assert exempt(nn.Sequential(Listing(listed))) == set()


def test_listed_by_the_root() -> None:
    """The root lists full names; a glob reaches into sub-modules."""
    assert exempt(Listing({"proj.weight"})) == {"proj.weight"}
    assert exempt(Listing({"*weight"})) == {"proj.weight"}
    assert classify(Listing({"mix"}))["mix"].reason == "listed by no_weight_decay()"


def test_every_sub_module_may_list() -> None:
    """Lists of several levels add up, and each speaks only of what is below it."""
    outer = Listing({"inner.proj.weight"})
    outer.inner = Listing({"mix"})
    outer.other = Attention()
    assert exempt(outer) == {"inner.proj.weight", "inner.mix"}


def test_namesakes_of_a_listing_module() -> None:
    """`a` speaks for what is below `a`, not for its siblings `a1` and `ab`."""
    model = nn.ModuleDict(
        {"a1": Attention(), "a": Listing({"mix"}), "ab": Attention(), "z": Attention()}
    )
    assert exempt(model) == {"a.mix"}


def test_the_cost_of_many_lists_is_linear() -> None:
    """Sub-modules with lists do not each search all names."""

    def cost(modules: int) -> int:
        with torch.device("meta"):
            model = nn.Sequential(*[Listing({"mix"}) for _ in range(modules)])
        assert len(exempt(model)) == modules
        return calls(lambda: exempt(model))

    assert_linear(cost, 200)


def test_keywords_are_substrings_of_the_name_below() -> None:
    """`no_weight_decay_keywords` matches anywhere below its module, and nowhere outside."""
    model = nn.ModuleDict({"ro": Attention(), "b": Keywords()})
    assert exempt(model) == {"b.proj.weight", "b.proj.bias"}


@pytest.mark.parametrize(
    "prefix", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_wrapper_prefixes_do_not_hide_names(prefix: str) -> None:
    """A list made for the bare model still matches when a layer is wrapped; keys stay as
    they are.
    """
    model = Listing({"inner.mix"})
    wrapper = nn.Module()
    wrapper.add_module(prefix, Attention())
    model.inner = wrapper
    assert exempt(model) == {f"inner.{prefix}.mix"}
    outside = nn.Module()
    outside.add_module(prefix, Listing({"mix"}))
    assert exempt(outside) == {f"{prefix}.mix"}


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a._checkpoint_wrapped_module.b", "a.b"),
        ("a._fsdp_wrapped_module._fsdp_wrapped_module.b", "a.b"),
        ("my_module.a", "my_module.a"),
        ("a.module", "a.module"),
        ("modules.a", "modules.a"),
    ],
)
def test_bare_name(name: str, bare: str) -> None:
    """Whole path components of wrappers go, look-alikes and a parameter of that name stay."""
    assert bare_name(name) == bare


def test_plain_flag_on_a_module() -> None:
    """`module.no_weight_decay = True` exempts all below it; False nothing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1].no_weight_decay = True
    assert exempt(model) == {"1.0.weight", "1.0.bias"}
    assert classify(model)["1.0.weight"].reason == "1 is marked no_weight_decay"
    model[1].no_weight_decay = False
    assert exempt(model) == set()


@pytest.mark.parametrize("flag", ["_no_weight_decay", "no_weight_decay", "skip_weight_decay"])
def test_flags_on_a_parameter(flag: str) -> None:
    """A true flag exempts that parameter alone, with its reason; a false one does not."""
    layer = nn.Linear(2, 2)
    setattr(layer.weight, flag, True)
    assert exempt(layer) == {"weight"}
    assert classify(layer)["weight"] == Verdict(Role.WEIGHT, f"marked {flag}", False, 0.0)
    setattr(layer.weight, flag, False)
    assert exempt(layer) == set()


@pytest.mark.parametrize(("value", "decayed"), [(0.0, False), (0.05, True)])
def test_optim_gives_a_weight_decay_of_its_own(value: float, decayed: bool) -> None:
    """S4's `_optim` carries an absolute λ, and may decay what its role would exempt."""
    layer = nn.LayerNorm(2)
    layer.weight._optim = {"lr": 1e-3, "weight_decay": value}
    verdict = classify(layer)["weight"]
    assert (verdict.role, verdict.weight_decay, verdict.decayed) == (Role.NORM, value, decayed)
    layer.weight._optim = {"lr": 1e-3}
    assert classify(layer)["weight"].weight_decay is None


@pytest.mark.parametrize(
    "flag", ["is_embedding_parameter", "shared_embedding", "is_embedding_or_output_parameter"]
)
def test_megatron_embeddings(flag: str) -> None:
    """Megatron's flags call a matrix an embedding; a bias stays a bias."""
    layer = nn.Linear(2, 2)
    setattr(layer.weight, flag, True)
    setattr(layer.bias, flag, True)
    assert [verdict.role for verdict in classify(layer).values()] == [Role.EMBEDDING, Role.BIAS]
    setattr(layer.weight, flag, False)
    assert classify(layer)["weight"].role is Role.WEIGHT


def test_a_mark_on_either_alias_counts() -> None:
    """A tied parameter is exempt if one of its owners lists it under its own name."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "tail": Listing({"proj.weight"})})
    model["tail"].proj.weight = model["embed"].weight
    assert exempt(model) == {"embed.weight"}
    model["tail"].listed = set()
    assert exempt(model) == set()


def test_marks_outrank_guesses() -> None:
    """What somebody said is no guess any more."""
    model = nn.Module()
    model.u = nn.Parameter(torch.eye(3))
    assert classify(model)["u"].guess
    model.u._no_weight_decay = True
    assert not classify(model)["u"].guess


# ------------------------------------------------------------------------------------------- wdhook


class House(nn.Module):
    """A layer of nobody's family: without a mark its matrix is decayed and its vector is a
    guess.
    """

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.eye(3))
        self.v = nn.Parameter(torch.zeros(3))
        self.parts = nn.ParameterList([torch.eye(3)])
        self.named = nn.ParameterDict({"a": torch.eye(3), "b": torch.eye(3)})
        self.inner = nn.Linear(3, 3)


@pytest.fixture
def house_with() -> Any:
    """Makes a module of a fresh sub-class of House that has the mark."""
    return lambda mark: type("Mansion", (House,), {"wdhook_role": mark})()


UNMARKED = ["weight", "other", "weight", "weight", "weight", "weight", "bias"]


@pytest.mark.parametrize("role", [*Role, *map(str, Role)])
def test_wdhook_role_speaks_for_a_modules_own_parameters(house_with: Any, role: Any) -> None:
    """A role as a class attribute holds for all that the module holds itself, in containers too,
    not below it.
    """
    verdicts = classify(house_with(role))
    assert [str(verdict.role) for verdict in verdicts.values()] == [str(role)] * 5 + [
        "weight",
        "bias",
    ]
    assert verdicts["v"] == Verdict(Role(role), "marked wdhook_role in Mansion")


@pytest.mark.parametrize(
    ("mark", "changed"),
    [
        ({"u": "norm"}, {"u": "norm"}),
        ({"v": Role.WEIGHT, "absent": "norm"}, {"v": "weight"}),
        ({"parts": "scale"}, {"parts.0": "scale"}),
        ({"named": "bias"}, {"named.a": "bias", "named.b": "bias"}),
        ({"named_b": "scale", "named": "bias"}, {"named.a": "bias", "named.b": "scale"}),
        ({"inner": "norm", "weight": "norm"}, {}),
        ({}, {}),
        (None, {}),
    ],
)
def test_wdhook_role_for_each_name(house_with: Any, mark: Any, changed: dict[str, str]) -> None:
    """A mapping speaks of the names that it has; the rest is decided as without it, and may be
    absent.
    """
    expected = dict(zip(classify(House()), UNMARKED, strict=True)) | changed
    assert {
        name: str(verdict.role) for name, verdict in classify(house_with(mark)).items()
    } == expected


def test_wdhook_role_outranks_type_and_name() -> None:
    """It is what the author says: a sub-class of nn.Linear may be an embedding, a `weight`
    a norm.
    """
    table = type("Table", (nn.Linear,), {"wdhook_role": {"weight": "embedding"}})(2, 2)
    assert [verdict.role for verdict in classify(table).values()] == [Role.EMBEDDING, Role.BIAS]
    assert wdhook.plan(table, 0.5, overrides={Role.EMBEDDING: 0.1})["weight"].weight_decay == 0.1


def test_wdhook_role_is_inherited_and_undone() -> None:
    """Sub-classes have it, None in a sub-class takes it back, and so does deleting the
    attribute.
    """
    first = type("First", (House,), {"wdhook_role": "scale"})
    second = type("Second", (first,), {})
    third = type("Third", (second,), {"wdhook_role": None})
    roles = [[str(v.role) for v in classify(kind()).values()] for kind in (first, second, third)]
    assert roles == [["scale"] * 5 + UNMARKED[5:]] * 2 + [UNMARKED]
    del first.wdhook_role
    assert [str(v.role) for v in classify(second()).values()] == UNMARKED


def test_wdhook_role_on_one_module() -> None:
    """An attribute of an instance holds for it alone, though its class has been seen."""
    model = nn.Sequential(House(), House())
    model[1].wdhook_role = "norm"
    assert [str(v.role) for v in classify(model).values()] == UNMARKED + ["norm"] * 5 + UNMARKED[5:]
    del model[1].wdhook_role
    assert [str(v.role) for v in classify(model).values()] == UNMARKED * 2


def test_wdhook_role_and_how_much() -> None:
    """A mark that says how much, or that a tensor is no array of numbers, comes on top of a
    role.
    """
    model = type("Keys", (nn.Linear,), {"wdhook_role": "weight"})(2, 2)
    model.weight._no_weight_decay = True
    model.bias = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    verdicts = classify(model)
    assert verdicts["weight"] == Verdict(Role.WEIGHT, "marked _no_weight_decay", weight_decay=0.0)
    assert verdicts["bias"].role is Role.OTHER


def test_wdhook_role_and_parametrizations() -> None:
    """The mark on a layer still holds when its weight is parametrized; a magnitude stays a
    scale.
    """
    layer = type("Table", (nn.Linear,), {"wdhook_role": {"weight": "embedding"}})(2, 2)
    nn.utils.parametrizations.weight_norm(layer)
    assert [str(v.role) for v in classify(layer).values()] == ["bias", "scale", "embedding"]


@pytest.mark.parametrize(
    "mark", ["nrom", "", "NORM", 3, True, ["norm"], {"u": "nrom"}, {"absent": 0}]
)
def test_an_unknown_wdhook_role_is_loud(house_with: Any, mark: Any) -> None:
    """What is no role is an error with the module, what it got, and the roles that there are."""
    with pytest.raises(wdhook.ArgumentError) as caught:
        wdhook.plan(nn.Sequential(house_with(mark)), 1.0)
    got = next(iter(mark.values())) if isinstance(mark, dict) else mark
    for part in (
        "`wdhook_role`",
        "module: Mansion",
        f"got: {got!r}",
        "weight, embedding, bias",
        "Mansion.wdhook_role =",
    ):
        assert part in str(caught.value)


def test_classified_gives_the_parameters() -> None:
    """The same verdicts in the same order, with the model's own tensors, each once."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "tail": nn.Linear(4, 4)})
    model["tail"].weight = model["embed"].weight
    found = list(classified(model))
    assert {name: verdict for name, _, verdict in found} == classify(model)
    assert [(name, id(p)) for name, p, _ in found] == [
        (name, id(p)) for name, p in model.named_parameters()
    ]


def test_a_model_may_name_its_parameters_itself() -> None:
    """Names and order are those of the model's own `named_parameters`, where it has one."""

    class Own(nn.Linear):
        """Strips and reverses, as wrappers do."""

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return reversed(
                [(f"own_{name}", p) for name, p in super().named_parameters(*args, **kwargs)]
            )

    assert {name: str(verdict.role) for name, verdict in classify(Own(2, 2)).items()} == {
        "own_bias": "bias",
        "own_weight": "weight",
    }
