"""The classifier: torch's own layers, families, names, structure, shape, and what must not sway
them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from twins import assert_linear, calls

import wdhook
from wdhook._roles.classifier import DECAYED_ROLES, Role, classify
from wdhook._roles.vocabulary import Family, family_of

LINEAR = {"weight": "weight", "bias": "bias"}
NORM = {"weight": "norm", "bias": "norm"}
RECURRENT = {"weight_ih": "weight", "weight_hh": "weight", "bias_ih": "bias", "bias_hh": "bias"}
RECURRENT_STACK = {f"{name}_l0": role for name, role in RECURRENT.items()}


def roles(model: nn.Module) -> dict[str, str]:
    """The role of each parameter, as plain strings."""
    return {name: str(verdict.role) for name, verdict in classify(model).items()}


def grid(shape: tuple[int, ...]) -> torch.Tensor:
    """Values that say nothing: neither equal nor drawn at random."""
    return torch.linspace(0, 1, math.prod(shape)).reshape(shape)


def holder(class_name: str, **parameters: object) -> nn.Module:
    """A module of a new class with that name; a tuple becomes a parameter of that shape, a module a
    child.
    """
    module = type(class_name, (nn.Module,), {})()
    for name, value in parameters.items():
        setattr(module, name, nn.Parameter(grid(value)) if isinstance(value, tuple) else value)
    return module


TORCH_LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "Linear": (lambda: nn.Linear(2, 3), LINEAR),
    "Linear to one": (lambda: nn.Linear(3, 1), LINEAR),
    "LazyLinear": (lambda: nn.LazyLinear(3), LINEAR),
    "Bilinear": (lambda: nn.Bilinear(2, 3, 4), LINEAR),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 1), LINEAR),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), LINEAR),
    "Conv2d with one weight": (lambda: nn.Conv2d(1, 1, 1), LINEAR),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 1), LINEAR),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 1), LINEAR),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 1), LINEAR),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 1), LINEAR),
    "LazyConv2d": (lambda: nn.LazyConv2d(3, 1), LINEAR),
    "LazyConvTranspose2d": (lambda: nn.LazyConvTranspose2d(3, 1), LINEAR),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), NORM),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), NORM),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), NORM),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, NORM),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), NORM),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), NORM),
    "GroupNorm": (lambda: nn.GroupNorm(1, 3), NORM),
    "LayerNorm over two axes": (lambda: nn.LayerNorm([3, 4]), NORM),
    "Embedding": (lambda: nn.Embedding(5, 3), {"weight": "embedding"}),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3), {"weight": "embedding"}),
    "PReLU": (lambda: nn.PReLU(3), {"weight": "scale"}),
    "RNN": (lambda: nn.RNN(2, 3), RECURRENT_STACK),
    "GRU": (lambda: nn.GRU(2, 3), RECURRENT_STACK),
    "LSTM with projection": (
        lambda: nn.LSTM(2, 3, proj_size=1, bias=False),
        {"weight_ih_l0": "weight", "weight_hh_l0": "weight", "weight_hr_l0": "weight"},
    ),
    "RNNCell": (lambda: nn.RNNCell(2, 3), RECURRENT),
    "GRUCell": (lambda: nn.GRUCell(2, 3), RECURRENT),
    "LSTMCell": (lambda: nn.LSTMCell(2, 3), RECURRENT),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {
            "in_proj_weight": "weight",
            "in_proj_bias": "bias",
            "bias_k": "bias",
            "bias_v": "bias",
            "out_proj.weight": "weight",
            "out_proj.bias": "bias",
        },
    ),
    "MultiheadAttention with kdim": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        {
            "q_proj_weight": "weight",
            "k_proj_weight": "weight",
            "v_proj_weight": "weight",
            "out_proj.weight": "weight",
        },
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 10, [5], head_bias=True),
        {
            "head.weight": "weight",
            "head.bias": "bias",
            "tail.0.0.weight": "weight",
            "tail.0.1.weight": "weight",
        },
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(3, 3)),
        {"bias": "bias", "parametrizations.weight.original": "weight"},
    ),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
        {
            "bias": "bias",
            "parametrizations.weight.original0": "scale",
            "parametrizations.weight.original1": "weight",
        },
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3, bias=False)),
        {"parametrizations.weight.original": "weight"},
    ),
    "spectral_norm of old": (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
        {"bias": "bias", "weight_orig": "weight"},
    ),
}
if hasattr(nn, "RMSNorm"):
    TORCH_LAYERS["RMSNorm"] = (lambda: nn.RMSNorm([3, 4]), {"weight": "norm"})


@pytest.mark.parametrize("layer", TORCH_LAYERS)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore::FutureWarning")
def test_torch_layers_are_known_by_type(layer: str) -> None:
    """Every torch layer gets its roles from its type, and nothing about them is a guess."""
    make, expected = TORCH_LAYERS[layer]
    verdicts = classify(make())
    assert {name: str(verdict.role) for name, verdict in verdicts.items()} == expected
    assert not any(verdict.guess for verdict in verdicts.values())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*weight_norm is deprecated")
def test_old_weight_norm_has_a_magnitude() -> None:
    """`weight_g` of the old weight_norm is a scale although it is 2-D; `weight_v` is the weight."""
    assert roles(nn.utils.weight_norm(nn.Linear(2, 3))) == {
        "bias": "bias",
        "weight_g": "scale",
        "weight_v": "weight",
    }
    assert roles(nn.utils.weight_norm(nn.Linear(2, 3), dim=None))["weight_g"] == "scale"


def test_g_without_v_is_no_magnitude() -> None:
    """A `w_g` with no `w_v` beside it is a projection onto one number, not a weight norm's
    magnitude.
    """
    assert roles(holder("Attention", w_g=(8, 1))) == {"w_g": "weight"}
    assert roles(holder("Attention", w_g=(8, 1), w_v=(8, 4))) == {"w_g": "scale", "w_v": "weight"}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:.*weight_norm is deprecated")
def test_every_torch_layer_with_parameters_is_in_the_table() -> None:
    """No parameter-holding leaf class of torch.nn is forgotten; the sequence layers are made of
    these.
    """
    made = {type(module) for make, _ in TORCH_LAYERS.values() for module in make().modules()}
    known = {cls.__name__ for cls in made} | {"Conv2d", "Conv1d", "Conv3d", "Linear"}
    abstract = {"Container", "Module", "RNNBase", "RNNCellBase", "ParameterList", "ParameterDict"}
    lazy_twins = {name for name in dir(nn) if name.startswith("Lazy")}
    dimension_twins = {"InstanceNorm1d", "InstanceNorm3d"}
    takes_parameters = {
        name
        for name, cls in vars(nn).items()
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and any("Parameter" in word for word in cls.__init__.__code__.co_names)
    }
    assert takes_parameters - known - abstract - lazy_twins - dimension_twins == set()


FAMILIES: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "a norm by name": (holder("LlamaRMSNorm", weight=(8,)), {"weight": "norm"}),
    "a norm over heads": (holder("PerHeadRMSNorm", weight=(4, 8)), {"weight": "norm"}),
    "a norm whose project says dense": (
        holder("HunYuanDenseV1RMSNorm", weight=(8,)),
        {"weight": "norm"},
    ),
    "GRN": (
        holder("GRN", gamma=(1, 1, 1, 8), beta=(1, 1, 1, 8)),
        {"gamma": "norm", "beta": "norm"},
    ),
    "DyT": (
        holder("DyT", alpha=(1,), weight=(8,), bias=(8,)),
        {"alpha": "norm", "weight": "norm", "bias": "norm"},
    ),
    "FRN": (
        holder("FilterResponseNormTlu2d", tau=(8,), weight=(8,)),
        {"tau": "norm", "weight": "norm"},
    ),
    "EvoNorm": (holder("EvoNorm2dS0", v=(8,), bias=(8,)), {"v": "norm", "bias": "norm"}),
    "ScaleNorm": (holder("ScaleNorm", g=(1,)), {"g": "norm"}),
    "a gated norm": (holder("MambaRMSNormGated", weight=(8,)), {"weight": "norm"}),
    "BatchNorm with activation": (
        holder("BatchNormAct2d", weight=(8,), bias=(8,)),
        {"weight": "norm", "bias": "norm"},
    ),
    "LayerScale": (holder("LayerScale2d", gamma=(1, 8, 1, 1)), {"gamma": "scale"}),
    "a norm fused with a linear layer": (
        holder(
            "LayerNormLinear",
            layer_norm_weight=(8,),
            layer_norm_bias=(8,),
            weight=(4, 8),
            bias=(4,),
        ),
        {
            "layer_norm_weight": "norm",
            "layer_norm_bias": "bias",
            "weight": "weight",
            "bias": "bias",
        },
    ),
    "an adaptive norm with a linear layer": (
        holder("AdaLayerNorm", linear=nn.Linear(2, 4), norm=nn.LayerNorm(2)),
        {
            "linear.weight": "weight",
            "linear.bias": "bias",
            "norm.weight": "norm",
            "norm.bias": "norm",
        },
    ),
    "a convolution that says norm": (
        holder("ConvNormAct", weight=(4, 4, 3, 3)),
        {"weight": "weight"},
    ),
    "a linear layer by name": (
        holder("Conv1D", weight=(4, 8), bias=(8,)),
        {"weight": "weight", "bias": "bias"},
    ),
    "an embedding by name": (holder("ScaledWordEmbedding", weight=(9, 4)), {"weight": "embedding"}),
    "experts": (
        holder("Experts", gate_up_proj=(2, 4, 8), down_proj=(2, 8, 4)),
        {"gate_up_proj": "weight", "down_proj": "weight"},
    ),
    "experts with biases": (
        holder("Experts", gate_up_proj_bias=(2, 8)),
        {"gate_up_proj_bias": "bias"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """A class that is not torch's is known by what it is called."""
    module, expected = FAMILIES[family]
    assert roles(module) == expected


