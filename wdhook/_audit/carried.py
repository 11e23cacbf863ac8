"""The records of a trace: parameters on their way, uses that were seen, and marks on storages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from .norm_eps import weak_storage
from .operations import Operation, Use


@dataclass(frozen=True, slots=True)
class Seen:
    """One use of a parameter.

    Attributes:
        use: the kind of use.
        operation: the operation and the argument of it: ``addmm[mat2]``.
        axis: of the parameter that the output keeps, for contractions.
        firm: False where the same operations could mean another use, so that a plan outranks
            this use.
    """

    use: Use
    operation: str
    axis: int = 0
    firm: bool = True


@dataclass(frozen=True, slots=True)
class Carried:
    """A parameter on its way to its first use.

    Attributes:
        name: of the parameter.
        bent: a function of it is on the way, such as exp.
        fourier: its Fourier transform is on the way.
        weak: a statistic of it is on the way, such as its mean.
        low_rank: a product of lower rank than its sides is on the way, such as ``U @ V.T``.
        waits: the use that counts unless the tensor turns out to be the weight of a product. A
            tensor that is larger than the data that it was mixed with, a product of two
            parameters, and rows that the data pick can be a weight (of StyleGAN, of LoRA, of
            experts) as well as data (positions, queries, embeddings).
    """

    name: str
    bent: bool = False
    fourier: bool = False
    weak: bool = False
    low_rank: bool = False
    waits: Seen | None = None

    def judged(self, seen: Seen) -> Seen:
        """Return a use as the way of the parameter to it makes it."""
        if self.fourier and seen.use is Use.MULTIPLICATION:
            # The convolution theorem: a product of spectra sums over places.
            return replace(seen, use=Use.CONTRACTION)
        if self.bent and seen.use is Use.MULTIPLICATION:
            return replace(seen, use=Use.CONSTANT)
        return seen

    def after(self, op: Operation, alone: bool) -> Carried:
        """Return the record behind an operation that hands the parameter on."""
        bent = op.bends and alone
        if not (bent or op.reduces or op.fourier):
            return self
        return replace(
            self,
            bent=self.bent or bent,
            weak=self.weak or op.reduces,
            fourier=self.fourier or op.fourier,
        )

    def waiting(self, seen: Seen, low_rank: bool = False) -> Carried:
        """Return the record with a use that waits; an earlier one stays."""
        if self.waits is not None:
            return self
        return replace(self, waits=self.judged(seen), low_rank=low_rank)


@dataclass(frozen=True, slots=True)
class Gained:
    """Data that a parameter has just multiplied; a sum over its axes makes it a contraction."""

    shape: tuple[int, ...]
    axes: frozenset[int]


@dataclass(slots=True)
class Mark:
    """The record of a storage.

    Attributes:
        ref: a weak reference, which keeps the address of the storage from reuse.
        parameter: holds a parameter itself; what is written into it (``max_norm``) leaves it one.
        is_data: depends on the inputs.
        fourier: the result of a Fourier transform of data.
        carried: parameters on their way, by name.
        gained: parameters that have just multiplied it, by name.
        stopped: ids of the parameters on which it depends while its gradient does not.
        upstream: ids of all parameters on which it depends, as bits.
    """

    ref: object
    parameter: bool = False
    is_data: bool = False
    fourier: bool = False
    carried: dict[str, Carried] = field(default_factory=dict)
    gained: dict[str, Gained] = field(default_factory=dict)
    upstream: int = 0
    stopped: int = 0


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument of an operation, with its mark."""

    argument: str
    tensor: Tensor
    mark: Mark | None

    @property
    def carries(self) -> dict[str, Carried]:
        """The parameters on their way in the argument."""
        return self.mark.carried if self.mark else {}

    @property
    def is_data(self) -> bool:
        """Whether the argument depends on the inputs."""
        return self.mark is not None and self.mark.is_data


class Marks:
    """The marks of all storages that a trace has met."""

    def __init__(self) -> None:
        self._by_storage: dict[int, Mark] = {}

    def find(self, tensor: Tensor) -> Mark | None:
        """Return the mark of the storage of a tensor, or None."""
        key = _storage(tensor)
        return None if key is None else self._by_storage.get(key)

    def own(self, tensor: Tensor) -> Mark | None:
        """Return the mark of the storage of a tensor, made if need be; None without a storage."""
        key = _storage(tensor)
        if key is None:
            return None
        mark = self._by_storage.get(key)
        if mark is None:
            mark = self._by_storage[key] = Mark(weak_storage(tensor))
        return mark


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse tensors and some subclasses have none
        return None
