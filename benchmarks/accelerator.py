"""`python -m benchmarks.accelerator --out DIR`: whole steps on one CUDA card, in eight minutes.

Needs torch and this checkout alone. Each row trains one network in one way, and compares it with
the optimizer's own decay on the same network: the time of interleaved steps, the kernels that are
launched, and whether a step waits for the device. Writes ``accelerator.json`` and
``accelerator.md``; ends with 1 if a step of wdhook waits where the one with the own decay does not.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import wdhook

from .models import LARGE_NETWORKS, Trained
from .operations import Recorded
from .timing import Variant, side_by_side

λ, LR = 0.05, 1e-3
BUDGET = 7 * 60  # seconds, after which no further case begins
Make = Callable[[Any], torch.optim.Optimizer]
Ways = Mapping[str, Mapping[str, Any]]

COUPLED: Ways = {"coupled, at backward": {"mode": "coupled"}, "coupled, at step": {"at": "step"}}
DECOUPLED: Ways = {
    "decoupled, at backward": {"mode": "decoupled"},
    "decoupled, at step": {"mode": "decoupled", "at": "step"},
    "cautious, at step": {"mode": "decoupled", "at": "step", "cautious": True},
}
DEFERRED: Ways = {
    "deferred, at backward": {"mode": "decoupled"},
    "deferred, at step": {"mode": "decoupled", "at": "step"},
    "rounded, at step": {"mode": "decoupled", "at": "step", "low_precision": "round"},
}


def _sgd(**how: Any) -> Make:
    return lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.0, **how)


def _adamw(**how: Any) -> Make:
    return lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **how)


OPTIMIZERS: dict[str, tuple[Make, Ways, bool]] = {
    "SGD, foreach": (_sgd(foreach=True), COUPLED, False),
    "SGD, fused": (_sgd(fused=True), COUPLED, False),
    "AdamW, foreach": (_adamw(foreach=True), DECOUPLED, False),
    "AdamW, fused": (_adamw(fused=True), DECOUPLED, False),
    "AdamW, foreach, bfloat16 parameters": (_adamw(foreach=True), DEFERRED, True),
    "AdamW, fused, bfloat16 parameters": (_adamw(fused=True), DEFERRED, True),
}
"""Name → the optimizer, the ways to decay in place of its own, bfloat16 parameters."""


@dataclass(frozen=True)
class Row:
    """One way to decay.

    Attributes:
        ratio: lower quartile of the time of a step, over that of the own decay.
        milliseconds: that time.
        spread: distance of the quartiles, relative to the lower one.
        launches: kernels of a step, above those with the own decay; on a CPU, operations.
        waits: a step waits for the device; None where there is none.
    """

    network: str
    optimizer: str
    way: str
    ratio: float
    milliseconds: float
    spread: float
    launches: int
    waits: bool | None


def main() -> int:
    """Measure, write, and tell whether a step waits for the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the two files")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--runs", type=int, default=30, help="interleaved steps of each way")
    parser.add_argument("--quick", action="store_true", help="tiny networks: for its working order")
    options = parser.parse_args()
    begin = time.monotonic()
    rows: list[Row] = []
    left_out: list[str] = []
    runs = 2 if options.quick else options.runs
    for network in LARGE_NETWORKS:
        for optimizer in OPTIMIZERS:
            if time.monotonic() - begin > BUDGET:
                left_out.append(f"{network}, {optimizer}")
                continue
            rows += measure(network, optimizer, options.device, options.quick, runs)
            print(f"{time.monotonic() - begin:4.0f} s  {network}, {optimizer}", flush=True)
    report = {
        "machine": machine(options.device),
        "runs": runs,
        "seconds": round(time.monotonic() - begin),
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accelerator.json").write_text(json.dumps(report, indent=1) + "\n")
    page = "\n".join(written(report)) + "\n"
    (options.out / "accelerator.md").write_text(page)
    print(page)
    waiting = [f"{row.network}, {row.optimizer}, {row.way}" for row in rows if row.waits]
    print(*(f"waits for the device: {name}" for name in waiting), sep="\n", file=sys.stderr)
    return 1 if waiting else 0


def machine(device: torch.device) -> dict[str, str]:
    """What was measured, and where."""
    is_cuda = device.type == "cuda"
    return {
        "wdhook": wdhook.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
    }


def measure(
    network: str, optimizer: str, device: torch.device, quick: bool, runs: int
) -> Iterator[Row]:
    """The rows of one network with one optimizer."""
    make, ways, is_low = OPTIMIZERS[optimizer]
    first = LARGE_NETWORKS[network](device, quick)
    if is_low:
        first = first.to(torch.bfloat16)
        if first.batch.is_floating_point():
            first.batch = first.batch.bfloat16()
    steps = {"own decay": step(first, make(wdhook.param_groups(first, λ)))}
    handles = []
    for name, arguments in ways.items():
        model = copy.deepcopy(first)
        trained_by = make(model.parameters())
        handles.append(wdhook.attach(model, λ, optimizer=trained_by, **arguments))
        steps[name] = step(model, trained_by)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*rounds away")  # one way is to round
            times = side_by_side({name: Variant(run) for name, run in steps.items()}, runs, device)
            launches = {name: count(run, device) for name, run in steps.items()}
            waits = {name: does_wait(run, device) for name, run in steps.items()}
    finally:
        for handle in handles:
            handle.remove()
    own = times["own decay"].lower
    for name, measured in times.items():
        yield Row(
            network,
            optimizer,
            name,
            measured.lower / own,
            1000 * measured.lower,
            measured.spread,
            launches[name] - launches["own decay"],
            None if waits[name] is None else bool(waits[name]) and not waits["own decay"],
        )
    del steps, first
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step(model: Trained, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One whole training step."""

    def work() -> None:
        model.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return work


def count(work: Callable[[], None], device: torch.device) -> int:
    """Kernels that a step launches; on a CPU, operations that it dispatches."""
    if device.type != "cuda":
        with Recorded() as recorded:
            work()
        return recorded.operations
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        work()
        torch.cuda.synchronize()
    return len([event for event in traced.events() if event.device_type.name == "CUDA"])


def does_wait(work: Callable[[], None], device: torch.device) -> bool | None:
    """A step waits for the device; None where there is none."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def written(report: Mapping[str, Any]) -> Iterator[str]:
    """The report in Markdown."""
    yield " · ".join(f"{key} {value}" for key, value in report["machine"].items())
    yield ""
    yield f"{report['runs']} interleaved runs, {report['seconds']} seconds in all."
    yield ""
    yield "| network | optimizer | way | over own decay | ms | spread | launches | waits |"
    yield "|---|---|---|--:|--:|--:|--:|---|"
    for row in report["rows"]:
        waits = "–" if row["waits"] is None else "yes" if row["waits"] else "no"
        yield (
            f"| {row['network']} | {row['optimizer']} | {row['way']} | {row['ratio']:.3f} "
            f"| {row['milliseconds']:.2f} | {row['spread']:.0%} | {row['launches']:+d} | {waits} |"
        )
    for name in report["left_out"]:
        yield f"\nLeft out, for the time: {name}"


if __name__ == "__main__":
    sys.exit(main())
