"""The trainings of ``wdhook demo``: four ways of decaying, the same digits, weights and batches."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import wdhook

TRAIN, BATCH = 1000, 64
STEPS = TRAIN // BATCH  # per epoch; the incomplete last batch is dropped
LR, MOMENTUM = 0.1, 0.9
WEIGHT_DECAY = 5e-3  # ten times the usual one: the training is that much shorter than usual

WEIGHTS, GAMMAS = "convolution and linear weights", "BatchNorm gammas"

Group = dict[str, Any]
Norms = dict[str, list[float]]


# -- data and model --------------------------------------------------------------------------------


class Data(NamedTuple):
    """1,797 scanned digits, 8×8 pixels each, in a training and a held-out part."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def _load(seed: int) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, train_size=TRAIN, random_state=seed, stratify=labels)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Data(_as_images(train), train_labels, _as_images(test), test_labels)


def _as_images(pixels: Tensor) -> Tensor:
    return pixels.float().div(16).view(-1, 1, 8, 8)


def _batches(data: Data, seed: int, epochs: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the batches of each epoch, in an order set by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(TRAIN, generator=generator)[: STEPS * BATCH]
        yield [(data.images[index], data.labels[index]) for index in order.view(STEPS, BATCH)]


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _model(seed: int) -> nn.Module:
    """Build the network, with weights set by the seed alone; restore random states."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                stem=nn.Conv2d(1, 8, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(8),
                relu=nn.ReLU(),
                block1=Block(8, 8, stride=1),
                block2=Block(8, 16, stride=2),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(16, 10),
            )
        )


# -- the four ways ---------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A way of decaying: the groups of the optimizer, and a context around the training."""

    name: str
    groups: Callable[[nn.Module], list[Group]]
    attached: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext


def _no_decay(model: nn.Module) -> list[Group]:
    return [{"params": list(model.parameters()), "weight_decay": 0.0}]


def _decay_everything(model: nn.Module) -> list[Group]:
    return [{"params": list(model.parameters()), "weight_decay": WEIGHT_DECAY}]


def _by_hand(model: nn.Module) -> list[Group]:
    # The reference: written without wdhook.
    weights = _weights(model)
    ids = {id(weight) for weight in weights}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        {"params": weights, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]


def _attach(model: nn.Module) -> wdhook.WeightDecay:
    return wdhook.attach(model, WEIGHT_DECAY)


REFERENCE = Arm("(c) param groups", _by_hand)
OURS = Arm("(d) wdhook.attach", _no_decay, _attach)
ARMS = (
    Arm("(a) no decay", _no_decay),
    Arm("(b) everything decayed", _decay_everything),
    REFERENCE,
    OURS,
)


def _weights(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _gammas(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


# -- training --------------------------------------------------------------------------------------


@dataclass
class Run:
    """The result of a training."""

    state: dict[str, Tensor]  # every parameter and buffer
    losses: Tensor  # of each step
    norms: Norms  # before training and after each epoch
    accuracy: float


def _train(arm: Arm, data: Data, seed: int, epochs: int) -> Run:
    model = _model(seed)
    optimizer = SGD(arm.groups(model), lr=LR, momentum=MOMENTUM)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * STEPS)
    losses: list[Tensor] = []
    norms: Norms = {WEIGHTS: [], GAMMAS: []}
    _note(norms, model)
    with arm.attached(model):
        for batches in bar(_batches(data, seed, epochs), arm.name, epochs, "epoch"):
            for images, labels in batches:
                losses.append(step(model, optimizer, images, labels))
                schedule.step()
            _note(norms, model)
    return Run(model.state_dict(), torch.stack(losses), norms, _accuracy(model, data))


def step(model: nn.Module, optimizer: SGD, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
    optimizer.step()
    return loss.detach()


def _note(norms: Norms, model: nn.Module) -> None:
    for title, tensors in ((WEIGHTS, _weights(model)), (GAMMAS, _gammas(model))):
        norms[title].append(torch.cat([t.detach().flatten() for t in tensors]).norm().item())


@torch.no_grad()
def _accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    hits: Tensor = model(data.test_images).argmax(dim=1) == data.test_labels
    return hits.float().mean().item()


def bar(items: Iterable[Any], name: str, total: int, unit: str) -> Iterable[Any]:
    """Items with a progress bar on stderr."""
    from tqdm import tqdm

    # stderr is looked up at each call: it may have been replaced since tqdm was imported.
    shown: Iterable[Any] = tqdm(items, desc=f"{name:<27}", total=total, unit=unit, file=sys.stderr)
    return shown


def _differences(one: Run, other: Run) -> list[str]:
    """Name the losses and tensors not equal to the last bit."""
    steps = (one.losses != other.losses).nonzero().flatten().tolist()
    tensors = []
    for name, value in one.state.items():
        if not torch.equal(value, other.state[name]):
            tensors.append(name)
    words = []
    if steps:
        words.append(
            f"the loss of {len(steps)} of {len(one.losses)} steps, first at step {steps[0] + 1}"
        )
    if tensors:
        words.append(
            f"{len(tensors)} of {len(one.state)} parameters and buffers, first {tensors[0]}"
        )
    return words
