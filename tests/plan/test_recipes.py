"""The rules of other projects: by hand on small models, and against the original function on real
ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import UnknownNameError, make
from torch import nn
from truth import TRUTH

import wdhook
from wdhook._plan.recipes import RECIPES


class Bag(nn.Module):
    """A module that holds what it is given: a tuple becomes a parameter of that shape."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, thing in held.items():
            setattr(
                self, name, nn.Parameter(torch.ones(thing)) if isinstance(thing, tuple) else thing
            )


class House(Bag):
    """One of everything that the rules tell apart."""

    def __init__(self) -> None:
        super().__init__(
            pos_embed=(1, 3, 4),
            logit_scale=(),
            conv=nn.Conv2d(2, 4, 1),
            bn=nn.BatchNorm2d(4),
            gn=nn.GroupNorm(1, 4),
            ln=nn.LayerNorm([2, 3]),
            q_norm=Bag(weight=(4,)),
            grid=Bag(bias=(2, 2)),
            embed=nn.Embedding(5, 4),
            relative_bias=nn.Embedding(5, 4),
        )

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def no_weight_decay_keywords(self) -> set[str]:
        return {"relative_b"}


EXEMPT = {
    "forum": "conv.bias bn.weight bn.bias gn.bias ln.bias grid.bias relative_bias.weight",
    "timm": "pos_embed logit_scale conv.bias bn.weight bn.bias "
    "gn.weight gn.bias ln.bias q_norm.weight grid.bias",
    "huggingface": "conv.bias bn.bias gn.bias ln.weight "
    "ln.bias q_norm.weight grid.bias relative_bias.weight",
    "nanogpt": "logit_scale conv.bias bn.weight bn.bias gn.weight gn.bias q_norm.weight",
    "detectron2": "bn.weight bn.bias gn.weight gn.bias ln.weight ln.bias",
    "mmengine": "conv.bias bn.weight bn.bias gn.weight gn.bias ln.weight ln.bias grid.bias",
    "megatron": "conv.bias bn.weight bn.bias gn.weight gn.bias ln.bias q_norm.weight grid.bias",
    "fastai": "conv.bias bn.weight bn.bias gn.bias ln.weight ln.bias grid.bias",
    "swin": "pos_embed conv.bias bn.weight bn.bias gn.weight "
    "gn.bias ln.bias q_norm.weight grid.bias "
    "relative_bias.weight",
}


def exempt(model: nn.Module, recipe: str) -> set[str]:
    """The names that a recipe does not decay."""
    return set(wdhook.plan(model, 1.0, recipe=recipe).exempt)


@pytest.mark.parametrize("recipe", EXEMPT)
def test_one_of_everything(recipe: str) -> None:
    """Each rule exempts exactly what its project would, and each reason names the recipe."""
    assert exempt(House(), recipe) == set(EXEMPT[recipe].split())
    assert all(
        d.reason.startswith(f"recipe {recipe}: ")
        for d in wdhook.plan(House(), 1.0, recipe=recipe).values()
    )


