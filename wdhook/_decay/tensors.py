"""Arithmetic in place, on single tensors and on lists: dense, sparse and sharded.

Everything happens on the tensors' own device, without a synchronisation and, for dense tensors,
without memory. The operations are those of `torch.optim`, so results agree to the last bit.
Callers turn grad mode off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._base.torch_private import sparse_values

Number = float | Tensor
"""A Python number, or a 0-dim tensor that stays on its device."""


def unless(found_inf: Tensor, value: Number, otherwise: float = 1.0) -> Tensor:
    """`value`, or 1 where the step will be skipped because `found_inf` (a 0-dim tensor) is set.

    In double precision, so that a Python number survives the trip through a tensor unchanged.
    """
    here = torch.as_tensor(value, dtype=torch.float64, device=found_inf.device)
    return torch.where(found_inf.reshape(()) > 0, otherwise, here)


def add_(grad: Tensor, param: Tensor, weight_decay: float, scale: Tensor | None = None) -> None:
    """Coupled decay of one dense gradient: ``grad += scale·weight_decay·param``.

    Args:
        grad: any shape.
        param: of the same shape.
        weight_decay: λ.
        scale: the factor (0-dim tensor) that the loss was multiplied with; None stands for 1.
    """
    if scale is None:
        grad.add_(param, alpha=weight_decay)
    elif is_on_cpu(scale):
        # Reading a CPU scalar costs no synchronisation, and a power of two times λ is exact: after
        # un-scaling the gradient equals an unscaled one to the last bit.
        grad.add_(param, alpha=weight_decay * scale.item())
    elif is_plain(grad):
        # One more rounding (of λ·p) than above, the price of leaving the scale on the device.
        grad.addcmul_(param, scale.to(grad.device, non_blocking=True), value=weight_decay)
    else:
        # A DTensor may be a partial sum, to which nothing can be added but in an addition.
        grad.add_(param * scale.to(grad.device, non_blocking=True), alpha=weight_decay)


def is_on_cpu(scale: Tensor) -> bool:
    """Whether reading the scalar costs no synchronisation."""
    return scale.is_cpu


def add_all_(
    grads: list[Tensor],
    params: list[Tensor],
    weight_decay: float,
    scale: Tensor | None,
    foreach: bool,
) -> None:
    """Coupled decay of many dense gradients; `foreach` takes one call for all of them."""
    if foreach and scale is None:
        torch._foreach_add_(grads, params, alpha=weight_decay)
    else:
        for grad, param in zip(grads, params, strict=True):
            add_(grad, param, weight_decay, scale)


def mul_all_(params: list[Tensor], by: Number, foreach: bool) -> None:
    """Decoupled decay of many dense parameters; `foreach` takes one call for all of them."""
    if foreach:
        torch._foreach_mul_(params, by)
    else:
        for param in params:
            param.mul_(by)


def lerp_all_(params: list[Tensor], targets: list[Tensor], by: Number, foreach: bool) -> None:
    """Decoupled decay toward targets: p ← t + by·(p − t), as `torch.lerp` computes.

    Args:
        params: any shapes; of a DTensor its local part is changed.
        targets: of the same shapes, or 0-dim.
        by: the factor.
        foreach: one call for all of them, where the factor is a number.
    """
    values = [local(param) for param in params]
    ends = [local(here(target, param)) for target, param in zip(targets, params, strict=True)]
    weight = 1 - by
    if foreach and not isinstance(weight, Tensor):
        torch._foreach_lerp_(values, ends, weight)
        return
    for value, end in zip(values, ends, strict=True):
        on = weight.to(value.device, value.dtype) if isinstance(weight, Tensor) else weight
        value.lerp_(end, on)


def here(target: Tensor, param: Tensor) -> Tensor:
    """A target on the device and in the dtype of its parameter; copied where it is kept
    elsewhere."""
    return target.to(param.device, param.dtype, non_blocking=True)


def sharded_as(whole: Tensor, param: Any) -> Tensor:
    """The part of a tensor that this rank holds of a DTensor of the same shape, as a DTensor. No
    communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    everywhere = DTensor.from_local(
        whole.to(param.device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return everywhere.redistribute(mesh, param.placements)


def loss_scale(scaler: Any | None, device: torch.device) -> Tensor | None:
    """The factor that a ``GradScaler`` multiplies the loss with: 0-dim, on `device`; None where
    there is none."""
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def scaled(weight_decay: Number, scale: Tensor | None) -> Number:
    """λ times the factor of the loss, if there is one."""
    return weight_decay if scale is None else weight_decay * scale


def is_low(dtype: torch.dtype) -> bool:
    """Tell a floating point format that torch multiplies in, and whose precision is below that of
    float32."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return False
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def wide(number: Number) -> Number:
    """A number in double precision, where its device has that."""
    if not isinstance(number, Tensor):
        return number
    return number.to(widest(number.device))


def on_device(number: Number | None, device: torch.device) -> Tensor:
    """A number as a 0-dim tensor of its own, in double precision where the device has that; None
    stands for 1.

    A copy from the host; a tensor that is there already is given back as it is.
    """
    if isinstance(number, Tensor) and number.device == device:
        return number
    value = 1.0 if number is None else number
    return torch.as_tensor(value, dtype=widest(device), device=device)


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device for numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_capturing() -> bool:
    """The present operations go into a CUDA graph, numbers such as λ as constants."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def is_plain(tensor: Tensor) -> bool:
    """Whether the foreach kernels know the tensor: neither a subclass (DTensor) nor sparse."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def use_foreach(asked: bool | None, params: list[Tensor]) -> bool:
    """Whether tensors of one kind go through a foreach kernel: as asked, else where it does the
    same with several."""
    if asked is not None:
        return asked and bool(params)
    return len(params) > 1 and is_plain(params[0]) and not _foreach_rounds(params[0])


def _foreach_rounds(param: Tensor) -> bool:
    """Whether foreach kernels round a Python number to the precision of the tensor first, as those
    of the CPU do."""
    return param.is_cpu and is_low(param.dtype)


def all_writable(grads: list[Tensor]) -> bool:
    """Tell gradients of which every one can be changed in place."""
    # Most are contiguous: no call for each.
    usual = all([grad.is_contiguous() and not grad.is_inference() for grad in grads])  # noqa: C419
    return usual or all(map(is_writable, grads))


def is_writable(grad: Tensor) -> bool:
    """Tell a gradient that can be changed in place.

    Not one made in inference mode, nor one expanded from fewer numbers.
    """
    return not grad.is_inference() and (grad.is_contiguous() or 0 not in grad.stride())


def content(grad: Tensor) -> Tensor | None:
    """Whether any element of a gradient (of a DTensor: of its local shard) is not zero, as a 0-dim
    tensor.

    None where there is no element: a shard may be empty.
    """
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad
    values = sparse_values(local) if local.is_sparse else local
    return values.any() if values.numel() else None


def is_not_zero(grad: Any) -> bool:
    """Tell a gradient with an element that is not zero. Synchronises."""
    some = content(grad)
    return some is not None and bool(some)


def add_rows_(
    grad: Tensor,
    param: Tensor,
    weight_decay: Number,
    seen: Tensor | None,
    target: Tensor | None = None,
) -> Tensor:
    """Coupled decay of a sparse gradient: only rows of `param` that it names, and not in `seen`.

    Decay draws to `target`; None stands for 0.

    Returns:
        All rows decayed so far (1-D, int64), to be given as `seen` with the next micro-batch.
    """
    rows, index, seen = _new_rows(grad, seen)
    if len(rows):
        values = _flat(grad, param)[rows]
        if target is not None:
            values = values - _target_rows(grad, param, target, rows)
        values = values * weight_decay
        shape = (len(rows), *grad.shape[grad.sparse_dim() :])
        # The indices come from a valid tensor, so they need no check.
        grad.add_(
            torch.sparse_coo_tensor(
                index, values.reshape(shape), grad.shape, check_invariants=False
            )
        )
    return seen


def mul_rows_(
    grad: Tensor, param: Tensor, by: Number, seen: Tensor | None, target: Tensor | None = None
) -> Tensor:
    """Decoupled decay where the gradient is sparse; see `add_rows_`."""
    rows, _, seen = _new_rows(grad, seen)
    if len(rows):
        flat = _flat(grad, param)
        values = flat[rows]
        if target is None:
            values = values * by
        else:
            lerp_all_([values], [_target_rows(grad, param, target, rows)], by, False)
        flat[rows] = values
    return seen


def _target_rows(grad: Tensor, param: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """The rows of a target; a 0-dim target as it is."""
    near = here(target, param)
    return near if near.dim() == 0 else _flat(grad, near)[rows]


def local(param: Tensor) -> Tensor:
    """The values of a parameter that this rank holds, without a graph; a complex number as two."""
    here: Tensor = param.detach()
    here = here.to_local() if hasattr(here, "to_local") else here
    return torch.view_as_real(here) if here.is_complex() else here


def pieces(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tensors of one shape, in slices that stay in the cache of a CPU; whole on a device."""
    if not (one.is_cpu and one.is_contiguous() and other.is_contiguous()):
        yield one, other
        return
    pair = torch.split(one.view(-1), _PIECE), torch.split(other.view(-1), _PIECE)
    yield from zip(*pair, strict=True)


_PIECE = 2**15  # elements


def as_table(grad: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """`param` seen as rows, and the rows that a sparse gradient names, each once."""
    rows, _, _ = _new_rows(grad, None)
    return _flat(grad, local(param)), rows


def _flat(grad: Tensor, param: Tensor) -> Tensor:
    """`param` seen as (rows that a sparse gradient can name, elements of a row)."""
    dense = grad.shape[grad.sparse_dim() :].numel()
    return param.detach().view(-1, dense)


def _new_rows(grad: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows named by `grad` and not in `seen`; their sparse indices; all rows seen by now."""
    index = grad.coalesce().indices()
    rows = torch.zeros_like(index[0])
    for size, along in zip(grad.shape[: len(index)], index, strict=True):
        rows = rows * size + along
    if seen is None:
        return rows, index, rows
    new = ~torch.isin(rows, seen)
    return rows[new], index[:, new], torch.cat((seen, rows[new]))
