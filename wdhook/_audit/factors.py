"""Tells the factors of a product apart: weights from data, gains from factorizations.

Pure functions of the operands of one operation.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .carried import Carried, Operand, Seen
from .operations import LEFT, WITH_BIAS, Operation, Use, use_of


def is_broadcast(operand: Operand, operands: list[Operand]) -> bool:
    """Tell a factor that is repeated over a constant or a parameter, as a gain is over its weight.

    In an outer product (`torch.kron`) both factors are repeated, and neither is the gain of the
    other.
    """
    largest = max(o.tensor.numel() for o in operands)
    if operand.tensor.numel() == largest:
        return False
    shapes = [o.tensor.shape for o in operands]
    joint: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return joint.numel() == largest


def factors_of(op: Operation, operands: list[Operand]) -> tuple[Operand, Operand] | None:
    """Return the two factors of a product, or the input and the weight of a convolution."""
    if op.is_product:
        found = [o for o in operands if not (o.argument == "self" and op.name in WITH_BIAS)]
    else:
        found = [o for o in operands if o.argument in ("input", "weight")]
    return (found[0], found[1]) if len(found) == 2 else None


def is_layer(op: Operation, right: Operand) -> bool:
    """Tell the right factor of ``F.linear(token, weight)``, transposed, from that of ``B @ A``."""
    if not op.is_product:
        return True
    tensor = right.tensor
    return tensor.dim() > 1 and tensor.stride(-1) != 1 and tensor.stride(-2) == 1


def is_low_rank(op: Operation, left: Operand, right: Operand) -> bool:
    if not op.is_product or left.tensor.dim() < 2 or right.tensor.dim() < 2:
        return False
    return left.tensor.shape[-1] < min(left.tensor.shape[-2], right.tensor.shape[-1])


def is_weight_of(op: Operation, operand: Operand, operands: list[Operand]) -> bool:
    """Tell whether a tensor is the weight of a product with data, not the data of it."""
    if use_of(op.name, operand.argument, operand.tensor.dim() < 2) is not Use.CONTRACTION:
        return False
    others = [o for o in factors_of(op, operands) or () if o is not operand]
    return all(other.is_data and not other.carries for other in others)


def in_place(carried: Carried, op: Operation, operand: Operand, seen: Seen) -> Seen:
    """Return the use of a factor whose partner is data, or a constant."""
    waits = carried.waits
    if waits is None:
        return seen
    may_be_data = op.is_product and operand.argument in LEFT and not carried.low_rank
    if may_be_data and waits.use is Use.TOKEN:
        return replace(waits, firm=False)  # queries that meet keys, or a weight of full rank
    return replace(seen, firm=waits.firm and waits.use is Use.CONTRACTION)
