"""What a parameter is for: the pure classifier.

Evidence is asked in a fixed order, and the first that speaks decides: explicit marks, the type of the owner
module, the family that the type's name belongs to, the parameter's own name, the structure of its owner, and
only then its shape, counted in dimensions larger than one, because a (1, 1, C) scale is a vector.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .marks import (
    embedding_mark,
    is_flattened,
    is_plain,
    kinds_with,
    module_marks,
    parameter_mark,
    role_mark,
)
from .vocabulary import Family, Hint, Role, family_of, may_hold_weight, meaning_of

__all__ = ["DECAYED_ROLES", "Role", "Verdict", "classify"]

DECAYED_ROLES: frozenset[Role] = frozenset({Role.WEIGHT, Role.EMBEDDING})
"""The roles that are decayed unless somebody says otherwise."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WEIGHTS = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_SLOPES = (nn.PReLU,)
_PARAMETER_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_CONTAINERS = (*_PARAMETER_CONTAINERS, nn.ModuleList, nn.ModuleDict)


Shape: TypeAlias = "tuple[int, ...] | None"  # None: a lazy parameter does not know it yet


@dataclass(frozen=True, slots=True)
class Verdict:
    """The role of one parameter and the evidence for it."""

    role: Role
    reason: str
    guess: bool = False
    weight_decay: float | None = None
    """An explicit mark: 0.0 exempts, another float is a λ of its own; None follows the role."""

    @property
    def marked(self) -> bool:
        """Whether somebody said so on purpose, of the role or of the decay."""
        return self.weight_decay is not None or self.reason.startswith("marked ")

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies by default."""
        return (
            self.weight_decay > 0 if self.weight_decay is not None else self.role in DECAYED_ROLES
        )


def classify(model: nn.Module) -> dict[str, Verdict]:
    """The verdict on every parameter, under the names and in the order of `model.named_parameters()`.

    A parameter with several owners has one entry. It is exempt if any owner or mark says so, because a bias
    or a scale stays one when it is shared; an embedding that is also the output layer is decayed, once.
    """
    return {name: verdict for name, _, verdict in classified(model)}


def classified(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Verdict]]:
    """What `classify` says, with the parameter itself: (name, parameter, verdict)."""
    modules = dict(model.named_modules())
    listed = module_marks(modules, (name for name, *_ in _seats(modules)))
    reader = _Reader(modules)
    names: list[str] = []
    parameters: list[torch.Tensor] = []  # keeps alive what scripted modules hand out
    verdicts: dict[int, Verdict] = {}
    for name, path, local, parameter in _seats(modules):
        verdict = _marked(reader.read(path, local, parameter), parameter, listed.get(name))
        known = verdicts.get(id(parameter))
        if known is None:
            names.append(name)
            parameters.append(parameter)
        if known is None or (known.decayed and not verdict.decayed):
            verdicts[id(parameter)] = verdict
    if type(model).named_parameters is nn.Module.named_parameters:
        return zip(names, parameters, verdicts.values(), strict=True)
    return (
        (name, parameter, verdicts[id(parameter)]) for name, parameter in model.named_parameters()
    )


def _seats(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """(full name, owner's path, local name, parameter) for every place that holds a parameter."""
    for path, module in modules.items():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{local}" if path else local), path, local, parameter


def _marked(verdict: Verdict, parameter: torch.Tensor, listed: str | None) -> Verdict:
    """The verdict after the explicit marks, which outrank all other evidence."""
    if listed is None and is_plain(parameter) and parameter.is_floating_point():
        return verdict  # most parameters: the rest of this function is slow
    packed = _packed(parameter)
    if packed:
        return packed
    flag = embedding_mark(parameter)
    if flag and verdict.decayed:
        verdict = Verdict(Role.EMBEDDING, f"marked {flag}")
    mark = parameter_mark(parameter) or (listed and (0.0, listed))
    return replace(verdict, weight_decay=mark[0], reason=mark[1], guess=False) if mark else verdict


def _packed(parameter: torch.Tensor) -> Verdict | None:
    """The verdict on storage that is not one array of numbers to shrink."""
    if (
        not (parameter.is_floating_point() or parameter.is_complex())
        or type(parameter).__name__ == "Params4bit"
    ):
        return Verdict(
            Role.OTHER,
            f"packed as {str(parameter.dtype).removeprefix('torch.')}, cannot be decayed",
        )
    if is_flattened(parameter):
        return Verdict(
            Role.OTHER, "flattened by FSDP, holds several roles (use_orig_params=True)", guess=True
        )
    return None


def _shape(parameter: torch.Tensor) -> Shape:
    """The shape before anybody sharded it, or None while it is not known."""
    whole = getattr(
        parameter, "ds_shape", None
    )  # DeepSpeed ZeRO-3 leaves an empty 1-D tensor behind
    if whole is not None:
        return tuple(whole)
    return None if is_lazy(parameter) else parameter.shape


class _Reader:
    """Reads one model, and each kind of place in it once."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._known: dict[Hashable, Verdict | None] = {}
        self._with_role = kinds_with(("wdhook_role",), modules.values())

    def read(self, path: str, local: str, parameter: torch.Tensor) -> Verdict:
        """The verdict by type, name, structure and shape, in this order."""
        module, shape = self._modules[path], _shape(parameter)
        if isinstance(module, ParametrizationList):
            return self._parametrized(path, local, shape)
        if isinstance(module, _PARAMETER_CONTAINERS):
            return self._decide(*self._holder(path, local), shape)
        return self._decide(module, local, local, shape)

    def _holder(self, path: str, local: str) -> tuple[nn.Module, str, str]:
        """The module around a container, the entry named after it (`lora_A_default`), the container's name."""
        name = local
        while path and isinstance(self._modules[path], _CONTAINERS):
            path, _, name = path.rpartition(".")
            local = name if local.isdigit() else f"{name}_{local}"
        return self._modules[path], local, name

    def _parametrized(self, path: str, local: str, shape: Shape) -> Verdict:
        """`parametrizations.weight.original1` is the weight; the magnitude of a weight norm is a scale."""
        home, _, tensor = path.rpartition("parametrizations.")
        kinds = "".join(type(part).__name__ for part in self._modules[path].children()).lower()
        if local == "original0" and ("weightnorm" in kinds or _vectorlike(shape)):
            return Verdict(Role.SCALE, "magnitude of a weight norm")
        return self._decide(self._modules[home.removesuffix(".")], tensor, tensor, shape)

    def _decide(self, owner: nn.Module, local: str, container: str, shape: Shape) -> Verdict:
        if type(owner) in self._with_role or "wdhook_role" in owner.__dict__:
            marked = role_mark(owner, local, container)
            if marked is not None:
                return Verdict(marked, f"marked wdhook_role in {_class_name(owner)}")
        scripted = _class_name(owner) if isinstance(owner, torch.jit.ScriptModule) else None
        children = tuple(map(type, owner._modules.values())) if len(owner._modules) else None
        place = (type(owner), scripted, local, shape, tuple(owner._parameters.keys()), children)
        try:
            known = self._known[place]
        except KeyError:
            known = self._known[place] = (
                _by_reparametrization(owner, local)
                or _by_torch_type(owner, local)
                or _by_family(owner, local, shape)
                or _by_name(local, shape)
            )
        return known or _by_structure(owner) or _by_shape(shape)


def _family(owner: nn.Module, kind: str) -> Family | None:
    """The family of the first class that names one, from the owner's own class upwards."""
    bases = [
        base.__name__ for base in type(owner).__mro__ if not base.__module__.startswith("torch.")
    ]
    return next((family for family in map(family_of, [kind, *bases]) if family), None)


def _class_name(owner: nn.Module) -> str:
    """The name of the class as it was written: a scripted module keeps it aside, FSDP2 inherits from it."""
    if isinstance(owner, torch.jit.ScriptModule):
        return str(owner.original_name)
    names = [base.__name__ for base in type(owner).__mro__]
    written = names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]
    return written.removeprefix("Parametrized")