def test_subclass_of_a_family_inherits_it() -> None:
    """A class of another name is what its base class is called."""
    base = type(holder("OlmoRMSNorm", weight=(8,)))
    child = type("QKClip", (base,), {})()
    child.weight = nn.Parameter(torch.zeros(2, 8))
    assert roles(child) == {"weight": "norm"}


def test_path_is_not_read() -> None:
    """A linear layer below `norm.pos_bias` stays a weight; a norm below `linear` stays a norm."""
    model = nn.ModuleDict(
        {"norm": nn.ModuleDict({"pos_bias": nn.Linear(2, 2)}), "linear": nn.LayerNorm(2)}
    )
    assert roles(model) == {
        "norm.pos_bias.weight": "weight",
        "norm.pos_bias.bias": "bias",
        "linear.weight": "norm",
        "linear.bias": "norm",
    }


NAMES: dict[str, str] = {
    "A_log": "other", "D": "other", "dt_bias": "other", "time_decay": "other", "log_dt": "other",
    "pos_embed": "position", "cls_token": "position", "relative_position_bias_table": "position",
    "rel_pos_w": "position", "register_tokens": "position", "latents": "position",
    "attention_biases": "position",
    "logit_scale": "scale", "temperature": "scale", "lambda_1": "scale", "gamma_xca": "scale",
    "layer_scale": "scale",
    "r_w_bias": "bias", "e_score_correction_bias": "bias", "sinks": "bias",
    "scale_shift_table": "bias",
    "gate": "weight", "lora_A": "weight", "time_maa_w1": "weight", "kernel": "weight",
    "w1": "weight",
    "spline_weight": "weight", "dynamic_alpha_fn": "weight", "mm_input_projection_weight": "weight",
    "codebook": "embedding", "word_embeddings": "embedding",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_matrices(name: str) -> None:
    """A matrix in a module that says nothing is known by its own name: its last word with a
    meaning.
    """
    assert roles(holder("Mixer", **{name: (4, 8)})) == {name: NAMES[name]}


@pytest.mark.parametrize("name", ["gate", "weight", "skip", "cross_attn_gate", "mystery"])
def test_vectors_of_unknown_owners_are_exempt_guesses(name: str) -> None:
    """A vector in a module that says nothing is exempt and calls itself a guess; the matrix twin
    decays.
    """
    (vector,) = classify(holder("Thing", **{name: (1, 1, 8)})).values()
    assert not vector.decayed
    assert vector.guess
    (matrix,) = classify(holder("Thing", **{name: (4, 1, 8)})).values()
    assert matrix.decayed


def test_shape_is_the_last_resort() -> None:
    """Without type and name the dimensions larger than one decide, and the reason says so."""
    verdicts = classify(holder("Thing", u=(3, 4), x=(1, 4, 1)))
    assert (verdicts["u"].role, verdicts["u"].reason, verdicts["u"].guess) == (
        Role.WEIGHT,
        "2-D, owner unknown",
        True,
    )
    assert (verdicts["x"].role, verdicts["x"].reason, verdicts["x"].guess) == (
        Role.OTHER,
        "1-D, owner unknown",
        True,
    )


def test_eps_and_vectors_make_a_norm() -> None:
    """An eps and only vectors make a norm under any name; with a matrix, or without the eps, they
    do not.
    """
    module = holder("Thing", scaling_vector=(1, 8), u=(8,))
    module.eps = 1e-6
    assert roles(module)["u"] == "norm"
    module.big = nn.Parameter(torch.zeros(8, 8))
    assert roles(module)["u"] == "other"
    assert roles(holder("Thing", u=(8,)))["u"] == "other"


def test_type_outranks_shape_of_a_shard() -> None:
    """A flat shard of a linear weight or an expert stays a weight, one of a norm over two axes a
    norm.
    """
    linear, norm = nn.Linear(4, 4), nn.LayerNorm([4, 4])
    experts = holder("Experts", w1=(2, 4, 4), down_proj=(2, 4, 4))
    model = nn.ModuleList([linear, norm, experts])
    whole = roles(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[:5]
    assert roles(model) == whole


def test_ds_shape_is_the_shape() -> None:
    """Under ZeRO-3 every parameter is an empty 1-D tensor: `ds_shape` tells what it was."""
    module = holder("Thing", u=(0,), x=(0,))
    module.u.ds_shape, module.x.ds_shape = torch.Size([4, 8]), torch.Size([8])
    assert roles(module) == {"u": "weight", "x": "other"}
    del module.u.ds_shape
    assert roles(module)["u"] == "other"


def test_lazy_parameters_need_no_shape() -> None:
    """An uninitialized parameter of an unknown owner is classified without asking for its shape."""
    module = nn.Module()
    module.thing = nn.UninitializedParameter()
    module.bias = nn.UninitializedParameter()
    verdicts = classify(module)
    assert (verdicts["thing"].role, verdicts["thing"].guess) == (Role.WEIGHT, True)
    assert verdicts["bias"].role is Role.BIAS


def test_integers_are_never_decayed() -> None:
    """Packed quantized weights are not numbers to shrink, even in a Linear; complex weights are."""
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    verdict = classify(linear)["weight"]
    assert (verdict.role, verdict.decayed) == (Role.OTHER, False)
    assert "uint8" in verdict.reason
    assert classify(nn.Linear(4, 4, dtype=torch.complex64))["weight"].decayed


def test_packed_weights_in_a_float_type() -> None:
    """bitsandbytes may store packed weights as bfloat16; the parameter's type gives it away."""
    packed = type("Params4bit", (nn.Parameter,), {})(torch.zeros(8, 1))
    linear = nn.Linear(4, 4)
    linear.weight = packed
    assert not classify(linear)["weight"].decayed
    linear.weight = nn.Parameter(torch.zeros(8, 1))
    assert classify(linear)["weight"].decayed


def test_frozen_parameters_have_the_same_roles() -> None:
    """`requires_grad=False` changes nothing: a parameter may be unfrozen later."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    before = classify(model)
    assert classify(model.requires_grad_(False)) == before


def test_tied_weights_have_one_entry() -> None:
    """An embedding that is also the output layer is decayed once, under its first name."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    verdicts = classify(model)
    assert list(verdicts) == ["embed.weight"]
    assert verdicts["embed.weight"].role is Role.EMBEDDING
    assert verdicts["embed.weight"].decayed


def test_strictest_owner_wins() -> None:
    """A parameter that any owner exempts is exempt, whichever comes first."""
    for order in (("linear", "norm"), ("norm", "linear")):
        parts = {"linear": nn.Linear(3, 3, bias=False), "norm": nn.LayerNorm(3, bias=False)}
        parts["norm"].weight = parts["linear"].weight
        verdicts = classify(nn.ModuleDict({name: parts[name] for name in order}))
        assert [verdict.role for verdict in verdicts.values()] == [Role.NORM]


def test_containers_give_their_name() -> None:
    """What lies in a ParameterList or ParameterDict is named after it, also through a
    ModuleList.
    """
    model = nn.Module()
    model.gammas = nn.ParameterList([nn.Parameter(torch.zeros(4, 8))])
    model.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(1, 8))})
    model.tokens = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.zeros(4, 8))])])
    model.items_ = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(4, 8))})
    assert roles(model) == {
        "gammas.0": "scale",
        "lora_A.default": "weight",
        "tokens.0.0": "position",
        "items_.bias": "bias",
    }


