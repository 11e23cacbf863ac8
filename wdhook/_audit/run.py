"""Audits a model: one traced forward pass, and backward passes of random projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._base.errors import ArgumentError
from .._roles.classifier import classified
from .._roles.marks import is_flattened
from .autograd_graph import behind_custom, has_reentrant_checkpoint, nodes_of, opaque_uses
from .carried import Seen
from .consistency import Checked, checked
from .copies import Copies
from .invariance import NO_GRADIENT, NOT_MEASURED, Scale, scales, threshold
from .judge import finding
from .nested import tensors_in
from .norm_eps import shrink
from .operations import DECAYED_USES, Use
from .projections import SEED, Projections
from .report import Audit
from .sandbox import collector_paused, isolated
from .trace import Trace


def audit(model: nn.Module, /, *args: Any, **kwargs: Any) -> Audit:
    """Run `model` on example inputs, forward and backward, and report the use of each parameter.

    Nothing is changed: the pass runs on copies of parameters, buffers and whatever else modules
    hold, in the mode (train or eval) that the model is in, and random states are put back.
    Parameters that are zero throughout get small random values for it, since what they multiply
    would have no gradient.

    Args:
        model: any module whose parameters are whole and initialized. On the meta device only
            uses are told.
        *args: inputs of the model.
        **kwargs: inputs of the model by name.

    Returns:
        One `Finding` for each name that ``model.named_parameters()`` gives, in its order.

    Warns:
        WdhookWarning: the forward pass has advanced a generator that the model holds.

    Raises:
        ArgumentError: the model has lazy, sharded or scripted parameters, or is no module.

    >>> import torch, wdhook
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.PReLU()
    ... )
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
    with collector_paused():
        return _audit(model, args, kwargs)


def _audit(model: nn.Module, args: Any, kwargs: Any) -> Audit:
    static = {name: (parameter, verdict) for name, parameter, verdict in classified(model)}
    parameters = {name: parameter for name, (parameter, _) in static.items()}
    run = _run(_inner(model), parameters, args, kwargs)
    nothing = Scale(doubt=NOT_MEASURED if run.threshold is None else NO_GRADIENT)
    findings = {
        name: finding(name, parameter, verdict, run.uses[name], run.scales.get(name, nothing))
        for name, (parameter, verdict) in static.items()
    }
    return Audit(
        findings,
        dtype=run.dtype,
        threshold=run.threshold,
        eps_share=run.eps_share,
        training=model.training,
        stopped=run.stopped,
    )


# ------------------------------------------------------------------------------- the passes


@dataclass(frozen=True)
class _Run:
    """The results of the passes in one arithmetic."""

    uses: Mapping[str, list[Seen]]
    dtype: str
    eps_share: float
    threshold: float | None = None
    scales: Mapping[str, Scale] = field(default_factory=dict)
    stopped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Call:
    """A model with its inputs, to be run on copies in one arithmetic."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    args: Any
    kwargs: Any
    dtype: torch.dtype | None

    def forward(self, factors: Mapping[str, float]) -> list[Tensor]:
        """Run the model again, with some parameters multiplied by a factor each."""
        copies = Copies(self.dtype)
        with isolated(self.model, copies):
            traced = _traced(self, copies, factors)
        return [output.detach() for output in _differentiable(traced.outputs)]


@dataclass(frozen=True)
class _Traced:
    """One forward pass on copies."""

    leaves: Mapping[str, Tensor]
    trace: Trace
    outputs: list[Tensor]
    epsilon: float


def _run(model: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> _Run:
    """Run the passes in the finest arithmetic that the model allows."""
    *finer, last = _dtypes(parameters)
    for dtype in finer:
        # A constant of another type, a kernel that is missing: any error is a reason to go on.
        with suppress(Exception):
            return _run_in(_Call(model, parameters, args, kwargs, dtype))
    return _run_in(_Call(model, parameters, args, kwargs, last))


def _dtypes(parameters: Mapping[str, Tensor]) -> list[torch.dtype | None]:
    """Return the arithmetic to try, in order; None is the model's own."""
    kinds = {parameter.device.type for parameter in parameters.values()}
    if "meta" in kinds:
        return [None]
    own = {parameter.dtype for parameter in parameters.values() if parameter.is_floating_point()}
    tried: list[torch.dtype | None] = [] if "mps" in kinds else [torch.float64]
    if any(dtype.itemsize < 4 for dtype in own):
        tried.append(torch.float32)
    return [*tried, None]


def _run_in(call: _Call) -> _Run:
    copies = Copies(call.dtype)
    with isolated(call.model, copies):
        traced = _traced(call, copies, {})
        nodes = nodes_of(traced.outputs)
        uses = _uses(traced, nodes)
        measured = _measure(traced, uses, nodes)
    dtype = _dtype_name(call.dtype, traced.leaves)
    share = traced.trace.eps.leak(of_model=True)
    if measured is None:
        return _Run(uses, dtype, share)
    result = _compare(call, traced, measured, nodes)
    return _Run(uses, dtype, share, measured.threshold, result.scales, result.stopped)