def _vectorlike(shape: Shape) -> bool:
    return shape is not None and sum(size != 1 for size in shape) <= 1


def _by_reparametrization(owner: nn.Module, local: str) -> Verdict | None:
    """Old-style `weight_norm` splits `weight` into `weight_g` and `weight_v`."""
    if local.endswith("_g") and f"{local[:-2]}_v" in owner._parameters:
        return Verdict(Role.SCALE, "magnitude of a weight norm")
    return None


_WEIGHT_NAME = (
    r"(?:weight(?:_[ih]h|_hr)?|(?:in|q|k|v)_proj_weight)(?:_l\d+)?(?:_reverse)?(?:_orig|_raw|_v)?"
)
_BIAS_NAME = r"(?:bias(?:_[ih]h|_k|_v)?|in_proj_bias)(?:_l\d+)?(?:_reverse)?(?:_orig|_raw)?"


def _by_torch_type(owner: nn.Module, local: str) -> Verdict | None:
    """What torch's own classes and their subclasses say of `weight` and `bias`; never a matter of shape."""
    if re.fullmatch(_BIAS_NAME, local):
        role, bases = Role.BIAS, _WEIGHTS
    elif re.fullmatch(_WEIGHT_NAME, local):
        role, bases = Role.WEIGHT, _WEIGHTS
    else:
        return None
    for kind, own_role in (
        (bases, role),
        (_NORMS, Role.NORM),
        (_EMBEDDINGS, Role.EMBEDDING),
        (_SLOPES, Role.SCALE),
    ):
        if isinstance(owner, kind):
            return Verdict(own_role, _owner_is(owner, kind))
    return None