def test_root_parametrization_and_nesting() -> None:
    """A parametrized root, child, or tensor other than `weight` is resolved to its layer."""

    class Double(nn.Module):
        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return 2 * tensor

    root, bias = nn.Linear(2, 2), nn.Linear(2, 2)
    parametrize.register_parametrization(root, "weight", Double())
    parametrize.register_parametrization(bias, "bias", Double())
    assert roles(root) == {"bias": "bias", "parametrizations.weight.original": "weight"}
    assert roles(nn.Sequential(bias))["0.parametrizations.bias.original"] == "bias"
    assert classify(root)["parametrizations.weight.original"].reason == "owner is nn.Linear"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules_keep_their_roles() -> None:
    """Scripting hides the types: the original class names speak."""
    model = nn.Sequential(
        nn.Linear(2, 3),
        nn.LayerNorm([2, 3]),
        nn.Conv2d(2, 2, 1),
        nn.BatchNorm2d(2),
        nn.Embedding(3, 4),
    )
    assert roles(torch.jit.script(model)) == roles(model)


def test_peft_layers() -> None:
    """LoRA's A and B are weights at any rank; AdaLoRA's singular values and DoRA's magnitude are
    not.
    """
    layer = holder("LoraLinear", lora_A=nn.ModuleDict({"default": nn.Linear(4, 1, bias=False)}))
    layer.magnitude = nn.ModuleDict({"default": holder("DoraLinearLayer", weight=(8,))})
    adaptive = holder("SVDLinear", lora_A=nn.ParameterDict(), lora_E=nn.ParameterDict())
    adaptive.lora_A["default"], adaptive.lora_E["default"] = (
        nn.Parameter(torch.zeros(1, 8)),
        nn.Parameter(torch.zeros(4, 1)),
    )
    assert {name: verdict.decayed for name, verdict in classify(adaptive).items()} == {
        "lora_A.default": True,
        "lora_E.default": False,
    }
    assert roles(layer) == {"lora_A.default.weight": "weight", "magnitude.default.weight": "scale"}


