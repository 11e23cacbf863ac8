"""Follows parameters through a forward pass to the first operation that mixes each with data.

Below autograd and autocast every operation passes a `TorchDispatchMode`, whatever Python code
called it. Views share the storage of their base, so a storage that holds a parameter stands for
all its views; copies, casts and functions of parameters alone (weight standardisation, weight
norm, ``-exp(A_log)``) hand the parameter on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .carried import Carried, Gained, Mark, Marks, Operand, Seen
from .factors import factors_of, in_place, is_broadcast, is_layer, is_low_rank, is_weight_of
from .nested import tensors_in
from .norm_eps import EpsWatch
from .operations import (
    LEFT,
    WITH_BIAS,
    Operation,
    Use,
    kept_axis,
    operation_of,
    pointwise_use,
    use_of,
)
from .uses import Uses

_LOW = (torch.float32, torch.bfloat16, torch.float16)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how the parameters are used, while it is active.

    Args:
        parameters: name → parameter as the forward pass will see it.
        inputs: every tensor that the forward pass is given.
        former_eps: of the normalizations, see `EpsWatch`.
        keep_double: turn casts from float64 to less into copies. A model that computes its norms in
            float32 on purpose would otherwise hide differences below that precision.
    """

    # torch.cond and flex_attention arrive like any other operator.
    supports_higher_order_operators = True

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        former_eps: dict[float, float],
        keep_double: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = EpsWatch(former_eps)
        self.coarsest = 0.0  # machine epsilon of the coarsest floating type that data went through
        self._keep_double = keep_double
        self._marks = Marks()
        self._uses = Uses(parameters)
        self._bits = {name: 1 << i for i, name in enumerate(parameters)}
        for name, parameter in parameters.items():
            mark = self._marks.own(parameter)
            if mark is None:
                continue
            mark.parameter = True
            mark.carried[name] = Carried(name)
            if parameter.requires_grad:
                mark.upstream |= self._bits[name]
        for tensor in inputs:
            mark = self._marks.own(tensor)
            if mark is not None:
                mark.is_data = True

    def uses(self, name: str) -> list[Seen]:
        """Return each different use of a parameter, in the order of the forward pass."""
        return self._uses.of(name)

    def returned(self, outputs: Iterable[Tensor]) -> None:
        """Note parameters that the model returns without having used them."""
        for tensor in outputs:
            mark = self._marks.find(tensor)
            for carried in list(mark.carried.values()) if mark else ():
                if not self.uses(carried.name):
                    self._uses.note(carried, carried.waits or Seen(Use.OTHER, "returned"))

    def stopped(self, outputs: Iterable[Tensor]) -> set[str]:
        """Return the parameters on which outputs depend where no gradient shows the dependence."""
        bits = 0
        for tensor in outputs:
            mark = self._marks.find(tensor)
            if mark is not None:
                bits |= mark.stopped
        return {name for name, bit in self._bits.items() if bits & bit}

    # ------------------------------------------------------------------------------- one operation

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read the operands, run the operation, mark its results."""
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):
            return self._higher(func, args, kwargs)
        op = operation_of(func)
        if self._keep_double and op.name == "_to_copy":
            kwargs = _kept_double(args[0], kwargs)
        operands = self._operands(op, args, kwargs)
        if not operands:
            return func(*args, **kwargs)
        carried: dict[str, Carried] = {}
        if any(operand.carries for operand in operands):
            carried = self._read(op, operands, args)
        result = self.eps.run(op, func, args, kwargs)
        self._write(op, operands, result, carried)
        if op.name == "sum":
            self._sum(operands[0], args, result)
        return result

    def _operands(self, op: Operation, args: Any, kwargs: Any) -> list[Operand]:
        """Return the tensor arguments, if any of them depends on inputs or parameters."""
        named = [*zip(op.arguments, args, strict=False), *kwargs.items()]
        found = []
        for argument, value in named:
            if isinstance(value, Tensor):
                found.append(Operand(argument, value, self._marks.find(value)))
            elif isinstance(value, (list, tuple)):
                for tensor in _tensors(value):
                    found.append(Operand(argument, tensor, self._marks.find(tensor)))
        # Arithmetic on constants alone is left out.
        concerned = any(operand.mark is not None for operand in found)
        return found if concerned else []

    def _higher(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that takes functions, whose inside is not traced."""
        for tensor in tensors_in((args, kwargs)):
            operand = Operand("", tensor, self._marks.find(tensor))
            for carried in operand.carries.values():
                self._uses.note(carried, Seen(Use.OPAQUE, func.name()))
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            mark = self._marks.own(tensor)
            if mark is not None:
                mark.is_data = True
        return result

    def _write(
        self, op: Operation, operands: list[Operand], result: Any, carried: dict[str, Carried]
    ) -> None:
        """Mark the results of an operation."""
        data = any(operand.is_data for operand in operands)
        upstream, stopped = (0, 0) if op.creates else _dependence(operands)
        gained = _gained(operands, result) if data and op.name == "mul" else {}
        for tensor in _tensors(result):
            mark = self._marks.own(tensor)
            if mark is None:
                continue
            if data:
                self._write_data(op, mark, tensor, carried)
            mark.carried.update(carried)
            mark.gained = gained
            mark.upstream |= upstream
            mark.stopped |= stopped

    def _write_data(
        self, op: Operation, mark: Mark, tensor: Tensor, carried: dict[str, Carried]
    ) -> None:
        """Mark a result that depends on the inputs."""
        mark.fourier = op.fourier
        if tensor.is_floating_point():
            self.coarsest = max(self.coarsest, torch.finfo(tensor.dtype).eps)
        if mark.parameter:
            return
        mark.is_data = True
        if op.writes and not carried:
            mark.carried.clear()  # x[:, 0] = token: the target of the writing is data

    def _sum(self, operand: Operand, args: Any, result: Tensor) -> None:
        """Make a contraction of a product that is summed over the axes of its parameter."""
        if operand.mark is None:
            return
        dims = operand.tensor.dim()
        given = args[1] if len(args) > 1 and args[1] else range(dims)
        axes = {axis % dims for axis in given} if dims else set()
        for name, gained in operand.mark.gained.items():
            if gained.shape == tuple(operand.tensor.shape) and axes and axes <= gained.axes:
                self._uses.became_contraction(name)

    # ------------------------------------------------------------------------------- the rules

    def _read(self, op: Operation, operands: list[Operand], args: Any) -> dict[str, Carried]:
        """Note the uses that an operation makes; return the parameters that its result carries."""
        onward: dict[str, Carried] = {}
        for operand in operands:
            if not operand.carries:
                continue
            if op.custom:
                self._consume(operand, Seen(Use.OPAQUE, op.full_name))
            elif operand.is_data:
                _merge(onward, self._read_mixed(op, operand, operands))
            else:
                _merge(onward, self._read_pure(op, operand, operands, args))
        return onward

    def _read_mixed(
        self, op: Operation, operand: Operand, operands: list[Operand]
    ) -> dict[str, Carried]:
        """Read an operand in which parameters and data are mixed already."""
        held = {n: c for n, c in operand.carries.items() if c.waits and not self.uses(n)}
        alone = len(operands) == 1
        if op.pointwise or op.reduces or (alone and not op.mixes):
            return {name: carried.after(op, alone) for name, carried in held.items()}
        for carried in held.values():
            assert carried.waits is not None
            seen = carried.waits
            if is_weight_of(op, operand, operands):
                seen = replace(self._contraction(op, operand, carried.name, ()), firm=False)
            self._uses.note(carried, seen)
        return {}

    def _read_pure(
        self, op: Operation, operand: Operand, operands: list[Operand], args: Any
    ) -> dict[str, Carried]:
        """Read an operand that depends on parameters alone."""
        stream = max((o.tensor.numel() for o in operands if o.is_data), default=-1)
        use = use_of(op.name, operand.argument, operand.tensor.dim() < 2)
        if use is Use.CONTRACTION or (use is Use.TOKEN and operand.argument == "input"):
            return self._read_product(op, operand, operands, args)
        if use is None and stream >= 0:
            return self._meet_data(op, operand, operands, stream)
        if use is None and op.pointwise and is_broadcast(operand, operands):
            use = pointwise_use(op.name, operand.argument)
        if use is not None:
            self._consume(operand, Seen(use, f"{op.name}[{operand.argument}]"))
            return {}
        return _handed_on(op, operand, operands)

    def _read_product(
        self, op: Operation, operand: Operand, operands: list[Operand], args: Any
    ) -> dict[str, Carried]:
        """Read the factor of a product: with data, or with another parameter."""
        factors = factors_of(op, operands)
        if factors is None or any(f.is_data or not f.carries for f in factors):
            for name, carried in operand.carries.items():
                seen = self._contraction(op, operand, name, args)
                self._uses.note(carried, in_place(carried, op, operand, seen))
            return {}
        left, right = factors
        if operand is left and is_layer(op, right):
            return self._read_fed(op, left, right)
        low_rank = is_low_rank(op, left, right)
        waiting = {}
        for name, carried in operand.carries.items():
            seen = self._contraction(op, operand, name, args)
            waiting[name] = carried.waiting(seen, low_rank)
        return waiting

    def _read_fed(self, op: Operation, left: Operand, right: Operand) -> dict[str, Carried]:
        """Read the left factor of a product of parameters: a token, or part of a weight."""
        token = Seen(Use.TOKEN, f"{op.name}[{left.argument}]")
        rows = left.tensor.shape[-2:-1]
        if op.name in WITH_BIAS or rows == (1,):
            # A bias is added, or one row goes through the layer: no weight is made like this.
            self._consume(left, token)
            return {}
        low_rank = is_low_rank(op, left, right)
        return {name: c.waiting(token, low_rank) for name, c in left.carries.items()}

    def _meet_data(
        self, op: Operation, operand: Operand, operands: list[Operand], stream: int
    ) -> dict[str, Carried]:
        """Read a parameter together with data, in an operation that any tensor may enter."""
        operation = f"{op.name}[{operand.argument}]"
        if op.picks:
            # A table is looked up by rows. Single elements may be biases, or a histogram.
            by_rows = op.name != "gather" and operand.tensor.dim() > 1
            rows = Seen(Use.LOOKUP, operation, firm=by_rows)
            return {name: carried.waiting(rows) for name, carried in operand.carries.items()}
        if op.joins:
            self._consume(operand, Seen(Use.TOKEN, operation))
            return {}
        if op.pointwise:
            return self._meet_pointwise(op, operand, operands, stream)
        if "norm" in op.name:
            return _handed_on(op, operand, operands)
        self._consume(operand, Seen(Use.OTHER, operation))
        return {}

    def _meet_pointwise(
        self, op: Operation, operand: Operand, operands: list[Operand], stream: int
    ) -> dict[str, Carried]:
        """Read a parameter that a pointwise operation mixes with data of a number of elements."""
        operation = f"{op.name}[{operand.argument}]"
        seen = Seen(pointwise_use(op.name, operand.argument), operation)
        if seen.use is Use.MULTIPLICATION and _is_spectrum(operands):
            seen = Seen(Use.CONTRACTION, operation, firm=False)
        numel = operand.tensor.numel()
        is_table = sum(size > 1 for size in operand.tensor.shape) > 1
        if numel < stream or (numel == stream and not is_table):
            self._consume(operand, seen)
            return {}
        # Not broadcast: a weight that the data modulate, or a table that they are added to.
        later = replace(seen, firm=seen.firm and numel == stream)
        return {name: c.waiting(later) for name, c in operand.carries.items()}

    def _contraction(self, op: Operation, operand: Operand, name: str, args: Any) -> Seen:
        transposed = "conv" in op.name and len(args) > 6 and args[6] is True
        axis = kept_axis(op.name, operand.argument, transposed)
        own = self._uses.axis(name, operand.tensor, axis)
        # The left factor of data may be a weight, and may be queries that meet keys.
        firm = not (op.is_product and operand.argument in LEFT)
        return Seen(Use.CONTRACTION, f"{op.name}[{operand.argument}]", own, firm)

    def _consume(self, operand: Operand, seen: Seen) -> None:
        for carried in operand.carries.values():
            decided = seen if seen.use is Use.OPAQUE else carried.waits or seen
            self._uses.note(carried, decided)