def test_every_recipe_is_tested() -> None:
    """The table above misses none, and no two rules are the same on it."""
    assert list(RECIPES) == list(EXEMPT)
    assert len({frozenset(names.split()) for names in EXEMPT.values()}) == len(EXEMPT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_names_order_and_frozen_parameters(recipe: str) -> None:
    """Every parameter is decided, in the model's order, and a frozen one as if it were not."""
    model = House()
    before = exempt(model, recipe)
    model.requires_grad_(False)
    assert list(wdhook.plan(model, 1.0, recipe=recipe)) == [
        name for name, _ in model.named_parameters()
    ]
    assert exempt(model, recipe) == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_wrappers_are_looked_through(recipe: str) -> None:
    """A wrapped model is decided as the bare one: the projects read their lists before they
    wrap.
    """
    wrapped = torch.optim.swa_utils.AveragedModel(House())
    assert exempt(wrapped, recipe) == {f"module.{name}" for name in EXEMPT[recipe].split()}
    assert exempt(nn.Sequential(House()), "timm") == {
        f"0.{name}" for name in EXEMPT["timm"].split()
    } - {"0.pos_embed"}
    # Stands in for torch.compile, which takes seconds.
    compiled = type("OptimizedModule", (Bag,), {"__module__": "torch._dynamo.eval_frame"})(
        _orig_mod=House()
    )
    assert exempt(compiled, recipe) == {f"_orig_mod.{name}" for name in EXEMPT[recipe].split()}


@pytest.mark.parametrize("recipe", ["Timm", "", "hf", None, 3, ["timm"]])
def test_an_unknown_recipe_lists_those_there_are(recipe: Any) -> None:
    """A name that is no recipe is an error with all names; None alone means none."""
    if recipe is None:
        assert wdhook.plan(House(), 1.0, recipe=None)
        return
    with pytest.raises(wdhook.ArgumentError, match="'forum', 'timm', 'huggingface'"):
        wdhook.plan(House(), 1.0, recipe=recipe)


class Listing(Bag):
    """A model whose lists are given."""

    def __init__(self, listed: Any, **held: Any) -> None:
        super().__init__(**held)
        self.listed = listed

    def no_weight_decay(self) -> Any:
        return self.listed

    def no_weight_decay_keywords(self) -> Any:
        return ()


def test_lists_of_timm_and_swin() -> None:
    """timm matches globs, Swin whole names; both ask the root alone."""
    table = {"table": (2, 2)}
    model = Listing(
        ["t*", "inner.table"],
        inner=Listing(["table"], **table),
        side=Listing(["table"], **table),
        **table,
    )
    assert exempt(model, "timm") == {"table", "inner.table"}
    assert exempt(model, "swin") == {"inner.table"}
    assert exempt(model.side, "swin") == {"table"}
    model.listed = None
    assert exempt(model, "timm") == exempt(model, "swin") == set()


def test_a_flag_is_no_list() -> None:
    """`no_weight_decay = True` says nothing to timm, which would call it."""
    model = nn.Linear(2, 2)
    model.no_weight_decay = True
    assert exempt(model, "timm") == {"bias"}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("norm", False),
        ("q_norm", False),
        ("RMSNorm", False),
        ("my_layernorm_2", False),
        ("norm1", True),
        ("normal", True),
        ("qnorm", True),
        ("Debiased", False),
    ],
)
def test_names_of_huggingface(name: str, left: bool) -> None:
    """A component that is "norm" or ends with "_norm", and "layernorm", "rmsnorm", "bias" anywhere,
    any case.
    """
    assert exempt(nn.ModuleDict({name: Bag(matrix=(2, 2))}), "huggingface") == (
        set() if left else {f"{name}.matrix"}
    )


def test_layer_norm_of_huggingface() -> None:
    """What lies in a LayerNorm is exempt with its children, but the root itself is no layer of the
    model.
    """

    class Conditional(nn.LayerNorm):
        """A sub-class with a child."""

        def __init__(self) -> None:
            super().__init__(2)
            self.to_scale = nn.Linear(2, 2, bias=False)

    inside = exempt(nn.ModuleDict({"ada": Conditional()}), "huggingface")
    assert inside == {"ada.weight", "ada.bias", "ada.to_scale.weight"}
    assert exempt(Conditional(), "huggingface") == {"bias"}


@pytest.mark.parametrize("recipe", ["detectron2", "mmengine"])
@pytest.mark.parametrize(
    ("order", "expected"),
    [(("norm", "linear"), {"norm.weight", "norm.bias"}), (("linear", "norm"), {"norm.bias"})],
)
def test_the_first_owner_decides_for_a_shared_parameter(
    recipe: str, order: tuple[str, str], expected: set[str]
) -> None:
    """A shared parameter is met once, in the first module that has it."""
    layers = {"norm": nn.LayerNorm(2), "linear": nn.Linear(2, 2, bias=False)}
    layers["norm"].weight = layers["linear"].weight
    assert exempt(nn.ModuleDict({name: layers[name] for name in order}), recipe) == expected


def test_biases_of_fastai() -> None:
    """Whatever some module calls `bias` is exempt, also where a first owner has another name for
    it.
    """
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": Bag(table=shared.bias), "second": shared})
    assert exempt(model, "fastai") == {"first.table"}
    assert exempt(model, "mmengine") == set()


@pytest.mark.parametrize(
    ("module", "offset_bias"), [("mmcv.ops.deform_conv", False), ("torchvision.ops", True)]
)
def test_offsets_of_deformable_convolutions(module: str, offset_bias: bool) -> None:
    """mmengine decays the offset biases of mmcv's own deformable convolutions, and of no
    namesake.
    """
    deformable = type("ModulatedDeformConv2d", (Bag,), {"__module__": module})
    pack = type("ModulatedDeformConv2dPack", (deformable,), {})
    model = nn.ModuleDict({"dcn": pack(conv_offset=nn.Conv2d(2, 2, 1), bias=(2,))})
    assert exempt(model, "mmengine") == {
        "dcn.bias",
        *(["dcn.conv_offset.bias"] if offset_bias else []),
    }


