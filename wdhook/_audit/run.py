"""What a model really does with each parameter: one traced forward pass, and a backward pass of random projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._base.errors import ArgumentError
from .._roles.classifier import Verdict, classified
from .._roles.marks import is_flattened
from .._roles.vocabulary import Role
from .autograd_graph import has_reentrant_checkpoint, nodes_of, opaque_uses
from .finding import Finding
from .invariance import SEED, Projections, Scale, scales, threshold
from .norm_eps import shrink
from .operations import DECAYED_USES, SILENT_USES, Use
from .report import Audit
from .copies import Copies
from .nested import tensors_in
from .sandbox import isolated
from .trace import Seen, Trace

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


def audit(model: nn.Module, /, *args: Any, **kwargs: Any) -> Audit:
    """Run `model` once on example inputs and once backward, and report what it does with each parameter.

    Nothing is changed: the pass runs on copies of parameters, buffers and other attributes, in the mode (train or
    eval) that the model is in, and random states are put back. Parameters that are zero throughout get small random
    values for it, since what they multiply would have no gradient.

    Args:
        model: any module whose parameters are whole and initialized. On the meta device only uses are told.
        *args: inputs of the model.
        **kwargs: inputs of the model by name.

    Returns:
        One `Finding` for each name that ``model.named_parameters()`` gives, in its order.

    Raises:
        ArgumentError: the model has lazy, sharded or scripted parameters, or is no module.

    >>> import torch, wdhook
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.PReLU())
    >>> audit = wdhook.audit(model, torch.randn(4, 3, 8, 8))
    >>> for name, finding in audit.items():
    ...     print(f"{name:9} {finding.use:12} {finding.invariant}")
    0.weight  contraction  True
    0.bias    addition     None
    1.weight  norm         False
    1.bias    norm         False
    2.weight  slope        False
    """
    _check(model)
    static = {name: (parameter, verdict) for name, parameter, verdict in classified(model)}
    run = _run(
        _inner(model), {name: parameter for name, (parameter, _) in static.items()}, args, kwargs
    )
    findings = {
        name: _finding(name, parameter, verdict, run.uses[name], run.scales.get(name, Scale()))
        for name, (parameter, verdict) in static.items()
    }
    return Audit(
        findings,
        dtype=run.dtype,
        threshold=run.threshold,
        eps_share=run.eps_share,
        training=model.training,
    )


# ---------------------------------------------------------------------------------------------- the passes


@dataclass(frozen=True)
class _Run:
    uses: Mapping[str, list[Seen]]
    scales: Mapping[str, Scale]
    dtype: str
    threshold: float | None
    eps_share: float


def _run(model: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> _Run:
    """The passes in the finest arithmetic that the model allows; what the last one raises is the user's to see."""
    *finer, last = _dtypes(parameters)
    for dtype in finer:
        with suppress(
            Exception
        ):  # a constant of another type, a kernel that is missing: whatever it is
            return _run_in(dtype, model, parameters, args, kwargs)
    return _run_in(last, model, parameters, args, kwargs)


def _dtypes(parameters: Mapping[str, Tensor]) -> list[torch.dtype | None]:
    """The arithmetic to try, in order; None is the model's own."""
    kinds = {parameter.device.type for parameter in parameters.values()}
    if "meta" in kinds:
        return [None]
    own = {parameter.dtype for parameter in parameters.values() if parameter.is_floating_point()}
    low = any(dtype.itemsize < 4 for dtype in own)
    return [*([] if "mps" in kinds else [torch.float64]), *([torch.float32] if low else []), None]


def _run_in(
    dtype: torch.dtype | None,
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    args: Any,
    kwargs: Any,
) -> _Run:
    copies = Copies(dtype)
    with isolated(model, copies):
        leaves = {name: copies.of(parameter) for name, parameter in parameters.items()}
        given = copies.of(args), copies.of(kwargs)
        types = {leaf.dtype for leaf in leaves.values() if leaf.is_floating_point()}
        epsilon = max((torch.finfo(kind).eps for kind in types), default=0.0)
        eps_were = (
            shrink(model.modules(), epsilon**0.5)
            if "meta" not in {x.device.type for x in leaves.values()}
            else {}
        )
        _wake(leaves)
        trace = Trace(leaves, tensors_in(given), keep_double=dtype is torch.float64)
        with trace:
            result = model(*given[0], **given[1])
        outputs = list(tensors_in(result))
        trace.returned(outputs)
        # Of an operator that the trace knows to be custom it also knows the name.
        uses = {name: trace.uses(name) for name in leaves}
        nodes = nodes_of(outputs)
        opaque = opaque_uses(nodes, leaves)
        uses |= {n: s for n, s in opaque.items() if Use.OPAQUE not in {one.use for one in uses[n]}}
        reached = [
            t
            for t in outputs
            if t.requires_grad and (t.is_floating_point() or t.is_complex()) and t.numel()
        ]
        name = str(dtype or ", ".join(sorted(map(str, types)))).replace("torch.", "")
        trainable = {
            key: leaf
            for key, leaf in leaves.items()
            if leaf.requires_grad and leaf.device.type != "meta"
        }
        if not reached or not trainable:
            return _Run(uses, {}, name, None, trace.eps.leak(eps_were))
        epsilon, leak = max(epsilon, trace.coarsest), trace.eps.leak()
        axes = {
            key: seen.axis
            for key, found in uses.items()
            for seen in found
            if seen.use in DECAYED_USES
        }
        projections = Projections(reached, trainable, reentrant=has_reentrant_checkpoint(nodes))
        found = scales(projections, trainable, axes, epsilon, leak)
        return _Run(uses, found, name, threshold(epsilon, leak), trace.eps.leak(eps_were))