# Assigned behind the class: `TorchDispatchMode.__init_subclass__` wraps a method of this name in a
# function that imports torch._dynamo at the first operation, which takes seconds.
setattr(Trace, "__torch_dispatch__", Trace.dispatch)  # noqa: B010


def _kept_double(tensor: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    if tensor.dtype is torch.float64 and kwargs.get("dtype") in _LOW:
        return {**kwargs, "dtype": torch.float64}
    return kwargs


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        yield from (item for item in result if isinstance(item, Tensor))


def _handed_on(op: Operation, operand: Operand, operands: list[Operand]) -> dict[str, Carried]:
    alone = len(operands) == 1
    return {name: carried.after(op, alone) for name, carried in operand.carries.items()}


def _is_spectrum(operands: list[Operand]) -> bool:
    return any(o.mark is not None and o.mark.fourier for o in operands)


def _merge(onward: dict[str, Carried], more: Mapping[str, Carried]) -> None:
    """Join the parameters of several operands: of a weight and its own mean, the weight counts."""
    for name, carried in more.items():
        known = onward.get(name)
        if known is None or (known.weak and not carried.weak):
            onward[name] = carried


def _gained(operands: list[Operand], result: Tensor) -> dict[str, Gained]:
    """Return the parameters that multiply data, with the axes along which they vary."""
    found = {}
    for operand in operands:
        if operand.is_data:
            continue
        offset = result.dim() - operand.tensor.dim()
        axes = frozenset(i + offset for i, n in enumerate(operand.tensor.shape) if n > 1)
        for name in operand.carries:
            found[name] = Gained(tuple(result.shape), axes)
    return found


def _dependence(operands: list[Operand]) -> tuple[int, int]:
    """Return the parameters on which a result depends, and those of them that no gradient reaches.

    A floating operand that depends on a trainable parameter and requires no gradient was
    detached, or computed under `torch.no_grad`.
    """
    upstream = stopped = 0
    for operand in operands:
        mark = operand.mark
        if mark is None or not mark.upstream:
            continue
        upstream |= mark.upstream
        stopped |= mark.stopped
        tensor = operand.tensor
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        if differentiable and not tensor.requires_grad:
            stopped |= mark.upstream
    return upstream, stopped
