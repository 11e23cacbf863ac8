"""``python -m wdhook demo``: four ways of decaying, the same digits, weights and batches."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
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
WARM_UP, TIMED, MAX_ROUNDS = 2, 5, 10

WEIGHTS, GAMMAS = "convolution and linear weights", "BatchNorm gammas"

Group = dict[str, Any]
Norms = dict[str, list[float]]


def demo(seed: int, epochs: int, out: Path) -> int:
    """Train, compare, print, plot.

    Args:
        seed: of weights, batches and the split of the digits.
        epochs: of each training.
        out: where the plot goes.

    Returns:
        0 if wdhook and the optimizer's param groups agree to the last bit, else 1.
    """
    from ..plot import norms

    with _one_thread():
        data = _load(seed)
        print(wdhook.plan(_model(seed), WEIGHT_DECAY), end="\n\n", flush=True)
        runs = {arm.name: _train(arm, data, seed, epochs) for arm in ARMS}
        times = _time_steps(data, seed, rounds=min(epochs, MAX_ROUNDS))
    _print_table(runs, times, data)
    differences = _differences(runs[REFERENCE.name], runs[OURS.name])
    _print_verdict(differences, runs[OURS.name])
    norms({name: run.norms for name, run in runs.items()}).savefig(out)
    print(f"norms over training: {out}")
    return 1 if differences else 0


@contextmanager
def _one_thread() -> Iterator[None]:
    # The network is too small to gain from more; and sums in one order on every machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- data and model ---------------------------------------------------------------------------------------------


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
    """The batches of each epoch, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(TRAIN, generator=generator)[: STEPS * BATCH]
        yield [(data.images[index], data.labels[index]) for index in order.view(STEPS, BATCH)]


class Block(nn.Module):
    """Two convolutions and a way around them."""

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
    """The network, with weights that depend on the seed alone; the caller's random numbers stay as they are."""
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


# -- the four ways ----------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """One way of decaying: the groups that the optimizer gets, and what is attached while it trains."""

    name: str
    groups: Callable[[nn.Module], list[Group]]
    attached: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext


def _no_decay(model: nn.Module) -> list[Group]:
    return [{"params": list(model.parameters()), "weight_decay": 0.0}]


def _decay_everything(model: nn.Module) -> list[Group]:
    return [{"params": list(model.parameters()), "weight_decay": WEIGHT_DECAY}]


def _by_hand(model: nn.Module) -> list[Group]:
    # Without wdhook, so that it is a reference: what it decides is not used here.
    weights = _weights(model)
    rest = [p for p in model.parameters() if not any(p is weight for weight in weights)]
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


# -- training ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is left of a training."""

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
        for batches in _bar(_batches(data, seed, epochs), arm.name, epochs, "epoch"):
            for images, labels in batches:
                losses.append(_step(model, optimizer, images, labels))
                schedule.step()
            _note(norms, model)
    return Run(model.state_dict(), torch.stack(losses), norms, _accuracy(model, data))


def _step(model: nn.Module, optimizer: SGD, images: Tensor, labels: Tensor) -> Tensor:
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


def _time_steps(data: Data, seed: int, rounds: int) -> dict[str, list[float]]:
    """Quartiles of the time of a step in milliseconds.

    The arms take turns, so that a busy machine slows all of them. wdhook is attached in its own turns only:
    while it is, it hears the steps of every optimizer.
    """
    (batches,) = _batches(data, seed, epochs=1)
    models = [_model(seed) for _ in ARMS]
    optimizers = [
        SGD(arm.groups(model), lr=LR, momentum=MOMENTUM)
        for arm, model in zip(ARMS, models, strict=True)
    ]
    seconds: list[list[float]] = [[] for _ in ARMS]
    for turn in _bar(range(rounds), "time per step, taking turns", rounds, "round"):
        for i in range(len(ARMS)):
            i = (i + turn) % len(ARMS)  # nobody is always first
            with ARMS[i].attached(models[i]):
                laps = [
                    _lap(models[i], optimizers[i], *batch) for batch in batches[: WARM_UP + TIMED]
                ]
            seconds[i] += laps[WARM_UP:]
    return {
        arm.name: [1e3 * q for q in quantiles(mine)]
        for arm, mine in zip(ARMS, seconds, strict=True)
    }


def _lap(model: nn.Module, optimizer: SGD, images: Tensor, labels: Tensor) -> float:
    start = time.perf_counter()
    _step(model, optimizer, images, labels)
    return time.perf_counter() - start


def _bar(items: Iterable[Any], name: str, total: int, unit: str) -> Iterable[Any]:
    from tqdm import tqdm

    # Handed over at each call: the stream may have been replaced since tqdm was imported.
    bar: Iterable[Any] = tqdm(items, desc=f"{name:<27}", total=total, unit=unit, file=sys.stderr)
    return bar


# -- report -----------------------------------------------------------------------------------------------------


def _differences(one: Run, other: Run) -> list[str]:
    """What is not equal to the last bit, in words."""
    tensors = [
        name for name, value in one.state.items() if not torch.equal(value, other.state[name])
    ]
    steps = (one.losses != other.losses).nonzero().flatten().tolist()
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


def _print_table(runs: dict[str, Run], times: dict[str, list[float]], data: Data) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("decay", no_wrap=True)
    for heading in ("test\naccuracy", "norm of\nweights", "norm of\ngammas"):
        table.add_column(heading, justify="right", no_wrap=True)
    # As wide for slow machines as for fast ones: only the times differ from run to run.
    table.add_column("ms per step\n(quartiles)", justify="right", no_wrap=True, width=20)
    for name, run in runs.items():
        weights, gammas = (run.norms[title][-1] for title in (WEIGHTS, GAMMAS))
        low, middle, high = times[name]
        time_per_step = f"{middle:.1f} ({low:.1f}–{high:.1f})"
        table.add_row(name, f"{run.accuracy:.2%}", f"{weights:.3f}", f"{gammas:.3f}", time_per_step)
    Console(highlight=False, markup=False, width=80).print(table)
    print(
        f"accuracy: on {len(data.test_labels)} held-out digits after training on {TRAIN}; "
        f"one digit is {1 / len(data.test_labels):.2%}.\n"
        "norms: L2, over all convolution and linear weights and over all BatchNorm gammas.\n"
        "ms per step: zero_grad, forward, backward and optimizer step on one thread, median\n"
        f"  (and quartiles) of {len(ARMS)} trainings that take turns after their warm-up.\n"
        f"λ = {WEIGHT_DECAY:g} per step; SGD with momentum {MOMENTUM:g}, "
        f"cosine schedule from lr {LR:g}, batches of {BATCH}.\n"
    )


def _print_verdict(differences: list[str], ours: Run) -> None:
    pair = f"{REFERENCE.name} and {OURS.name}"
    if differences:
        sys.stdout.flush()
        print(
            f"{pair} DIFFER:", *(f"  {words}" for words in differences), sep="\n", file=sys.stderr
        )
    else:
        losses, tensors = len(ours.losses), len(ours.state)
        print(f"{pair} are equal to the last bit:")
        print(
            f"  the loss of each of {losses} steps, and all {tensors} parameters and buffers at the end."
        )