def _wake(leaves: Mapping[str, Tensor]) -> None:
    """Small random values for parameters that are zero throughout: a last gain, LayerScale, LoRA's B, biases.

    Nothing flows back through a zero, and a network whose biases are all zero scales with weights that it does not
    scale with later. A tenth of the usual scale of initialization, 1/√(inputs of each output).
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    with torch.no_grad():
        for leaf in leaves.values():
            if (
                leaf.device.type == "meta"
                or not leaf.is_floating_point()
                or not leaf.numel()
                or leaf.any()
            ):
                continue
            inputs = leaf.numel() // leaf.shape[0] if leaf.dim() > 1 else 1
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            leaf.copy_((noise * 0.1 / inputs**0.5).to(leaf.dtype))


# ---------------------------------------------------------------------------------------------- the verdict


def _finding(
    name: str, parameter: Tensor, verdict: Verdict, seen: list[Seen], scale: Scale
) -> Finding:
    use = _main(seen)
    if use is Use.UNUSED and scale.sensitivity is not None:
        use = Use.OPAQUE  # it has a gradient: what used it was out of sight
    role, agrees = verdict.role, None
    decays = {one.use in DECAYED_USES for one in seen if one.use not in SILENT_USES}
    if (
        len(decays) == 1
        and not verdict.marked
        and (parameter.is_floating_point() or parameter.is_complex())
    ):
        role = _role(use, verdict.role, parameter)
        # No trace can tell positions that are looked up from words.
        agrees = decays == {verdict.decayed} or (use is Use.LOOKUP and role is Role.POSITION)
    return Finding(
        name=name,
        shape=tuple(parameter.shape),
        numel=parameter.numel(),
        use=use,
        operations=tuple(one.operation for one in seen),
        role=role,
        static_role=verdict.role,
        decayed=verdict.decayed,
        reason=verdict.reason,
        agrees=agrees,
        trainable=parameter.requires_grad,
        sensitivity=scale.sensitivity,
        invariant=scale.invariant,
        rows=scale.rows,
    )


def _main(seen: list[Seen]) -> Use:
    """The first use that says something."""
    speaking = [one.use for one in seen if one.use not in SILENT_USES]
    return speaking[0] if speaking else seen[0].use if seen else Use.UNUSED


def _role(use: Use, static: Role, parameter: Tensor) -> Role:
    allowed = _ROLES[use]
    if static in allowed:
        return static
    table = use is Use.ADDITION and sum(size != 1 for size in parameter.shape) > 1
    return Role.POSITION if table else allowed[0]


# ---------------------------------------------------------------------------------------------- what can be audited


def _inner(model: nn.Module) -> nn.Module:
    """The module inside wrappers that do something of their own in a forward pass: buckets, broadcasts, compilation."""
    wraps = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    inside = model._modules.get("module" if wraps else "_orig_mod")
    return model if inside is None else _inner(inside)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` must be a torch.nn.Module.\n  got: {type(model).__name__}")
    obstacle = next(_obstacles(model), None)
    if obstacle is not None:
        raise ArgumentError("`model` cannot be audited as it is.\n  {}: {}\n  {}".format(*obstacle))


def _obstacles(model: Any) -> Iterator[tuple[str, str, str]]:
    """(name, what it is, what to do) for what stands in the way."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield (
                path or "model",
                "a scripted module, whose parameters cannot be exchanged",
                "Audit it before torch.jit",
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            yield (
                name,
                "a lazy parameter",
                "Run the model once on example inputs, and audit it then",
            )
        if (
            hasattr(parameter, "to_local")
            or is_flattened(parameter)
            or hasattr(parameter, "ds_shape")
        ):
            yield (
                name,
                "a shard of a parameter",
                "Audit the model before it is sharded, and give wdhook.plan the audit",
            )
