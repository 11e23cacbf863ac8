"""`python -m benchmarks`: measure, and remake docs/performance.md with its numbers and its figure.

With `--quick`, `--only`, or on another device than the CPU nothing is written, unless `--docs`
names a folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import runpy
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import wdhook

from .growth import growth
from .page import filled
from .ratios import Result, cases, measure
from .totals import Total, totals

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Parse the arguments and run what they ask for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, 3 runs: for its working order"
    )
    parser.add_argument(
        "--runs", type=int, default=30, help="interleaved runs of each case (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="of torch, in turn (default: 1 2)"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--docs", type=Path, help="folder with performance.md and figures/")
    options = parser.parse_args()
    begin = time.monotonic()
    runs = 3 if options.quick else options.runs
    report: dict[str, Any] = {"machine": _machine(options.device), "runs": runs, "threads": {}}
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(" · ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for threads in options.threads:
        torch.set_num_threads(threads)
        chosen = [case for case in cases() if options.only in case.what]
        progress = tqdm(chosen, desc=f"{threads} thread(s)", leave=False)
        results = [
            r for case in progress for r in measure(case, options.device, options.quick, runs)
        ]
        report["threads"][threads] = [asdict(result) for result in results]
        console.print(
            _ratios(results, f"{threads} thread(s), lower quartile of {runs} interleaved runs")
        )
    torch.set_num_threads(1)
    numbers = [
        total for total in totals(options.device, options.quick) if options.only in total.what
    ]
    report["totals"] = [asdict(number) for number in numbers]
    console.print(_totals(numbers))
    is_whole = not (options.quick or options.only) and options.device.type == "cpu"
    docs = options.docs or (DOCS if is_whole else None)
    if docs is not None:
        points = tqdm(growth(options.device, options.quick), desc="growth", leave=False)
        _write(docs, report, [asdict(point) for point in points])
    console.print(f"{time.monotonic() - begin:.0f} seconds")


def _write(docs: Path, report: dict[str, Any], points: list[dict[str, Any]]) -> None:
    """The numbers, the points, the picture of them (one for telephones too), and the page."""
    figures = docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    # As it is read again: keys are strings.
    text = json.dumps(report, indent=1) + "\n"
    (figures / "performance.json").write_text(text)
    (figures / "growth.json").write_text(json.dumps(points, indent=1) + "\n")
    drawing = runpy.run_path(str(DOCS / "figures" / "draw.py"))
    for width, folder in (("WIDE", figures), ("NARROW", docs / "_static" / "figures")):
        folder.mkdir(parents=True, exist_ok=True)
        drawing["save"](drawing["growth"](points, drawing[width]), folder / "growth.svg")
    page = (DOCS / "performance.md").read_text()
    (docs / "performance.md").write_text(filled(page, json.loads(text)))


def _machine(device: torch.device) -> dict[str, str]:
    return {
        "wdhook": wdhook.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
    }


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores" if named else platform.machine()


def _ratios(results: list[Result], title: str) -> Table:
    table = Table("what", "way", "against", "ratio", "at most", "µs", "spread", title=title)
    for r in results:
        target = "–" if r.at_most is None else f"{r.at_most:.2f}"
        row = (
            r.what,
            r.variant,
            r.against,
            f"{r.ratio:.2f}",
            target,
            f"{r.microseconds:,.0f}",
            f"{r.spread:.0%}",
        )
        table.add_row(*row, style=_style(r.ratio, r.at_most))
    return table


def _totals(numbers: list[Total]) -> Table:
    table = Table("what", "value", "at most", "unit")
    for n in numbers:
        target = "–" if n.at_most is None else f"{n.at_most:g}"
        table.add_row(n.what, f"{n.value:.3g}", target, n.unit, style=_style(n.value, n.at_most))
    return table


def _style(value: float, at_most: float | None) -> str:
    return "yellow" if at_most is not None and value > at_most else ""


if __name__ == "__main__":
    main()
