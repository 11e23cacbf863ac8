"""Running a model so that nothing of it remembers: on copies of all that it holds, with its random state put back."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class Copies:
    """Copies of tensors, and of the built-in containers around them; what was one thing stays one thing.

    Args:
        dtype: of the floating tensors among the copies; None keeps theirs.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._known: dict[
            int, tuple[Any, Any]
        ] = {}  # id → the original, which keeps the id taken, and its copy

    def of(self, value: Any) -> Any:
        """The copy of a value; other objects than tensors and built-in containers are themselves."""
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        copy = self._make(value)
        if copy is not value:
            self._known[id(value)] = value, copy
        return copy

    def tensors(self) -> Iterator[Tensor]:
        """Every copy of a tensor so far."""
        return (copy for _, copy in self._known.values() if isinstance(copy, Tensor))

    def _make(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind in (dict, OrderedDict):
            return kind((key, self.of(item)) for key, item in value.items())
        if kind in (list, tuple, set, deque):
            return kind(map(self.of, value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*map(self.of, value))
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if (
            self._dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
        ):  # float8 is storage, not arithmetic
            dtype = self._dtype
        elif self._dtype is not None and dtype.is_complex:
            dtype = _COMPLEX.get(self._dtype, dtype)
        if isinstance(tensor, nn.Parameter) and not (dtype.is_floating_point or dtype.is_complex):
            return tensor  # packed: its class knows how to read it, and no gradient will come
        with torch.no_grad():
            copy = tensor.detach().to(dtype, copy=True)
        if type(tensor) is nn.Parameter:
            copy = nn.Parameter(copy, tensor.requires_grad)
            copy.__dict__.update(tensor.__dict__)
        elif tensor.requires_grad:
            copy.requires_grad_()
        return copy


@contextmanager
def isolated(model: nn.Module, copies: Copies) -> Iterator[None]:
    """Give each module copies of its attributes, and its own back at the end.

    Parameters inside are other leaves: no gradient reaches the model's, and no hook of theirs runs. Not put
    back: what modules keep inside objects of other classes, and what hooks of others write elsewhere.
    """
    modules = list(model.modules())
    own = [vars(module).copy() for module in modules]
    stack = ExitStack()
    try:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_uncompiled())
        for module in modules:
            inside = {key: copies.of(value) for key, value in vars(module).items()}
            if "_compiled_call_impl" in inside:
                inside["_compiled_call_impl"] = (
                    None  # of `module.compile()`: a trace needs the operations
                )
            vars(module).update(inside)
        stack.enter_context(_random_state_kept({t.device for t in copies.tensors()}))
        yield
    finally:
        for module, attributes in zip(modules, own, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        stack.close()


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled functions run as they were written: a trace needs their operations."""
    dynamo = (
        "torch._dynamo" in sys.modules
    )  # nothing is compiled before, and importing it takes seconds
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return stance("force_eager") if dynamo and stance is not None else nullcontext()


@contextmanager
def _random_state_kept(devices: set[torch.device]) -> Iterator[None]:
    """Put back the generators of Python, NumPy (if it is loaded), the CPU and the devices."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy.random")
    arrays = numpy.get_state() if numpy is not None else None
    kinds: dict[str, list[torch.device]] = {}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            kinds.setdefault(device.type, []).append(device)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
            for kind, some in kinds.items():
                if kind == "mps":  # one device, which its functions do not take as an argument
                    stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
                    continue
                stack.enter_context(torch.random.fork_rng(devices=some, device_type=kind))
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(arrays)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in nested containers, dataclasses and other plain objects, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for item in value:
            yield from tensors_in(item, seen)
    else:
        for item in getattr(value, "__dict__", {}).values():
            yield from tensors_in(item, seen)