def test_names_and_order_are_those_of_the_model() -> None:
    """The keys are exactly `named_parameters()`, in its order, the root's own parameters
    included.
    """
    model = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_parameter("absent", None)
    assert list(classify(model)) == [name for name, _ in model.named_parameters()]


def test_classify_is_pure() -> None:
    """No parameter, flag, attribute or random state changes; the result is the same each time."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2)).eval()
    before = copy.deepcopy(model.state_dict())
    attributes = [sorted(vars(module)) for module in model.modules()]
    generator = torch.random.get_rng_state()
    first, second = classify(model), classify(model)
    assert first == second
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(not vars(parameter) and parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_same_class_name_different_children() -> None:
    """What is remembered of one module is not carried over to a namesake that is built
    differently.
    """
    whole = holder("TokenNorm", table=(4, 8))
    hybrid = type(whole)()
    hybrid.table, hybrid.inner = nn.Parameter(torch.zeros(4, 8)), nn.Linear(2, 2)
    assert roles(nn.ModuleList([whole, hybrid]))["0.table"] == "norm"
    assert roles(nn.ModuleList([whole, hybrid]))["1.table"] == "position"


@pytest.mark.parametrize(
    ("class_name", "family"),
    [
        ("RMSNorm", Family.NORM), ("LN", Family.NORM), ("AdaLayerNormZero", Family.NORM),
        ("rmsnorm", Family.NORM),
        ("LayerNormLinear", Family.WEIGHT), ("TopkRouter", Family.WEIGHT),
        ("NormMlpClassifierHead", Family.WEIGHT),
        ("NormFreeBlock", Family.COMPOSITE), ("GPTNeoXLayer", Family.COMPOSITE), ("Net",
        Family.COMPOSITE),
        ("LearnedPositionalEmbedding", Family.EMBEDDING), ("Snake1d", Family.SCALE),
        ("Generator", None),
    ],
)  # fmt: skip
def test_class_names_are_read_from_the_end(class_name: str, family: Family | None) -> None:
    """The last word with a meaning decides."""
    assert family_of(class_name) is family


def test_role_is_a_string() -> None:
    """A role compares, prints and looks up like its name, and exactly two roles decay."""
    assert Role("norm") is Role.NORM
    assert Role.NORM == str(Role.NORM) == "norm"
    assert {"weight", "embedding"} == DECAYED_ROLES


def test_the_cost_is_linear() -> None:
    """Twice as many modules cost twice as many calls."""

    def cost(blocks: int) -> int:
        with torch.device("meta"):
            model = nn.Sequential(
                *[nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(blocks)]
            )
        assert len(classify(model)) == 4 * blocks
        return calls(lambda: classify(model))

    assert_linear(cost, 300)


def test_reasons_name_classes_that_readers_know() -> None:
    """A private class of torch goes by its public base; a class of the user by its own name."""

    class Router(nn.Linear):
        pass

    def reason(module: nn.Module, name: str) -> str:
        return wdhook.plan(module, 0.5)[name].reason

    assert reason(nn.MultiheadAttention(4, 2), "out_proj.weight") == "owner is nn.Linear"
    assert reason(Router(4, 2), "weight") == "owner is Router, an nn.Linear"
    router = nn.utils.parametrizations.orthogonal(Router(4, 4))
    assert reason(router, "bias") == "owner is Router, an nn.Linear"
    with pytest.raises(wdhook.SelectorError, match="classes there are: Linear, MultiheadAttention"):
        wdhook.plan(nn.MultiheadAttention(4, 2), 0.5, overrides={nn.Conv2d: 0.0})
