"""Runs ``wdhook demo``: trains four ways, compares two to the last bit, prints and draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .._plan.decide import plan
from ..plot import norms
from .digits import (
    ARMS,
    BATCH,
    GAMMAS,
    LR,
    MOMENTUM,
    OURS,
    REFERENCE,
    TRAIN,
    WEIGHT_DECAY,
    WEIGHTS,
    Data,
    Run,
    _differences,
    _load,
    _model,
    _train,
)
from .digits_timing import Times, meaning, ratios, time_steps


def demo(seed: int, epochs: int, out: Path) -> int:
    """Train, compare, print, plot.

    Args:
        seed: of weights, batches and the split of the digits.
        epochs: of each training.
        out: the file of the plot; its suffix decides the format.

    Returns:
        0 if wdhook and the optimizer's param groups agree to the last bit, else 1.
    """
    with _one_thread():
        data = _load(seed)
        print(plan(_model(seed), WEIGHT_DECAY), end="\n\n", flush=True)
        runs = {arm.name: _train(arm, data, seed, epochs) for arm in ARMS}
        times = time_steps(data, seed, rounds=epochs)
    _print_table(runs, times, data)
    differences = _differences(runs[REFERENCE.name], runs[OURS.name])
    _print_verdict(differences, runs[OURS.name])
    title = f"λ = {WEIGHT_DECAY:g}, SGD with momentum {MOMENTUM:g}, lr {LR:g} → 0"
    norms({name: run.norms for name, run in runs.items()}, title=title).savefig(out)
    print(f"wrote the norms over training: {out}")
    return 1 if differences else 0


@contextmanager
def _one_thread() -> Iterator[None]:
    # The network is too small to gain from more, and one thread sums in one order everywhere.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print_table(runs: Mapping[str, Run], times: Times, data: Data) -> None:
    """Print accuracy, norms and relative time of each training, with the conditions."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("decay", no_wrap=True)
    for heading in ("test\naccuracy", "norm of\nweights", "norm of\ngammas"):
        table.add_column(heading, justify="right", no_wrap=True)
    # As wide for slow machines as for fast ones: only the times differ from run to run.
    table.add_column("time per step\nover that of (c)", justify="right", no_wrap=True, width=20)
    relative = ratios(times, REFERENCE.name)
    for name, run in runs.items():
        weights, gammas = run.norms[WEIGHTS][-1], run.norms[GAMMAS][-1]
        ratio = "1" if name == REFERENCE.name else str(relative[name] or "–")
        table.add_row(name, f"{run.accuracy:.2%}", f"{weights:.3f}", f"{gammas:.3f}", ratio)
    Console(highlight=False, markup=False, width=80).print(table)
    held_out = len(data.test_labels)
    print(
        f"accuracy: on {held_out} held-out digits after training on {TRAIN}; "
        f"one digit is {1 / held_out:.2%}.\n"
        "norms: L2, over all convolution and linear weights and over all BatchNorm gammas.\n"
        "time per step: zero_grad, forward, backward and step on one thread, in processor time;\n"
        "  the trainings take turns. Median of the ratios within a turn, and its 95 % interval,\n"
        "  which is wide on a busy machine; – means too few turns (fewer than 6 epochs)."
    )
    for line in meaning(times, OURS.name, REFERENCE.name).splitlines():
        print(f"  {line.strip()}")
    print(
        f"λ = {WEIGHT_DECAY:g} per step; SGD with momentum {MOMENTUM:g}, "
        f"cosine schedule from lr {LR:g}, batches of {BATCH}.\n"
    )


def _print_verdict(differences: Sequence[str], ours: Run) -> None:
    """Print whether (c) and (d) are equal to the last bit; differences go to stderr."""
    pair = f"{REFERENCE.name} and {OURS.name}"
    if differences:
        sys.stdout.flush()
        lines = [f"{pair} DIFFER:", *(f"  {words}" for words in differences)]
        print(*lines, sep="\n", file=sys.stderr)
        return
    losses, tensors = len(ours.losses), len(ours.state)
    print(f"{pair} are equal to the last bit:")
    print(
        f"  the loss of each of {losses} steps, "
        f"and all {tensors} parameters and buffers at the end."
    )
