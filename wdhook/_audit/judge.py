"""Judges one parameter: its uses and its scale, against the role that types and names give it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._roles.classifier import Verdict
from .._roles.vocabulary import Role
from .carried import Seen
from .finding import Finding
from .invariance import Scale
from .operations import DECAYED_USES, SILENT_USES, Use

# The roles that a use may have; the first is meant where the static one is none of them.
_ROLES: dict[Use, tuple[Role, ...]] = {
    Use.CONTRACTION: (Role.WEIGHT, Role.EMBEDDING),
    Use.LOOKUP: (Role.EMBEDDING, Role.POSITION),
    Use.NORM: (Role.NORM,),
    Use.MULTIPLICATION: (Role.SCALE, Role.NORM, Role.OTHER, Role.POSITION),
    Use.ADDITION: (Role.BIAS, Role.NORM, Role.POSITION, Role.OTHER),
    Use.TOKEN: (Role.POSITION, Role.BIAS, Role.OTHER),
    Use.SLOPE: (Role.SCALE,),
    Use.CONSTANT: (Role.OTHER, Role.SCALE),
}


def finding(
    name: str, parameter: Tensor, static: Verdict, seen: Sequence[Seen], scale: Scale
) -> Finding:
    """Join what was seen of one parameter into a finding."""
    speaking = [one for one in seen if one.use not in SILENT_USES]
    use = _main_use(seen, speaking, scale)
    agrees = None
    if not static.marked and (parameter.is_floating_point() or parameter.is_complex()):
        agrees = _agrees(speaking, static, parameter)
    role = static.role if agrees is None else _role(use, static.role, parameter)
    return Finding(
        name=name,
        shape=tuple(parameter.shape),
        numel=parameter.numel(),
        use=use,
        operations=tuple(one.operation for one in seen),
        role=role,
        static_role=static.role,
        decayed=static.decayed,
        reason=static.reason,
        agrees=agrees,
        trainable=parameter.requires_grad,
        sensitivity=scale.sensitivity,
        invariant=scale.invariant,
        rows=scale.rows,
        doubt=scale.doubt,
    )


def _main_use(seen: Sequence[Seen], speaking: Sequence[Seen], scale: Scale) -> Use:
    """Return the first use that says something about a role."""
    if speaking:
        return speaking[0].use
    if seen:
        return seen[0].use
    # A parameter with a gradient was used out of sight.
    return Use.UNUSED if scale.sensitivity is None else Use.OPAQUE


def _agrees(speaking: Sequence[Seen], static: Verdict, parameter: Tensor) -> bool | None:
    """Tell whether the uses agree with the plan; None where they do not decide."""
    decays = {one.use in DECAYED_USES for one in speaking}
    if len(decays) != 1:
        return None
    if decays == {static.decayed}:
        return True
    use = speaking[0].use
    if use is Use.LOOKUP and _role(use, static.role, parameter) is Role.POSITION:
        return True  # no trace can tell positions that are looked up from words
    # A plan is only overturned by operations that have one meaning, unless it is a guess itself.
    return False if static.guess or any(one.firm for one in speaking) else None


def _role(use: Use, static: Role, parameter: Tensor) -> Role:
    allowed = _ROLES[use]
    if static in allowed:
        return static
    table = use is Use.ADDITION and sum(size != 1 for size in parameter.shape) > 1
    return Role.POSITION if table else allowed[0]
