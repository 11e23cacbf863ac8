"""What modules hold beside tensors: objects, classes, iterators, generators, modules out of
sight.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from array import array
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wdhook


class Settings:
    """An object of the user's own, which holds a module."""

    def __init__(self) -> None:
        self.calls = 0
        self.norm = nn.BatchNorm1d(4)


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("calls", "seen")

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []


class Tagged(dict):  # type: ignore[type-arg]
    """A container of a class of its own, with an attribute."""

    tag = "none"


class Holder(nn.Module):
    """Changes in its forward pass whatever it holds."""

    made: ClassVar[int] = 0
    log: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.groups: defaultdict[str, list[int]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.ordered = OrderedDict(a=1)
        self.tagged = Tagged(a=1)
        self.user_dict: UserDict[str, int] = UserDict(a=1)
        self.user_list = UserList([1])
        self.recent = deque([1, 2], maxlen=2)
        self.array = np.zeros(3)
        self.numbers = array("d", [1.0])
        self.bytes = bytearray(b"ab")
        self.namespace = SimpleNamespace(calls=0)
        self.settings = Settings()
        self.slotted = Slotted()
        self.iterator = iter([1, 2, 3])
        self.cycle = itertools.cycle([1, 2])
        self.numbered = enumerate(iter("abc"))
        self.torch_random = torch.Generator().manual_seed(0)
        self.python_random = random.Random(0)
        self.numpy_random = np.random.default_rng(0)
        self.hidden = [nn.BatchNorm1d(4)]
        self.deep: dict[str, list[nn.Module]] = {"norms": [nn.BatchNorm1d(4)]}
        self.itself: list[Any] = []
        self.itself.append(self.itself)

    def forward(self, x: Tensor, batch: dict[str, Any]) -> Tensor:
        type(self).made += 1
        type(self).log.append(1)
        type(self).new = 1
        self.groups["a"].append(1)
        self.counts["a"] += 1
        self.ordered.move_to_end("a")
        self.ordered["b"] = 1
        self.tagged["b"], self.tagged.tag = 1, "some"
        self.user_dict["b"] = 1
        self.user_list.append(1)
        self.recent.append(3)
        self.array += 1
        self.numbers.append(1.0)
        self.bytes.append(1)
        self.namespace.calls += 1
        self.settings.calls += 1
        self.slotted.calls += 1
        self.slotted.seen.append(1)
        next(self.iterator), next(self.cycle), next(self.numbered)
        torch.rand(1, generator=self.torch_random)
        self.python_random.random()
        self.numpy_random.random()
        self.itself.append(1)
        batch["x"].add_(1)
        batch["array"] += 1
        batch["extra"] = batch.pop("gone")
        for norm in (self.hidden[0], self.deep["norms"][0], self.settings.norm):
            x = norm(x)
        return self.fc(x)


LOOKS: dict[str, Callable[[Holder, dict[str, Any]], Any]] = {
    "a counter of the class": lambda m, b: Holder.made,
    "a list of the class": lambda m, b: list(Holder.log),
    "a new attribute of the class": lambda m, b: hasattr(Holder, "new"),
    "a defaultdict": lambda m, b: (dict(m.groups), m.groups.default_factory),
    "a Counter": lambda m, b: dict(m.counts),
    "an OrderedDict": lambda m, b: list(m.ordered),
    "a dict of its own class": lambda m, b: (dict(m.tagged), m.tagged.tag),
    "a UserDict": lambda m, b: dict(m.user_dict),
    "a UserList": lambda m, b: list(m.user_list),
    "a deque": lambda m, b: (list(m.recent), m.recent.maxlen),
    "a NumPy array": lambda m, b: m.array.tolist(),
    "an array": lambda m, b: list(m.numbers),
    "a bytearray": lambda m, b: bytes(m.bytes),
    "a namespace": lambda m, b: m.namespace.calls,
    "an object": lambda m, b: m.settings.calls,
    "an object with slots": lambda m, b: (m.slotted.calls, list(m.slotted.seen)),
    "an iterator": lambda m, b: next(m.iterator),
    "an iterator of itertools": lambda m, b: next(m.cycle),
    "an iterator over an iterator": lambda m, b: next(m.numbered),
    "a generator of torch": lambda m, b: m.torch_random.get_state().tolist(),
    "a generator of Python": lambda m, b: m.python_random.getstate(),
    "a generator of NumPy": lambda m, b: str(m.numpy_random.bit_generator.state),
    "a module in a list": lambda m, b: m.hidden[0].running_mean.tolist(),
    "a module in a list in a dict": lambda m, b: m.deep["norms"][0].running_mean.tolist(),
    "a module in an object": lambda m, b: m.settings.norm.running_mean.tolist(),
    "a list that holds itself": lambda m, b: (len(m.itself), m.itself[0] is m.itself),
    "a tensor of the inputs": lambda m, b: b["x"].tolist(),
    "an array of the inputs": lambda m, b: b["array"].tolist(),
    "the keys of the inputs": lambda m, b: list(b),
}


@pytest.fixture
def held() -> Iterator[tuple[Holder, dict[str, Any]]]:
    """A module and an input, and the class put back at the end."""
    torch.manual_seed(0)
    yield Holder(), {"x": torch.zeros(2), "array": np.zeros(2), "gone": 1}
    Holder.made = 0
    Holder.log.clear()
    if hasattr(Holder, "new"):
        del Holder.new


@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support will be removed")
@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_changed(look: str, held: tuple[Holder, dict[str, Any]]) -> None:
    """Each thing that the forward pass changes is the same object as before, with the same
    content.
    """
    model, batch = held
    attributes = dict(vars(model))
    fresh = LOOKS[look](Holder(), {"x": torch.zeros(2), "array": np.zeros(2), "gone": 1})
    wdhook.audit(model, torch.randn(5, 4), batch)
    assert LOOKS[look](model, batch) == fresh
    assert all(vars(model)[name] is one for name, one in attributes.items())


@pytest.mark.parametrize("look", LOOKS)
def test_a_plain_pass_changes_it(look: str, held: tuple[Holder, dict[str, Any]]) -> None:
    """Twin: each of these is changed by a forward pass of the user's own."""
    model, batch = held
    fresh = LOOKS[look](Holder(), {"x": torch.zeros(2), "array": np.zeros(2), "gone": 1})
    model(torch.randn(5, 4), batch)
    assert LOOKS[look](model, batch) != fresh


class Drawing(nn.Module):
    """Takes a number from a generator function."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.fc, self.draws = nn.Linear(4, 2), draws
        self.numbers = (float(i) for i in range(9))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + (next(self.numbers) if self.draws else 0.0)


def test_a_class_with_a_metaclass_is_left_alone() -> None:
    """A module may hold a class as data; its `__dict__` takes no items, whoever made the class."""
    meta = type("Meta", (type,), {})
    held = meta("Held", (), {"norm": [1]})
    model = nn.Linear(4, 4)
    model.kind = held  # type: ignore[assignment]
    assert wdhook.audit(model, torch.randn(2, 4))["weight"].agrees
    assert model.kind is held
    assert held.__dict__["norm"] == [1]


def test_a_generator_that_has_run_is_named() -> None:
    """Python cannot run a generator back: the audit warns, and names it."""
    model = Drawing(draws=True)
    with pytest.warns(wdhook.WdhookWarning, match=r"generator: Drawing\.__init__.*genexpr"):
        wdhook.audit(model, torch.randn(3, 4))
    assert next(model.numbers) > 0.0


def test_a_generator_that_has_not_run_is_not_named() -> None:
    """Twin: a warning would be an error here."""
    model = Drawing(draws=False)
    wdhook.audit(model, torch.randn(3, 4))
    assert next(model.numbers) == 0.0


# ----------------------------------------------------------------------------------------------
# inputs and outputs


@dataclass
class Plain:
    """A dataclass."""

    a: Tensor
    more: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class WithSlots:
    """A dataclass with slots."""

    a: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    """A dataclass with slots that cannot be assigned to."""

    a: Tensor


class Batch(UserDict):  # type: ignore[type-arg]
    """As tokenizers return them."""

    @property
    def a(self) -> Tensor:
        """The tensor."""
        return self["a"]


WRAPS: list[Callable[[Tensor], Any]] = [
    Plain,
    WithSlots,
    Frozen,
    lambda a: SimpleNamespace(a=a),
    lambda a: Batch(a=a),
]


@pytest.mark.parametrize(
    "wrap", WRAPS, ids=["dataclass", "slots", "frozen", "namespace", "UserDict"]
)
def test_tensors_in_inputs_and_outputs_are_found(wrap: Callable[[Tensor], Any]) -> None:
    """Wrapped inputs are audited in float64, wrapped outputs have gradients, and the input is
    as it was.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.h = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, batch: Any) -> Any:
            batch.a.add_(1)
            return wrap(self.h(self.norm(self.fc(batch.a))))

    x = torch.randn(6, 8)
    before, given = x.clone(), wrap(x)
    found = wdhook.audit(Net(), given)
    assert found.dtype == "float64"
    assert [found[n].invariant for n in ("fc.weight", "h.weight")] == [True, False]
    assert given.a is x
    assert torch.equal(x, before)


# ---------------------------------------------------------------------------------------------- a
# fresh process


SCRIPT = """
import sys, torch, wdhook
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
if {compiles}:
    model.compile(backend="eager")
    model(torch.randn(2, 4))
wdhook.audit(model, torch.randn(2, 4))
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("compiles", [False, True])
def test_the_first_audit_does_not_import_the_compiler(compiles: bool) -> None:
    """Importing torch._dynamo takes seconds. Twin: where a model was compiled it is there, and
    is seen.
    """
    script = SCRIPT.format(compiles=compiles)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(compiles)]