def test_reasons_say_which_exception() -> None:
    """The reason is the exception that applied, or that none did."""
    reasons = {
        r: {n: d.reason for n, d in wdhook.plan(House(), 1.0, recipe=r).items()} for r in RECIPES
    }
    assert reasons["timm"]["pos_embed"] == "recipe timm: listed by no_weight_decay()"
    assert reasons["timm"]["logit_scale"] == "recipe timm: 0-D"
    assert reasons["swin"]["relative_bias.weight"] == "recipe swin: keyword 'relative_b'"
    assert reasons["huggingface"]["q_norm.weight"] == "recipe huggingface: '_norm' in the name"
    assert reasons["detectron2"]["gn.weight"] == "recipe detectron2: owner is nn.GroupNorm"
    assert reasons["fastai"]["bn.weight"] == "recipe fastai: in nn.BatchNorm2d"
    assert reasons["megatron"]["grid.bias"] == "recipe megatron: named .bias"
    assert reasons["nanogpt"]["embed.weight"] == "recipe nanogpt: no exception for it"


# ------------------------------------------------------------------------------------ against the o

MORE = {
    "torchvision": """alexnet convnext_base densenet121 efficientnet_v2_s fcn_resnet50
        fcos_resnet50_fpn inception_v3
        keypointrcnn_resnet50_fpn lraspp_mobilenet_v3_large maskrcnn_resnet50_fpn_v2 mc3_18
        mnasnet0_5 mobilenet_v2
        mvit_v1_b r2plus1d_18 resnet50 resnext50_32x4d retinanet_resnet50_fpn_v2 s3d
        shufflenet_v2_x0_5 squeezenet1_0
        ssdlite320_mobilenet_v3_large swin3d_t swin_t vgg11_bn vit_b_32 wide_resnet50_2""",
    "timm": """csatv2 darknet53 deit3_base_patch16_224 dla34 dpn68 fbnetc_100 hrnet_w18_small
        legacy_seresnet18 resnet18
        vit_tiny_patch16_224 xcit_nano_12_p16_224 swin_tiny_patch4_window7_224 convnextv2_atto""",
}
REAL = {
    lib: [n for known, n in sorted(TRUTH) if known == lib]
    for lib in ("timm", "torchvision", "transformers")
}
for _library, _names in MORE.items():
    REAL[_library] += _names.split()
Original = Callable[[nn.Module], dict[str, bool]]


def by_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    """What an optimizer decays, by name; it does not know frozen parameters."""
    decayed = {
        id(p): group["weight_decay"] > 0
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: decayed[id(p)] for name, p in model.named_parameters() if id(p) in decayed}


def timm_original(model: nn.Module) -> dict[str, bool]:
    from timm.optim import create_optimizer_v2

    return by_groups(model, create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1.0))


def huggingface_original(model: nn.Module) -> dict[str, bool]:
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return {name: name in decayed for name, _ in model.named_parameters()}


def mmengine_original(model: nn.Module) -> dict[str, bool]:
    from mmengine.optim import DefaultOptimWrapperConstructor

    config = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 1.0}}
    spared = {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0, "bypass_duplicate": True}
    return by_groups(model, DefaultOptimWrapperConstructor(config, spared)(model).optimizer)


def fastai_original(model: nn.Module) -> dict[str, bool]:
    from fastai.torch_core import norm_bias_params

    spared = {id(p) for p in norm_bias_params(model, True)}
    return {name: id(p) not in spared for name, p in model.named_parameters()}


ORIGINALS: dict[str, tuple[str, Original]] = {
    "timm": ("timm.optim", timm_original),
    "huggingface": ("transformers.trainer", huggingface_original),
    "mmengine": ("mmengine.optim", mmengine_original),
    "fastai": ("fastai.torch_core", fastai_original),
}


@pytest.fixture
def _no_logs() -> Iterator[None]:
    """mmengine logs a line for each parameter."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_no_logs")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ORIGINALS)
def test_original_agrees_on_the_small_model(recipe: str) -> None:
    """The table at the top says what the original function says."""
    module, original = ORIGINALS[recipe]
    pytest.importorskip(module, exc_type=ImportError)
    assert {name for name, decayed in original(House()).items() if not decayed} == set(
        EXEMPT[recipe].split()
    )


@pytest.mark.usefixtures("_no_logs")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", sorted(REAL))
@pytest.mark.parametrize("recipe", ORIGINALS)
def test_original_agrees_on_real_models(recipe: str, library: str) -> None:
    """Identical sets: every parameter that the original speaks of is decided as it decides."""
    module, original = ORIGINALS[recipe]
    pytest.importorskip(module, exc_type=ImportError)
    models = compared = 0
    for name in REAL[library]:
        try:
            model = make(library, name)
        except UnknownNameError:
            continue
        said = original(model)
        ours = {n: d.eligible for n, d in wdhook.plan(model, 1.0, recipe=recipe).items()}
        assert {n: ours[n] for n in said} == said, name
        assert {n for n, p in model.named_parameters() if p.requires_grad} <= set(said), name
        models, compared = models + 1, compared + len(said)
    print(f"{recipe}: {models} models of {library}, {compared} parameters, no difference")
    assert models > len(REAL[library]) / 2
