"""The marks that other projects leave on modules and parameters."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from wdhook._conventions import bare_name
from wdhook._roles import Role, Verdict, classify


class Attention(nn.Module):
    """A layer with two matrices that the shape rule would decay."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.mix = nn.Parameter(torch.zeros(3, 3))


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


@pytest.mark.parametrize("listed", [{"mix"}, ["mix"], ("mix",), {"mix": 0}, "mix", {"m?x"}, ["mi*", "nothing"]])
def test_no_weight_decay_lists(listed: Any) -> None:
    """A set, list, dict, lone name or glob exempts exactly what it names; the reason says who listed it."""
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
    model = nn.ModuleDict({"a1": Attention(), "a": Listing({"mix"}), "ab": Attention(), "z": Attention()})
    assert exempt(model) == {"a.mix"}


def test_many_listing_modules_are_fast() -> None:
    """Sub-modules with lists do not each search all names (the limit allows for a slow machine)."""
    with torch.device("meta"):
        model = nn.Sequential(*[Listing({"mix"}) for _ in range(2000)])
    start = time.process_time()
    assert len(exempt(model)) == 2000
    assert time.process_time() - start < 2.0


def test_keywords_are_substrings_of_the_name_below() -> None:
    """`no_weight_decay_keywords` matches anywhere below its module, and nowhere outside."""
    model = nn.ModuleDict({"ro": Attention(), "b": Keywords()})
    assert exempt(model) == {"b.proj.weight", "b.proj.bias"}


@pytest.mark.parametrize("prefix", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrapper_prefixes_do_not_hide_names(prefix: str) -> None:
    """A list made for the bare model still matches when a layer is wrapped; keys stay as they are."""
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


@pytest.mark.parametrize("flag", ["is_embedding_parameter", "shared_embedding", "is_embedding_or_output_parameter"])
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
    model.u = nn.Parameter(torch.zeros(3, 3))
    assert classify(model)["u"].guess
    model.u._no_weight_decay = True
    assert not classify(model)["u"].guess
