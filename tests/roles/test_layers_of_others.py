"""Layers of other libraries: kinds of parameters that a name or a shape alone would get wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wdhook
from wdhook._roles.classifier import Verdict, classify


def holder(
    class_name: str, attributes: dict[str, object] | None = None, **parameters: object
) -> nn.Module:
    """A module of a new class; a tuple becomes random values of that shape, a tensor is kept."""
    module = type(class_name, (nn.Module,), {})()
    for name, value in (attributes or {}).items():
        setattr(module, name, value)
    for name, value in parameters.items():
        generator = torch.Generator().manual_seed(0)
        tensor = torch.randn(value, generator=generator) if isinstance(value, tuple) else value
        setattr(module, name, nn.Parameter(tensor))
    return module


def only(module: nn.Module) -> Verdict:
    (verdict,) = classify(module).values()
    return verdict


def decayed(module: nn.Module) -> dict[str, bool]:
    return {name: verdict.decayed for name, verdict in classify(module).items()}


@pytest.mark.parametrize("name", ["weight_query", "w_state", "kernel_embed", "W_token"])
def test_a_first_word_of_weight_outranks_a_position(name: str) -> None:
    """`weight_query` is the weight of the query; `W_pos` is a table of positions."""
    assert decayed(holder("Mixer", **{name: (4, 3)})) == {name: True}
    assert decayed(holder("Mixer", W_pos=(4, 3))) == {"W_pos": False}


def test_a_query_beside_a_key_is_a_projection() -> None:
    """A query alone is a token; with a key of its kind beside it both are projections."""
    assert decayed(holder("Mixer", query=(4, 4))) == {"query": False}
    assert decayed(holder("Mixer", query=(4, 4), key=(4, 4))) == {"query": True, "key": True}


@pytest.mark.parametrize(
    "name",
    [
        "sigma",
        "rho",
        "weight_sigma",
        "weight_log_sigma",
        "rho_kernel",
        "log_var_weight",
        "logvar",
        "_diag_weight",
        "unconstrained_diagonal",
        "feature_mask",
        "mask",
        "unnormalized_widths",
        "unnormalized_heights",
        "log_noise",
        "modulation",
        "raw_lengthscale",
    ],
)
def test_spreads_masks_and_transformed_values_are_exempt(name: str) -> None:
    """A matrix of standard deviations, a mask or the logarithm of something is no weight."""
    assert decayed(holder("Thing", **{name: (4, 3)})) == {name: False}
    assert decayed(holder("Thing", **{f"{name}_proj": (4, 3)})) == {f"{name}_proj": True}


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 8, 1, 1)])
def test_a_bare_vector_in_a_convolution_multiplies(shape: tuple[int, ...]) -> None:
    """`w * x` in a class that is called a convolution; its matrix twin and `weight` are weights."""
    assert decayed(holder("RelConv", w=shape)) == {"w": False}
    assert decayed(holder("RelConv", w=(8, 4))) == {"w": True}
    assert decayed(holder("RowLinear", weight=(1, 8))) == {"weight": True}


def test_flat_storage_of_matrices() -> None:
    """A tensor product keeps the matrices of all its paths in one vector."""
    assert decayed(holder("FullyConnectedTensorProduct", weight=(448,))) == {"weight": True}
    assert decayed(holder("Linear", {"weight_numel": 448}, weight=(448,))) == {"weight": True}
    assert decayed(holder("Scaler", weight=(448,))) == {"weight": False}


@pytest.mark.parametrize("name", ["att", "att_src", "lower_entries", "dynamic_beta_fn"])
def test_vectors_that_contract(name: str) -> None:
    """Attention vectors, entries of triangular factors and read-outs decay as vectors too."""
    assert decayed(holder("Layer", **{name: (1, 1, 8)})) == {name: True}
    assert decayed(holder("Layer", **{name: (1, 2, 8)})) == {name: True}


def test_an_elementwise_class_scales_at_any_shape() -> None:
    """A row for each member of an ensemble; a bias of the same shape says so without a name."""
    assert decayed(holder("ElementwiseAffine", weight=(4, 16))) == {"weight": False}
    twin = holder("FeatureLinear", weight=(4, 16), bias=(4, 16))
    assert decayed(twin) == {"weight": False, "bias": False}
    assert decayed(holder("FeatureLinear", weight=(4, 16), bias=(4,)))["weight"]


def test_letters() -> None:
    """By custom a capital names a matrix, and r and s multiply."""
    ensemble = holder("LinearBatchEnsemble", weight=(8, 8), r=(4, 8), s=(4, 8))
    assert decayed(ensemble) == {"weight": True, "r": False, "s": False}
    assert decayed(holder("LinearBatchEnsemble", R=(4, 8), S=(4, 8))) == {"R": True, "S": True}


def test_an_eps_needs_vectors_of_one_length() -> None:
    """A factorized linear layer has an eps too, and vectors of several lengths."""
    factors = holder("Factors", {"eps": 1e-3}, u=(6,), v=(4,))
    assert {str(verdict.role) for verdict in classify(factors).values()} == {"other"}
    norm = holder("Factors", {"eps": 1e-3}, u=(6,), v=(6,))
    assert {str(verdict.role) for verdict in classify(norm).values()} == {"norm"}


def test_nicknames_at_the_end_of_compounds() -> None:
    """`...V2GRN` is a global response normalization; a class that only contains the letters not."""
    assert decayed(holder("StageV2GRN", weight=(1, 1, 1, 8), bias=(1, 1, 1, 8))) == {
        "weight": False,
        "bias": False,
    }
    assert str(only(holder("StageV2GRN", weight=(1, 8))).role) == "norm"
    assert str(only(holder("AGRNet", weight=(1, 8))).role) == "scale"
    assert str(only(holder("BatchNorm2dLayer", weight=(8,))).role) == "norm"


def test_mixins_do_not_speak_for_a_class() -> None:
    """A base class that is a mixin names an ability; another base names the kind."""
    mixin = type("EmbeddingMixin", (nn.Module,), {})
    loss = type("ArcLoss", (mixin,), {})()
    loss.W = nn.Parameter(torch.randn(8, 4))
    assert str(only(loss).role) == "weight"
    base = type("WordEmbedding", (nn.Module,), {})
    table = type("Lookup0", (base,), {})()
    table.W = nn.Parameter(torch.randn(8, 4))
    assert str(only(table).role) == "embedding"


def test_tables_of_positions() -> None:
    """A bare table in a class of positions, and the vector of a class-token class."""
    assert str(only(holder("PositionalEmbedding", weights=(9, 4))).role) == "position"
    assert str(only(holder("_CLSEmbedding", weight=(4,))).role) == "position"
    assert str(only(holder("WordEmbedding", weight=(9, 4))).role) == "embedding"


def test_gaussian_processes() -> None:
    """Inducing points and variational distributions are named for their job."""
    points = only(holder("VariationalStrategy", inducing_points=(9, 2)))
    assert (str(points.role), points.decayed) == ("position", False)
    mean = only(holder("Distribution", chol_variational_covar=(9, 9)))
    assert (str(mean.role), mean.decayed) == ("other", False)


def test_first_values_of_a_matrix() -> None:
    """A matrix of ones scales, one of zeros is added; no values, no news."""
    random = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert decayed(holder("Thing", weight=torch.ones(4, 64))) == {"weight": False}
    assert decayed(holder("Thing", weight=random)) == {"weight": True}
    assert decayed(holder("Thing", weight=torch.zeros(4, 64))) == {"weight": True}
    assert decayed(holder("Thing", weight=torch.ones(4, 64, device="meta"))) == {"weight": True}
    for values, contracts in ((torch.ones(4, 64), False), (random, True)):
        assert decayed(holder("Thing", u=values)) == {"u": contracts}
    zeros = torch.zeros(4, 64)
    assert decayed(holder("Thing", bonus=zeros, B=zeros)) == {"bonus": False, "B": True}
    assert only(holder("Thing", bonus=zeros)).guess


def test_first_values_of_a_vector() -> None:
    """A factor starts at one, or at zero; a vector that is drawn around zero contracts."""
    random = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1 / 8):
        verdict = only(holder("Thing", attention_weights=random * scale))
        assert verdict.decayed
        assert verdict.guess
    for values in (torch.ones(64), torch.zeros(64), torch.linspace(-1, 1, 64), random + 3):
        assert decayed(holder("Thing", weight=values)) == {"weight": False}
    elementwise = holder("Thing", weight=random / 8, bias=torch.zeros(64))
    assert decayed(elementwise) == {"weight": False, "bias": False}
    assert not only(holder("FourierFeatures", weight=random)).decayed


def test_a_bias_of_one_number_tells_a_layer_with_one_output() -> None:
    """`w @ x + b` has as many numbers in `w` as inputs; an affine map has as many in `b`."""
    assert decayed(holder("Flow", w=(4,), bias=(1,))) == {"w": True, "bias": False}
    assert decayed(holder("Flow", w=(4,), bias=(4,))) == {"w": False, "bias": False}
    ones = torch.ones(4)
    assert decayed(holder("Flow", w=ones, bias=(1,))) == {"w": False, "bias": False}


@pytest.mark.parametrize("name", ["points", "alpha", "knots", "offset", "latents"])
def test_a_matrix_named_by_an_open_word_is_a_guess(name: str) -> None:
    """A matrix called `points` or `alpha` may contract; as a vector the word is enough."""
    matrix, vector = only(holder("Thing", **{name: (4, 3)})), only(holder("Thing", **{name: (3,)}))
    assert (matrix.decayed, matrix.guess) == (False, True)
    assert (vector.decayed, vector.guess) == (False, False)
    assert not only(holder("Thing", **{f"{name}_bias": (4, 3)})).guess


def test_a_vector_called_kernel_is_a_guess() -> None:
    """As a matrix the word is enough; `weights` may weigh a sum, and one broadcast may scale."""
    assert not only(holder("Thing", kernel=(4, 3))).guess
    assert only(holder("Thing", kernel=(4,))).guess
    assert only(holder("Thing", weights=torch.ones(4))).guess
    assert not only(holder("Thing", weight=torch.ones(4))).guess
    assert only(holder("Thing", weight=(1, 4, 3))).guess


def test_a_capital_letter_names_a_matrix_of_one_line() -> None:
    """`A` of one row is the matrix with one output; without a second dimension it is a vector."""
    assert decayed(holder("Thing", A=(1, 4))) == {"A": True}
    assert decayed(holder("Thing", A=(4,))) == {"A": False}


def test_a_column_of_ones() -> None:
    """(n, 1) is a product with one output; of ones, a factor for channels; several weigh a sum."""
    ones = torch.ones(4, 1)
    assert decayed(holder("Thing", weight=(4, 1))) == {"weight": True}
    assert decayed(holder("Thing", weight=ones)) == {"weight": False}
    assert decayed(holder("Thing", tree_weights=ones)) == {"tree_weights": True}


def test_nothing_but_the_name_of_a_weight_norm() -> None:
    """`x_g` and `x_v` of one shape are two of several, not a magnitude and a direction."""
    twins = holder("Mixer", x_g=(1, 1, 8), x_v=(1, 1, 8))
    assert {str(verdict.role) for verdict in classify(twins).values()} == {"other"}
    assert str(classify(holder("Mixer", x_g=(8, 1), x_v=(8, 4)))["x_g"].role) == "scale"


def test_gnn_is_no_norm() -> None:
    """The letters of a nickname must not run on: `LN2d` is a layer norm, a `GNN` is not."""
    assert str(only(holder("GNN", weight=(4, 3))).role) == "weight"
    assert str(only(holder("LN2d", weight=(3,))).role) == "norm"


def test_a_function_is_named_last_too() -> None:
    """`a_unconstrained` and `mixture_logits` are inputs of a function, like `log_noise`."""
    names = (
        "a_unconstrained",
        "mixture_logits",
        "edge_log_probs",
        "D_log",
        "scale_tril",
        "cov_factor",
    )
    assert decayed(holder("Guide", **dict.fromkeys(names, (4, 3)))) == dict.fromkeys(names, False)


def test_reading_values_changes_nothing() -> None:
    """No version, no gradient, no random number; the values stay."""
    module = holder("Thing", weight=torch.ones(4, 64), u=torch.ones(4, 64), gate=(64,))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state, versions = torch.get_rng_state(), [p._version for p in module.parameters()]
    classify(module)
    assert all(torch.equal(before[n], tensor) for n, tensor in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert versions == [p._version for p in module.parameters()]
    assert not any(vars(p) for p in module.parameters())


def test_a_matrix_elsewhere_settles_a_vector() -> None:
    """The same name in another module of the class has two dimensions: both contract."""
    kind = type("Pool", (nn.Module,), {})
    modules = nn.ModuleList([kind(), kind()])
    modules[0].mystery = nn.Parameter(torch.randn(1, 8))
    assert decayed(modules) == {"0.mystery": False}
    modules[1].mystery = nn.Parameter(torch.randn(2, 8))
    assert decayed(modules) == {"0.mystery": True, "1.mystery": True}
    assert classify(modules)["0.mystery"].guess
    modules[0].mystery = nn.Parameter(torch.randn(8))  # the mean of a bias, perhaps
    assert decayed(modules) == {"0.mystery": False, "1.mystery": True}


def test_a_broadcast_of_unknown_use_is_exempt() -> None:
    """(1, n, d) leaves the batch open and is added or multiplied; (k, n, d) contracts."""
    assert decayed(holder("Thing", mystery=(1, 4, 8))) == {"mystery": False}
    assert decayed(holder("Thing", mystery=(3, 4, 8))) == {"mystery": True}


def test_weak_evidence_calls_itself_a_guess() -> None:
    """Shape, letters, values and weak names are guesses; a type is none."""
    for module in (
        holder("Thing", u=(4, 8)),
        holder("Thing", s=(4, 8)),
        holder("Thing", freqs=(4, 8)),
        holder("Thing", att=(8,)),
        holder("Thing", weight=torch.ones(4, 8)),
    ):
        assert only(module).guess
    assert not classify(nn.Linear(2, 2))["weight"].guess


def test_modules_without_a_hash() -> None:
    """A class with __eq__ and without __hash__ is planned like any other."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def __eq__(self, other: object) -> bool:
            return self is other

    model = Odd()
    with pytest.raises(TypeError, match="unhashable"):
        list(model.parameters())
    plan = wdhook.plan(model, 0.5)
    assert {name: d.weight_decay for name, d in plan.items()} == {"fc.weight": 0.5, "fc.bias": 0.0}
    assert [group["weight_decay"] for group in plan.param_groups()] == [0.5, 0.0]
    assert wdhook.plan(model, 0.5, overrides={"fc.weight": 0.0})["fc.weight"].weight_decay == 0.0


def test_a_module_that_contains_itself() -> None:
    """A cycle of modules ends the walk where torch ends it."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].parent = model
    assert list(classify(model)) == [name for name, _ in model.named_parameters()]