def _traced(call: _Call, copies: Copies, factors: Mapping[str, float]) -> _Traced:
    """Run the forward pass on the copies, inside of `isolated`."""
    leaves = {name: copies.of(parameter) for name, parameter in call.parameters.items()}
    given = copies.of(call.args), copies.of(call.kwargs)
    epsilon = max((torch.finfo(kind).eps for kind in _types(leaves)), default=0.0)
    former = {} if _on_meta(leaves) else shrink(call.model.modules(), epsilon**0.5)
    _wake(leaves)
    with torch.no_grad():
        for name, factor in factors.items():
            leaves[name].mul_(factor)
    trace = Trace(leaves, tensors_in(given), former, keep_double=call.dtype is torch.float64)
    with trace:
        result = call.model(*given[0], **given[1])
    outputs = list(tensors_in(result))
    trace.returned(outputs)
    return _Traced(leaves, trace, outputs, epsilon)


def _uses(traced: _Traced, nodes: Sequence[Any]) -> dict[str, list[Seen]]:
    uses = {name: traced.trace.uses(name) for name in traced.leaves}
    for name, opaque in opaque_uses(nodes, traced.leaves).items():
        # Of an operator that the trace knows to be custom it also knows the name.
        if all(seen.use is not Use.OPAQUE for seen in uses[name]):
            uses[name] = opaque
    return uses


@dataclass(frozen=True)
class _Measured:
    """The evidence of the backward passes."""

    projections: Projections
    scales: Mapping[str, Scale]
    threshold: float
    epsilon: float


def _measure(
    traced: _Traced, uses: Mapping[str, list[Seen]], nodes: Sequence[Any]
) -> _Measured | None:
    """Measure the scale of each trainable parameter; None without outputs or values."""
    outputs = _differentiable(traced.outputs)
    trainable = {name: leaf for name, leaf in traced.leaves.items() if leaf.requires_grad}
    if not outputs or not trainable or _on_meta(trainable):
        return None
    epsilon = max(traced.epsilon, traced.trace.coarsest)
    leak = traced.trace.eps.leak()
    axes: dict[str, int] = {}
    for name, found in uses.items():
        for seen in found:
            if seen.use in DECAYED_USES:
                axes[name] = seen.axis
    projections = Projections(outputs, trainable, reentrant=has_reentrant_checkpoint(nodes))
    measured = scales(projections, trainable, axes, epsilon, leak)
    limit = threshold(epsilon, leak)
    return _Measured(projections, measured, limit, epsilon)


def _compare(call: _Call, traced: _Traced, measured: _Measured, nodes: Sequence[Any]) -> Checked:
    """Compare gradients with the function, where something may set them apart."""
    outputs = _differentiable(traced.outputs)
    suspects = traced.trace.stopped(outputs) | behind_custom(nodes, traced.leaves)
    ordered = [name for name in measured.scales if name in suspects]
    values = [output.detach() for output in outputs]
    return checked(
        measured.scales, ordered, measured.projections, values, call.forward, measured.epsilon
    )


def _differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs that a gradient can start from."""
    found = []
    for output in outputs:
        continuous = output.is_floating_point() or output.is_complex()
        if continuous and output.requires_grad and output.numel():
            found.append(output)
    return found


def _types(leaves: Mapping[str, Tensor]) -> set[torch.dtype]:
    return {leaf.dtype for leaf in leaves.values() if leaf.is_floating_point() or leaf.is_complex()}


def _on_meta(leaves: Mapping[str, Tensor]) -> bool:
    return any(leaf.is_meta for leaf in leaves.values())


def _dtype_name(dtype: torch.dtype | None, leaves: Mapping[str, Tensor]) -> str:
    names = [str(dtype)] if dtype is not None else sorted(map(str, _types(leaves)))
    return ", ".join(names).replace("torch.", "")


def _wake(leaves: Mapping[str, Tensor]) -> None:
    """Give small random values to parameters that are zero: a last gain, LoRA's B, biases.

    Nothing flows back through a zero, and a network whose biases are all zero scales with
    weights that it does not scale with later. A tenth of the usual scale of initialization,
    1/√(inputs of each output).
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    with torch.no_grad():
        for leaf in leaves.values():
            continuous = leaf.is_floating_point() or leaf.is_complex()
            if leaf.is_meta or not continuous or not leaf.numel() or leaf.any():
                continue
            inputs = leaf.numel() // leaf.shape[0] if leaf.dim() > 1 else 1
            kind = torch.complex128 if leaf.is_complex() else torch.float64
            noise = torch.randn(leaf.shape, generator=generator, dtype=kind)
            leaf.copy_((noise * 0.1 / inputs**0.5).to(leaf.dtype))


# ------------------------------------------------------------------------------- what can be
# audited


def _inner(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that add buckets, broadcasts or compilation."""
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
