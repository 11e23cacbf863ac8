"""The marks that people leave on modules and parameters, read and never written.

They are those of other projects, and `wdhook_role`, which a library can set without importing
wdhook. Two kinds of mark exist: *how much* (exempt, or a weight decay of its own) and *what for* (a
role). Each is kept with the words that a report prints as its reason.
"""

from __future__ import annotations

import bisect
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .._base.errors import ArgumentError
from .vocabulary import Role

WRAPPER_PREFIX = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What DDP, torch.compile, FSDP and activation checkpointing insert into parameter names."""

_EXEMPT_FLAGS = ("_no_weight_decay", "no_weight_decay", "skip_weight_decay")
_MODULE_ATTRIBUTES = ("no_weight_decay", "no_weight_decay_keywords")
_ROLES = tuple(role.value for role in Role)
_EMBEDDING_FLAGS = (
    "is_embedding_parameter",
    "shared_embedding",
    "is_embedding_or_output_parameter",
)
_OPTIONS = "_optim"  # S4: {"weight_decay": 0.0, "lr": ...}
_FLATTENED = "_is_flat_param"
_FLAGS = (*_EXEMPT_FLAGS, *_EMBEDDING_FLAGS, _OPTIONS, _FLATTENED)


def bare_name(name: str) -> str:
    """The parameter's name as it was before the model was wrapped."""
    return WRAPPER_PREFIX.sub("", name)


def is_plain(parameter: torch.Tensor) -> bool:
    """True for an unmarked `nn.Parameter`, as most are.

    The flags are asked for one by one: a look at its `__dict__` would make one, which stays.
    """
    if type(parameter) is not nn.Parameter:
        return False
    for flag in _FLAGS:  # noqa: SIM110 - twice as fast as a generator
        if hasattr(parameter, flag):
            return False
    return True


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether FSDP made the parameter of several: it is an `nn.Parameter` that says so."""
    return hasattr(parameter, _FLATTENED)


def parameter_mark(parameter: torch.Tensor) -> tuple[float, str] | None:
    """An explicit weight decay that somebody wrote on the parameter itself, with its reason."""
    options = getattr(parameter, _OPTIONS, None)
    if isinstance(options, Mapping) and options.get("weight_decay") is not None:
        return float(
            options["weight_decay"]
        ), f"marked _optim[weight_decay]={options['weight_decay']}"
    for flag in _EXEMPT_FLAGS:
        if _is_true(getattr(parameter, flag, None)):
            return 0.0, f"marked {flag}"
    return None


def embedding_mark(parameter: torch.Tensor) -> str | None:
    """The Megatron flag that calls this parameter an embedding, if there is one."""
    for flag in _EMBEDDING_FLAGS:
        if _is_true(getattr(parameter, flag, None)):
            return flag
    return None


def kinds_with(names: tuple[str, ...], modules: Iterable[nn.Module]) -> set[type[nn.Module]]:
    """The classes whose modules may have such an attribute without an entry in `__dict__`.

    Each class is asked once, because `nn.Module.__getattr__` is slow where there is nothing to
    find.
    """
    found = set()
    for kind in {type(module) for module in modules}:
        scripted = issubclass(kind, torch.jit.ScriptModule)
        if scripted or any(hasattr(kind, name) for name in names):
            found.add(kind)
    return found


def role_mark(module: nn.Module, local: str, container: str) -> Role | None:
    """The role that `module.wdhook_role` gives to a parameter of its own, if it speaks of it.

    It is a role, or a mapping from local names to roles; a parameter in a container goes by the
    container's name too. Set on a class, it holds for sub-classes; None takes it back.

    Raises:
        ArgumentError: it is something else, or names no role.
    """
    said = getattr(module, "wdhook_role", None)
    if said is None:
        return None
    if isinstance(said, Mapping):
        roles = {name: _role(role, module) for name, role in said.items()}
        return roles.get(local, roles.get(container))
    return _role(said, module)


def _role(said: Any, module: nn.Module) -> Role:
    if isinstance(said, str) and said in _ROLES:
        return Role(said)
    kind = type(module).__name__
    raise ArgumentError(
        f"`wdhook_role` names no role.\n  module: {kind}\n  got: {said!r}\n"
        f"  roles: {', '.join(_ROLES)}\n"
        f'  Give one of them, or one for each name: {kind}.wdhook_role = {{"weight": "norm"}}'
    )


def module_marks(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """Parameter name → reason, for every name that some module of the model exempts."""
    listing = kinds_with(_MODULE_ATTRIBUTES, modules.values())
    rules: list[_Exemption] = []
    for path, module in modules.items():
        own = not module.__dict__.keys().isdisjoint(_MODULE_ATTRIBUTES)
        if own or type(module) in listing:
            rules.extend(_exemptions(path, module))
    if not rules:
        return {}
    ordered = sorted((bare_name(name), name) for name in names)
    marks: dict[str, str] = {}
    for prefix, pattern, reason in rules:
        for bare, name in _below(ordered, prefix):
            if pattern.match(bare, len(prefix)):
                marks.setdefault(name, reason)
    return marks


def _below(ordered: list[tuple[str, str]], prefix: str) -> Iterator[tuple[str, str]]:
    """The run of sorted pairs that start with the prefix."""
    for position in range(bisect.bisect_left(ordered, (prefix,)), len(ordered)):
        if not ordered[position][0].startswith(prefix):
            return
        yield ordered[position]


class _Exemption(NamedTuple):
    """The names that one attribute of a module exempts."""

    prefix: str
    pattern: re.Pattern[str]  # of the name after the prefix
    reason: str


def _exemptions(path: str, module: nn.Module) -> Iterator[_Exemption]:
    """The exemptions that a module states."""
    prefix = bare_name(f"{path}.") if path else ""
    for attribute in _MODULE_ATTRIBUTES:
        said = _attribute(module, attribute)
        if said is None or said is False:
            continue
        if said is True:
            reason = f"{path or 'the model'} is marked {attribute}"
            yield _Exemption(prefix, re.compile(""), reason)
            continue
        where = f"{path}.{attribute}" if path else attribute
        if callable(said):
            said, where = said(), f"{where}()"
        listed = _strings(said)
        if listed:
            yield _Exemption(prefix, _pattern(listed, attribute), f"listed by {where}")


def _attribute(module: nn.Module, name: str) -> Any:
    """`getattr(module, name, None)`, without the slow failing path of `nn.Module.__getattr__`."""
    is_there = name in module.__dict__ or hasattr(type(module), name)
    if is_there or isinstance(module, torch.jit.ScriptModule):
        return getattr(module, name, None)
    return None


def _pattern(listed: list[str], attribute: str) -> re.Pattern[str]:
    """One expression for all entries: full names and globs, or substrings for the keywords."""
    if attribute == "no_weight_decay_keywords":
        return re.compile(f".*(?:{'|'.join(map(re.escape, listed))})")
    return re.compile("|".join(fnmatch.translate(bare_name(entry)) for entry in listed))


def _strings(listed: Any) -> list[str]:
    """The names in a list, set or dict; a lone string is one name."""
    if isinstance(listed, str):
        return [listed]
    if not isinstance(listed, Iterable):
        return []
    return sorted(str(entry) for entry in listed)


def _is_true(flag: Any) -> bool:
    """True for a set flag, False for a method of the same name (`module.no_weight_decay()`)."""
    return isinstance(flag, (bool, int)) and bool(flag)
