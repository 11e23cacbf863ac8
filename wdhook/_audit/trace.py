"""Following parameters through a forward pass: which operation first mixes each with something else.

Below autograd and autocast every operation passes a `TorchDispatchMode`, whatever Python code called it. Views
share the storage of what they show, so a storage that holds a parameter stands for all views of it; copies,
casts and functions of parameters alone (weight standardisation, weight norm, ``-exp(A_log)``) hand the parameter on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .norm_eps import EpsWatch, weak_storage
from .operations import (
    JOINING,
    PICKING,
    REDUCING,
    Use,
    bends,
    is_pointwise,
    kept_axis,
    name_of,
    pointwise_use,
    use_of,
)
from .nested import tensors_in

_LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Carried:
    """A parameter on its way to its first use."""

    name: str
    bent: bool = False  # a function of it, such as exp
    picked: str = ""  # the operation that picked rows of it, by indices that depend on the data
    weak: bool = False  # a statistic of it, such as its mean


@dataclass(frozen=True, slots=True)
class Seen:
    """One use of a parameter.

    Attributes:
        use: what is done with it.
        operation: by which operation, and as which argument of it: ``addmm[mat2]``.
        axis: of the parameter that the output keeps, for contractions.
    """

    use: Use
    operation: str
    axis: int = 0


@dataclass(slots=True)
class _Mark:
    """What is known of a storage. The weak reference keeps its address from being given to another one."""

    ref: object
    data: bool = False  # depends on the inputs
    carried: dict[str, Carried] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Operand:
    argument: str
    tensor: Tensor
    mark: _Mark | None

    @property
    def carries(self) -> dict[str, Carried]:
        return self.mark.carried if self.mark else {}

    @property
    def is_stream(self) -> bool:
        """Whether it is data and holds no parameter on its way."""
        return self.mark is not None and self.mark.data and not self.mark.carried


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, notes how the parameters are used.

    Args:
        parameters: name → parameter as the forward pass will see it.
        inputs: every tensor that the forward pass is given.
        keep_double: turn casts from float64 to less into copies. A model that computes its norms in float32 on
            purpose would otherwise hide differences below that precision.
    """

    supports_higher_order_operators = (
        True  # torch.cond, flex_attention: they come here like any other
    )

    def __init__(
        self, parameters: Mapping[str, Tensor], inputs: Iterable[Tensor], keep_double: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = EpsWatch()
        self.coarsest = 0.0  # machine epsilon of the coarsest floating type that data went through
        self._keep_double = keep_double
        self._marks: dict[int, _Mark] = {}
        self._parameters = dict(parameters)
        self._strong: dict[str, list[Seen]] = {}
        self._weak: dict[str, list[Seen]] = {}
        for name, parameter in parameters.items():
            if (mark := self._own(parameter)) is not None:
                mark.carried[name] = Carried(name)
        for tensor in inputs:
            if (mark := self._own(tensor)) is not None:
                mark.data = True

    def uses(self, name: str) -> list[Seen]:
        """Each different use of a parameter in the order of the forward pass; those of its statistics alone if none."""
        return self._strong.get(name) or self._weak.get(name) or []

    def returned(self, outputs: Iterable[Tensor]) -> None:
        """Note parameters that the model hands out without having used them."""
        for tensor in outputs:
            mark = self._find(tensor)
            for carried in mark.carried.values() if mark else ():
                if not self.uses(carried.name):
                    self._note(carried, Use.OTHER, "returned")

    # ---------------------------------------------------------------- one operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read the operands, run the operation, mark what comes out."""
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):
            return self._higher(func, args, kwargs)
        if (
            self._keep_double
            and func is torch.ops.aten._to_copy.default
            and args[0].dtype is torch.float64
        ):
            kwargs = {**kwargs, "dtype": torch.float64} if kwargs.get("dtype") in _LOW else kwargs
        operands = list(self._operands(func, args, kwargs))
        name = name_of(func)
        held = any(o.carries for o in operands)
        carried = self._read(func, name, operands, args) if held else {}
        result = func(*args, **kwargs)
        data = any(o.mark is not None and o.mark.data for o in operands)
        for tensor in _tensors(result) if data or carried else ():
            self._write(tensor, data, carried, func._schema.is_mutable)
        if data or held:
            self.eps.see(name, func, args, kwargs, result)
        return result

    def _higher(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator that takes functions: what happens inside is not seen."""
        operands = [
            _Operand("", tensor, self._find(tensor)) for tensor in tensors_in((args, kwargs))
        ]
        self._consume(operands, Use.OPAQUE, func.name())
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._write(tensor, True, {}, False)
        return result

    def _operands(self, func: Any, args: Any, kwargs: Any) -> Iterator[_Operand]:
        schema = func._schema.arguments
        named = [(schema[i].name, value) for i, value in enumerate(args)]
        for argument, value in (*named, *kwargs.items()):
            if isinstance(value, Tensor):
                yield _Operand(argument, value, self._find(value))
            elif isinstance(value, (list, tuple)):
                yield from (
                    _Operand(argument, t, self._find(t)) for t in value if isinstance(t, Tensor)
                )

    def _write(self, tensor: Tensor, data: bool, carried: dict[str, Carried], writes: bool) -> None:
        mark = self._own(tensor)
        if mark is None:
            return
        mark.data |= data
        mark.carried.update(carried)
        if writes and data and not carried:
            mark.carried.clear()  # x[:, 0] = token: what is written into is data
        if data and tensor.is_floating_point():
            self.coarsest = max(self.coarsest, torch.finfo(tensor.dtype).eps)

    # ---------------------------------------------------------------- the rules

    def _read(
        self, func: Any, name: str, operands: list[_Operand], args: Any
    ) -> dict[str, Carried]:
        """Note the uses that an operation makes, and return the parameters that its result still carries."""
        if func.namespace not in ("aten", "prims", "prim"):
            self._consume(operands, Use.OPAQUE, func._schema.name)
            return {}
        onward: dict[str, Carried] = {}
        pointwise = is_pointwise(func, name)
        stream = max((o.tensor.numel() for o in operands if o.is_stream), default=-1)
        largest = max(o.tensor.numel() for o in operands)
        both = _is_linear_of_two(operands)
        for operand in operands:
            if not operand.carries:
                continue
            use = use_of(name, operand.argument, operand.tensor.dim(), both)
            if use is None and stream >= 0:
                use = self._use_with_data(name, operand, pointwise, stream)
            elif (
                use is None and pointwise and operand.tensor.numel() < largest
            ):  # broadcast over a constant or a parameter
                use = pointwise_use(name, operand.argument)
            if use is not None:
                transposed = "conv" in name and len(args) > 6 and args[6] is True
                self._consume(
                    [operand],
                    use,
                    f"{name}[{operand.argument}]",
                    kept_axis(name, operand.argument, transposed),
                )
            else:
                _merge(onward, self._handed_on(func, name, operand, operands))
        return onward

    def _use_with_data(
        self, name: str, operand: _Operand, pointwise: bool, stream: int
    ) -> Use | None:
        """The use of a parameter together with data, or None where it stays a parameter."""
        if name in PICKING:
            return None
        if name in JOINING:
            return Use.TOKEN
        if pointwise:
            # What is larger than the data is modulated by it, and is still a weight (StyleGAN's convolutions).
            return (
                pointwise_use(name, operand.argument) if operand.tensor.numel() <= stream else None
            )
        return None if "norm" in name else Use.OTHER

    def _handed_on(
        self, func: Any, name: str, operand: _Operand, operands: list[_Operand]
    ) -> dict[str, Carried]:
        bent, weak = bends(func, name) and len(operands) == 1, name in REDUCING
        by_data = any(o.mark is not None and o.mark.data for o in operands if o is not operand)
        picked = f"{name}[{operand.argument}]" if name in PICKING and by_data else ""
        if not (bent or weak or picked):
            return operand.carries
        return {
            key: replace(c, bent=c.bent or bent, weak=c.weak or weak, picked=c.picked or picked)
            for key, c in operand.carries.items()
        }

    def _consume(
        self, operands: Iterable[_Operand], use: Use, operation: str, axis: int = 0
    ) -> None:
        for operand in operands:
            for carried in operand.carries.values():
                self._note(
                    carried, use, operation, self._axis(carried.name, operand.tensor, axis, use)
                )

    def _note(self, carried: Carried, use: Use, operation: str, axis: int = 0) -> None:
        if carried.picked and use not in (Use.CONTRACTION, Use.OPAQUE):
            use, operation = Use.LOOKUP, carried.picked
        elif carried.bent and use is Use.MULTIPLICATION:
            use = Use.CONSTANT
        seen = (self._weak if carried.weak else self._strong).setdefault(carried.name, [])
        if all(other.use is not use for other in seen):
            seen.append(Seen(use, operation, axis))

    def _axis(self, name: str, tensor: Tensor, axis: int, use: Use) -> int:
        """The parameter's own axis behind an axis of what was used: views keep strides, and so do casts."""
        parameter = self._parameters[name]
        if use is not Use.CONTRACTION or tensor.dim() == 0 or parameter.dim() == 0:
            return 0
        step, size = tensor.stride(axis), tensor.size(axis)
        same = [
            i
            for i in range(parameter.dim())
            if parameter.stride(i) == step and parameter.size(i) >= size > 1
        ]
        return same[0] if same else 0

    # ---------------------------------------------------------------- storages

    def _find(self, tensor: Tensor) -> _Mark | None:
        key = _storage(tensor)
        return None if key is None else self._marks.get(key)

    def _own(self, tensor: Tensor) -> _Mark | None:
        key = _storage(tensor)
        if key is None:
            return None
        mark = self._marks.get(key)
        if mark is None:
            mark = self._marks[key] = _Mark(weak_storage(tensor))
        return mark


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse tensors and some subclasses have none
        return None


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        yield from (t for t in result if isinstance(t, Tensor))


def _is_linear_of_two(operands: list[_Operand]) -> bool:
    """Whether two parameters meet in a product as in ``F.linear(token, weight)``, and not in LoRA's ``B @ A``."""
    right = operands[-1]
    if not right.carries or sum(1 for o in operands if o.carries) < 2:
        return False
    return right.tensor.dim() > 1 and right.tensor.stride(-1) != 1 and right.tensor.stride(-2) == 1


def _merge(onward: dict[str, Carried], more: Mapping[str, Carried]) -> None:
    """Join what several operands carry: of a weight and its own mean, the weight counts."""
    for name, carried in more.items():
        known = onward.get(name)
        if known is None or (known.weak and not carried.weak):
            onward[name] = carried
