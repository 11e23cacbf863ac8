"""Copies of whatever a model holds, and a record of what was exchanged for them.

A value is handled by one of three rules. Tensors, arrays, generators of random numbers and built-in
containers are *copied*. Modules, dataclasses and other objects keep their identity: their fields
are *exchanged* for copies and put back. Iterators that cannot be copied are *watched*.
"""

from __future__ import annotations

import copy
import enum
import random
import sys
import types
import warnings
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .nested import PLAIN_TYPES, slots_of

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}

# Copied whole. Instances hold their state in C, where no field can be exchanged.
_WHOLE = (bytearray, array, random.Random)
# Objects of the standard library that hold data alone. Locks, queues and files are left alone.
_DATA = (UserDict, UserList, types.SimpleNamespace)
_NEVER = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    types.CodeType,
    types.MappingProxyType,
    enum.Enum,
    property,
    torch.dtype,
    torch.device,
    torch.Size,
)
# Parts of torch whose objects have a life of their own: optimizers, loaders, process groups,
# compilers.
_MACHINERY = ("torch.optim", "torch.utils", "torch.distributed", "torch.jit", "torch._")


class Copies:
    """Copies of tensors and containers, each made once, and of the fields of objects around them.

    Args:
        dtype: of the floating tensors among the copies; None keeps the dtype of each.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        # id → (original, copy). Holding the original keeps its id from being used again.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._undo: list[Callable[[], None]] = []
        self._watched: list[Watched] = []

    def of(self, value: Any) -> Any:
        """Return the copy of a value, or the value itself where only its fields were exchanged."""
        kind = type(value)
        if kind in PLAIN_TYPES:
            return value
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        self._known[id(value)] = value, value  # a container may hold itself
        maker = _MAKERS.get(kind)
        made = self._make(value) if maker is None else maker(self, value)
        self._known[id(value)] = value, made
        return made

    def tensors(self) -> Iterator[Tensor]:
        """Yield every copy of a tensor so far."""
        return (made for _, made in self._known.values() if isinstance(made, Tensor))

    def advanced(self) -> list[str]:
        """Return the names of the watched iterators that have been advanced."""
        return [watched.name for watched in self._watched if watched.advanced]

    def undo(self) -> None:
        """Put back every field that was exchanged, the last one first."""
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------- copies

    def _make(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._exchange_fields(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.of, value))
        if _is_whole(value):
            return _copied(value)
        if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
            return self._iterator(value)
        return self._exchange(value)

    def _dict(self, held: dict[Any, Any]) -> dict[Any, Any]:
        made = type(held)()
        self._known[id(held)] = held, made
        for key, item in held.items():
            made[key] = item if type(item) in PLAIN_TYPES else self.of(item)
        return made

    def _list(self, held: list[Any]) -> list[Any]:
        made: list[Any] = []
        self._known[id(held)] = held, made
        made.extend(map(self.of, held))
        return made

    def _deque(self, held: deque[Any]) -> deque[Any]:
        made: deque[Any] = deque(maxlen=held.maxlen)
        self._known[id(held)] = held, made
        made.extend(map(self.of, held))
        return made

    def _tuple(self, held: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(self.of, held))

    def _set(self, held: set[Any]) -> set[Any]:
        return set(map(self.of, held))

    def _iterator(self, held: Iterator[Any]) -> Iterator[Any]:
        # What is known already, modules above all, stays one thing.
        memo = {key: made for key, (_, made) in self._known.items()}
        del memo[id(held)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of itertools, Python 3.12
            try:
                return copy.deepcopy(held, memo)
            except TypeError:  # a generator, or an iterator over one
                self._watched.append(Watched(held))
                return self._watched[-1]

    # ------------------------------------------------------------------------------- exchange

    def _exchange(self, value: Any) -> Any:
        """Exchange what a container of a derived type, or an object, holds."""
        if isinstance(value, dict):
            self._exchange_dict(value)
        elif isinstance(value, list):
            self._exchange_list(value)
        elif isinstance(value, set):
            saved = set(value)
            self._undo += [partial(set.update, value, saved), partial(set.clear, value)]
        if _has_fields(value):
            self._exchange_fields(value)
        return value

    def _exchange_dict(self, held: dict[Any, Any]) -> None:
        # The methods of the base class: a derived one may do more than store.
        kind = OrderedDict if isinstance(held, OrderedDict) else dict
        saved = list(held.items())
        self._undo.append(partial(_refill, kind, held, saved))
        for key, item in saved:
            kind.__setitem__(held, key, self.of(item))

    def _exchange_list(self, held: list[Any]) -> None:
        saved = list(held)
        everything = slice(None)
        self._undo.append(partial(list.__setitem__, held, everything, saved))
        list.__setitem__(held, everything, list(map(self.of, saved)))

    def _exchange_fields(self, value: Any) -> Any:
        fields = getattr(value, "__dict__", None)
        if fields is not None:
            saved = dict(fields)
            self._undo.append(partial(_refill, dict, fields, list(saved.items())))
            for key, item in saved.items():
                if type(item) not in PLAIN_TYPES:
                    fields[key] = self.of(item)
        for name, item in list(slots_of(value)):
            self._exchange_slot(value, name, item)
        self._exchange_class(type(value))
        return value

    def _exchange_slot(self, value: Any, name: str, item: Any) -> None:
        made = self.of(item)
        # A frozen dataclass refuses its own __setattr__.
        self._undo.append(partial(object.__setattr__, value, name, item))
        object.__setattr__(value, name, made)

    def _exchange_class(self, kind: type) -> None:
        """Exchange the data that the user's classes hold, such as a shared cache or a counter."""
        for base in kind.__mro__:
            if id(base) in self._known or _is_foreign(base):
                continue
            self._known[id(base)] = base, base
            data = {key: held for key, held in vars(base).items() if _is_class_data(key, held)}
            self._undo.append(partial(_restore_class, base, data))
            for key, held in data.items():
                made = self.of(held)
                if made is not held:
                    type.__setattr__(base, key, made)

    # ------------------------------------------------------------------------------- tensors

    def _tensor(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype_for(tensor.dtype)
        packed = not (dtype.is_floating_point or dtype.is_complex)
        if isinstance(tensor, nn.Parameter) and packed:
            return tensor  # its class knows how to read it, and no gradient will come
        with torch.no_grad():
            made = tensor.detach().to(dtype, copy=True)
        if type(tensor) is nn.Parameter:
            made = nn.Parameter(made, tensor.requires_grad)
            made.__dict__.update(tensor.__dict__)
        elif tensor.requires_grad:
            made.requires_grad_()
        return made

    def _dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        if self._dtype is None:
            return dtype
        if dtype.is_complex:
            return _COMPLEX.get(self._dtype, dtype)
        if dtype.is_floating_point and dtype.itemsize > 1:  # float8 is storage, not arithmetic
            return self._dtype
        return dtype


# The functions that copy the built-in containers, for exactly these types.
_MAKERS: dict[type, Callable[[Copies, Any], Any]] = {
    dict: Copies._dict,
    OrderedDict: Copies._dict,
    list: Copies._list,
    deque: Copies._deque,
    tuple: Copies._tuple,
    set: Copies._set,
}


def _refill(kind: Any, held: Any, saved: list[tuple[Any, Any]]) -> None:
    kind.clear(held)
    kind.update(held, saved)


def _restore_class(kind: type, data: dict[str, Any]) -> None:
    for key in [key for key, held in vars(kind).items() if _is_class_data(key, held)]:
        if key not in data:
            type.__delattr__(kind, key)
    for key, held in data.items():
        if vars(kind).get(key) is not held:
            type.__setattr__(kind, key, held)


def _is_class_data(key: str, held: object) -> bool:
    """Tell data of a class from its methods, descriptors and Python's own names."""
    if key.startswith("__") or key == "_abc_impl" or callable(held):
        return False
    return not hasattr(type(held), "__get__")


def _is_foreign(kind: type) -> bool:
    """Tell classes of torch, of Python and of C from those of users and other libraries."""
    root = kind.__module__.partition(".")[0]
    heap_type = bool(kind.__flags__ & (1 << 9))
    return not heap_type or root == "torch" or root in sys.stdlib_module_names - {"__main__"}


def _has_fields(value: object) -> bool:
    """Tell whether the fields of an object may be exchanged: its class is Python and holds data."""
    if isinstance(value, _NEVER):
        return False
    if isinstance(value, _DATA):
        return True
    kind = type(value)
    if kind.__module__.startswith("torch"):
        return not kind.__module__.startswith(_MACHINERY)
    return not _is_foreign(kind)


def _is_whole(value: object) -> bool:
    if isinstance(value, (*_WHOLE, torch.Generator)):
        return True
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return False
    kinds = (numpy.ndarray, numpy.random.RandomState, numpy.random.Generator)
    return isinstance(value, (*kinds, numpy.random.BitGenerator))


def _copied(value: Any) -> Any:
    """Return an array or a generator of random numbers in the same state."""
    if not isinstance(value, torch.Generator):
        return copy.deepcopy(value)
    made = torch.Generator(value.device)
    made.set_state(value.get_state())
    return made


class Watched(Iterator[Any]):
    """Stands for an iterator that cannot be copied, and notes whether it is advanced."""

    def __init__(self, held: Iterator[Any]) -> None:
        self.name = getattr(held, "__qualname__", type(held).__name__)
        self.advanced = False
        self._held = held

    def __next__(self) -> Any:
        self.advanced = True
        return next(self._held)

    def send(self, value: Any) -> Any:
        """Resume a generator with a value."""
        self.advanced = True
        return self._held.send(value)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)
