"""Decides the role of each parameter of a model, without running or changing it.

Evidence is asked in a fixed order, and the first that speaks decides: explicit marks, the type of
the owner module, the family of the owner's class name, the local name of the parameter, the
structure of the owner, and last the shape, together with the first values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .evidence import Shape, is_vectorlike, shape_of
from .layers import Case, Rule, by_family, by_name, by_shape, by_siblings, by_structure
from .marks import (
    embedding_mark,
    is_flattened,
    is_plain,
    kinds_with,
    module_marks,
    parameter_mark,
    role_mark,
)
from .places import places, walk
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
    aliases: tuple[str, ...] = ()
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
    unique = {path: module for path, module, repeated in visits if not repeated}
    names = (place.name for place in places(visits) if not place.repeated)
    listed = module_marks(unique, names)
    reader = _Reader({path: module for path, module, _ in visits})
    found = _read_places(reader, visits, listed)
    if reader.compare_kinds():
        found = _read_places(reader, visits, listed)
    if type(model).named_parameters is nn.Module.named_parameters:
        return list(found.values())
    return _under_own_names(model, found)


def _read_places(
    reader: _Reader, visits: list[tuple[str, nn.Module, bool]], listed: dict[str, str]
) -> dict[int, Classified]:
    """The verdict on each parameter, by its identity; of several places the strictest wins."""
    found: dict[int, Classified] = {}
    for path, module, _ in visits:
        if not len(module._parameters):
            continue
        seat = reader.seat(path, module)
        prefix = f"{path}." if path else ""
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = prefix + local
            verdict = _marked(reader.read(seat, local, parameter), parameter, listed.get(name))
            known = found.get(id(parameter))
            if known is None:
                found[id(parameter)] = Classified(name, parameter, verdict)
                continue
            known.aliases += (name,)
            if known.verdict.decayed and not verdict.decayed:
                known.verdict = verdict
    return found


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


class _Seat(NamedTuple):
    """A module that holds parameters."""

    path: str
    module: nn.Module
    kind: int


class _Reader:
    """Reads the modules of one model, and each kind of parameter once."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._owners: dict[tuple[Any, ...], int] = {}
        self._known: dict[tuple[int, str, Shape], Verdict] = {}
        self._with_role = kinds_with(("wdhook_role",), modules.values())

    def seat(self, path: str, module: nn.Module) -> _Seat:
        """The module with a number for its kind: its class, its parameters and its children."""
        children = None
        if len(module._modules):
            children = tuple(map(type, module._modules.values()))
        scripted = class_name(module) if isinstance(module, torch.jit.ScriptModule) else None
        kind = type(module), scripted, tuple(module._parameters.keys()), children
        return _Seat(path, module, self._owners.setdefault(kind, len(self._owners)))

    def read(self, seat: _Seat, local: str, parameter: torch.Tensor) -> Verdict:
        """Decide by type, names, structure and shape, in this order."""
        if isinstance(seat.module, ParametrizationList):
            return self._parametrized(seat, local, parameter)
        if isinstance(seat.module, _PARAMETER_CONTAINERS):
            return self._contained(seat, local, parameter)
        return self._decide(seat, local, local, parameter)

    def _contained(self, seat: _Seat, local: str, parameter: torch.Tensor) -> Verdict:
        """Name an entry of a container after it (`lora_A_default`), and ask the module around."""
        path, name = seat.path, local
        while path and isinstance(self._modules[path], _CONTAINERS):
            path, _, name = path.rpartition(".")
            local = name if local.isdigit() else f"{name}_{local}"
        owner = self.seat(path, self._modules[path])
        return self._decide(owner, local, name, parameter)

    def _parametrized(self, seat: _Seat, local: str, parameter: torch.Tensor) -> Verdict:
        """`parametrizations.weight.original1` is the weight; a magnitude is a scale."""
        home, _, tensor = seat.path.rpartition("parametrizations.")
        kinds = "".join(type(part).__name__ for part in seat.module.children()).lower()
        is_magnitude = "weightnorm" in kinds or is_vectorlike(shape_of(parameter))
        if local == "original0" and is_magnitude:
            return Verdict(Role.SCALE, "magnitude of a weight norm")
        path = home.removesuffix(".")
        return self._decide(self.seat(path, self._modules[path]), tensor, tensor, parameter)

    def _decide(self, seat: _Seat, local: str, container: str, parameter: torch.Tensor) -> Verdict:
        owner = seat.module
        if type(owner) in self._with_role or "wdhook_role" in owner.__dict__:
            marked = role_mark(owner, local, container)
            if marked is not None:
                return Verdict(marked, f"marked wdhook_role in {class_name(owner)}")
        shape = shape_of(parameter)
        kind = seat.kind, local, shape
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = _read(owner, local, parameter, shape)
        if known.guess and known.role is Role.OTHER:
            return by_structure(owner) or known
        return known

    def compare_kinds(self) -> bool:
        """Settle guesses on vectors by matrices of the same name in modules of the same class.

        An attention with one head has a vector where its neighbours with more heads have a
        matrix of as many dimensions; both contract.

        Returns:
            True where a guess was settled: reading again gives the new verdicts.
        """
        classes = {number: kind[0] for kind, number in self._owners.items()}
        open_kinds, matrices = [], set()
        for kind, verdict in self._known.items():
            owner, local, shape = kind
            if not is_vectorlike(shape):
                if verdict.decayed:
                    matrices.add((classes[owner], local, len(shape or ())))
            elif verdict.guess and not verdict.decayed:
                open_kinds.append(kind)
        settled = []
        for kind in open_kinds:
            owner, local, shape = kind
            if (classes[owner], local, len(shape or ())) in matrices:
                settled.append(kind)
        for kind in settled:
            reason = f"named {kind[1]!r}, a matrix in another {classes[kind[0]].__name__}"
            self._known[kind] = Verdict(Role.WEIGHT, reason, guess=True)
        return bool(settled)


_RULES: tuple[Rule, ...] = (by_siblings, by_family, by_name, by_shape)


def _read(owner: nn.Module, local: str, parameter: torch.Tensor, shape: Shape) -> Verdict:
    """The first verdict; the last rule has one for every case."""
    found = by_reparametrization(owner, local) or by_torch_type(owner, local)
    case = Case(owner, local, parameter, shape)
    for rule in _RULES:
        found = found or rule(case)
    assert found is not None
    return found