def _owner_is(owner: nn.Module, bases: tuple[type[nn.Module], ...]) -> str:
    """'owner is nn.Linear', or 'owner is Router, a nn.Linear' for a subclass."""
    public = [base for base in type(owner).__mro__ if getattr(nn, base.__name__, None) is base]
    name = f"nn.{next((base for base in public if issubclass(base, bases)), bases[0]).__name__}"
    own = _class_name(owner)
    return f"owner is {name}" if name == f"nn.{own}" else f"owner is {own}, a {name}"


_POSITION_TABLE = r"pos|token|quer|latent|prompt|cls"
_PLAIN_WEIGHT = r"weight(?:_orig|_v)?|w\d*"


def _by_family(owner: nn.Module, local: str, shape: Shape) -> Verdict | None:
    """What the name of the owner's class promises."""
    kind = _class_name(owner)
    family, reason = _family(owner, kind), f"owner is called {kind}"
    plain = re.fullmatch(_PLAIN_WEIGHT, local) is not None
    if family is Family.NORM:
        all_of_it = not may_hold_weight(kind) and not _has_weighted_children(owner)
        return Verdict(Role.NORM, reason) if all_of_it or _vectorlike(shape) else None
    if family is Family.SCALE and _vectorlike(shape):
        return Verdict(Role.SCALE, reason)
    if family is Family.EMBEDDING and (plain or _is_the_table(owner, local, shape)):
        return Verdict(Role.EMBEDDING, reason)
    if family is Family.WEIGHT and plain:
        return Verdict(Role.WEIGHT, reason)
    return None


def _is_the_table(owner: nn.Module, local: str, shape: Shape) -> bool:
    """The only parameter of an embedding class is what it looks up: a true matrix, not called a position."""
    if len(list(owner.parameters())) != 1 or re.search(_POSITION_TABLE, local):
        return False
    return len(shape or ()) == 2 and not _vectorlike(shape)


def _by_name(local: str, shape: Shape) -> Verdict | None:
    """What the local name says."""
    meaning, reason = meaning_of(local), f"named {local!r}"
    if meaning is None or meaning is Hint.SHAPE:
        return None
    if meaning is Hint.FIRM_WEIGHT:
        return Verdict(Role.WEIGHT, reason)
    if meaning is Hint.MATRIX:
        return _weight_or_scale(reason, shape)
    if meaning is Role.EMBEDDING and _vectorlike(shape):
        return Verdict(Role.POSITION, f"{reason}, a vector")
    return Verdict(Role(meaning), reason)


def _weight_or_scale(reason: str, shape: Shape) -> Verdict:
    """A `weight` or a `gate` multiplies: as a matrix it contracts, as a vector it scales."""
    if not _vectorlike(shape):
        return Verdict(Role.WEIGHT, reason)
    if shape and len(shape) > 1 and shape[-1] == 1 and shape[0] != 1:
        return Verdict(Role.WEIGHT, f"{reason}, a column", guess=True)
    return Verdict(Role.SCALE, f"{reason}, a vector", guess=True)


_EPSILONS = frozenset({"eps", "epsilon", "variance_epsilon", "norm_eps"})


def _by_structure(owner: nn.Module) -> Verdict | None:
    """A module with an `eps`, only vectors and no weighted children normalizes, whatever its name."""
    if _EPSILONS.isdisjoint(owner.__dict__):
        return None
    own = [parameter for parameter in owner._parameters.values() if parameter is not None]
    if _has_weighted_children(owner) or not all(
        _vectorlike(_shape(parameter)) for parameter in own
    ):
        return None
    return Verdict(Role.NORM, "owner has an eps and only vectors", guess=True)


def _has_weighted_children(owner: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in owner.children())


def _by_shape(shape: Shape) -> Verdict:
    """The last resort."""
    if shape is None:
        return Verdict(Role.WEIGHT, "shape not known yet, owner unknown", guess=True)
    dims = sum(size != 1 for size in shape)
    return Verdict(Role.OTHER if dims <= 1 else Role.WEIGHT, f"{dims}-D, owner unknown", guess=True)
