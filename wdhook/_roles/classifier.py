"""Decides the role of each parameter of a model, without running or changing it.

Evidence is asked in a fixed order, and the first that speaks decides: explicit marks, the type of
the owner module, the family of the owner's class name, the local name of the parameter, the
structure of the owner, and last the shape, together with the first values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .evidence import Shape, is_vectorlike, shape_of
from .layers import by_family, by_name, by_shape, by_siblings, by_structure
from .marks import (
    embedding_mark,
    is_flattened,
    is_plain,
    kinds_with,
    module_marks,
    parameter_mark,
    role_mark,
)
from .places import Place, places, walk
from .torch_types import by_reparametrization, by_torch_type, class_name
from .verdict import DECAYED_ROLES, Verdict
from .vocabulary import Role

__all__ = ["DECAYED_ROLES", "Classified", "Role", "Verdict", "classify", "classify_model"]

_PARAMETER_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_CONTAINERS = (*_PARAMETER_CONTAINERS, nn.ModuleList, nn.ModuleDict)


@dataclass(slots=True)
class Classified:
    """One parameter of a model, with its verdict and its names."""

    name: str
    parameter: torch.Tensor
    verdict: Verdict
    aliases: list[str] = field(default_factory=list)
    """Further names of a tied parameter."""


def classify(model: nn.Module) -> dict[str, Verdict]:
    """Decide the role of every parameter, by name, in the order of `model.named_parameters()`.

    A parameter with several owners has one entry. It is exempt if any owner or mark says so,
    because a bias or a scale stays one when it is shared; an embedding that is also the output
    layer is decayed, once.
    """
    return {found.name: found.verdict for found in classify_model(model)}


def classified(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Verdict]]:
    """Yield (name, parameter, verdict), see `classify`."""
    for found in classify_model(model):
        yield found.name, found.parameter, found.verdict


def classify_model(model: nn.Module) -> list[Classified]:
    """Decide the role of every parameter, see `classify`, and list the names of each."""
    visits = walk(model)
    every_place = list(places(visits))
    unique = {path: module for path, module, repeated in visits if not repeated}
    listed = module_marks(unique, (place.name for place in every_place if not place.repeated))
    reader = _Reader({path: module for path, module, _ in visits})
    found: dict[int, Classified] = {}
    read = [reader.read(place) for place in every_place]
    reader.compare_kinds()
    for place, first_verdict in zip(every_place, read, strict=True):
        verdict = reader.settled(first_verdict)
        verdict = _marked(verdict, place.parameter, listed.get(place.name))
        known = found.get(id(place.parameter))
        if known is None:
            found[id(place.parameter)] = Classified(place.name, place.parameter, verdict)
            continue
        known.aliases.append(place.name)
        if known.verdict.decayed and not verdict.decayed:
            known.verdict = verdict
    if type(model).named_parameters is nn.Module.named_parameters:
        return list(found.values())
    return _under_own_names(model, found)


def _under_own_names(model: nn.Module, found: dict[int, Classified]) -> list[Classified]:
    """Rename to the names that the model itself gives, as FSDP does."""
    renamed = []
    for name, parameter in model.named_parameters():
        known = found[id(parameter)]
        renamed.append(Classified(name, parameter, known.verdict, known.aliases))
    return renamed


# ------------------------------------------------------------------------------------------- marks


def _marked(verdict: Verdict, parameter: torch.Tensor, listed: str | None) -> Verdict:
    """Apply the explicit marks, which outrank all other evidence."""
    if listed is None and is_plain(parameter) and parameter.is_floating_point():
        return verdict  # most parameters: the rest of this function is slow
    packed = _packed(parameter)
    if packed is not None:
        return packed
    flag = embedding_mark(parameter)
    if flag and verdict.decayed:
        verdict = Verdict(Role.EMBEDDING, f"marked {flag}")
    mark = parameter_mark(parameter)
    if mark is None and listed is not None:
        mark = 0.0, listed
    if mark is None:
        return verdict
    return replace(verdict, weight_decay=mark[0], reason=mark[1], guess=False)


def _packed(parameter: torch.Tensor) -> Verdict | None:
    """Find storage that is not one array of numbers to shrink."""
    is_number = parameter.is_floating_point() or parameter.is_complex()
    if not is_number or type(parameter).__name__ == "Params4bit":
        kind = str(parameter.dtype).removeprefix("torch.")
        return Verdict(Role.OTHER, f"packed as {kind}, cannot be decayed")
    if is_flattened(parameter):
        reason = "flattened by FSDP, holds several roles (use_orig_params=True)"
        return Verdict(Role.OTHER, reason, guess=True)
    return None


# ---------------------------------------------------------------------------------- other evidence


class _Reader:
    """Reads the places of one model, and each kind of place once."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._known: dict[_Kind, Verdict] = {}
        self._settled: dict[int, Verdict] = {}  # by the identity of a verdict in `_known`
        self._with_role = kinds_with(("wdhook_role",), modules.values())

    def read(self, place: Place) -> Verdict:
        """Decide by type, names, structure and shape, in this order."""
        module = self._modules[place.path]
        if isinstance(module, ParametrizationList):
            return self._parametrized(place)
        local = container = place.local
        if isinstance(module, _PARAMETER_CONTAINERS):
            module, local, container = self._holder(place)
        return self._decide(module, local, container, place.parameter)

    def _holder(self, place: Place) -> tuple[nn.Module, str, str]:
        """The module around a container, the entry's name (`lora_A_default`), the container's."""
        path, local = place.path, place.local
        name = local
        while path and isinstance(self._modules[path], _CONTAINERS):
            path, _, name = path.rpartition(".")
            local = name if local.isdigit() else f"{name}_{local}"
        return self._modules[path], local, name

    def _parametrized(self, place: Place) -> Verdict:
        """`parametrizations.weight.original1` is the weight; a magnitude is a scale."""
        home, _, tensor = place.path.rpartition("parametrizations.")
        parts = self._modules[place.path].children()
        kinds = "".join(type(part).__name__ for part in parts).lower()
        is_magnitude = "weightnorm" in kinds or is_vectorlike(shape_of(place.parameter))
        if place.local == "original0" and is_magnitude:
            return Verdict(Role.SCALE, "magnitude of a weight norm")
        owner = self._modules[home.removesuffix(".")]
        return self._decide(owner, tensor, tensor, place.parameter)

    def _decide(
        self, owner: nn.Module, local: str, container: str, parameter: torch.Tensor
    ) -> Verdict:
        if type(owner) in self._with_role or "wdhook_role" in owner.__dict__:
            marked = role_mark(owner, local, container)
            if marked is not None:
                return Verdict(marked, f"marked wdhook_role in {class_name(owner)}")
        kind = _kind(owner, local, shape_of(parameter))
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = _read(owner, local, parameter, kind.shape)
        if known.role is Role.OTHER and known.guess:
            return by_structure(owner) or known
        return known

    def compare_kinds(self) -> None:
        """Settle guesses on vectors by matrices of the same name in modules of the same class.

        An attention with one head has a vector where its neighbours with more heads have a
        matrix; both contract.
        """
        if not any(verdict.guess for verdict in self._known.values()):
            return
        matrices = set()
        for kind, verdict in self._known.items():
            if verdict.decayed and not is_vectorlike(kind.shape):
                matrices.add((kind.owner, kind.local))
        for kind, verdict in self._known.items():
            if not verdict.guess or verdict.decayed or not is_vectorlike(kind.shape):
                continue
            if (kind.owner, kind.local) in matrices:
                reason = f"a matrix elsewhere in a {kind.owner.__name__}"
                self._settled[id(verdict)] = Verdict(Role.WEIGHT, reason, guess=True)

    def settled(self, verdict: Verdict) -> Verdict:
        """The verdict after `compare_kinds`."""
        return self._settled.get(id(verdict), verdict)


class _Kind(NamedTuple):
    """Everything that the verdict on a place depends on, but marks and structure."""

    owner: type[nn.Module]
    scripted: str | None
    local: str
    shape: Shape
    siblings: tuple[str, ...]
    children: tuple[type, ...] | None


def _kind(owner: nn.Module, local: str, shape: Shape) -> _Kind:
    scripted = class_name(owner) if isinstance(owner, torch.jit.ScriptModule) else None
    children = None
    if len(owner._modules):
        children = tuple(map(type, owner._modules.values()))
    return _Kind(type(owner), scripted, local, shape, tuple(owner._parameters.keys()), children)


def _read(owner: nn.Module, local: str, parameter: torch.Tensor, shape: Shape) -> Verdict:
    return (
        by_reparametrization(owner, local)
        or by_torch_type(owner, local)
        or by_siblings(owner, local, shape)
        or by_family(owner, local, parameter, shape)
        or by_name(owner, local, parameter, shape)
        or by_shape(parameter, shape)
    )
