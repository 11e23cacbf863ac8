"""`python -m benchmarks.low_precision`: the share of decoupled decay that low precision keeps, by
the stride of writing."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from wdhook._decay.formulas.deferred import stride

UNITS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Kept:
    """What is left of the decay after a run: the share, and the error of single values."""

    share: float
    error: float

    def __str__(self) -> str:
        return f"{self.share:.3f} ({self.error:.4f})"


def kept(dtype: torch.dtype, units: int, amount: float, steps: int, values: str) -> Kept:
    """Decay alone, `steps` times by 1 − amount, written at each distance of `units` from 1.

    Args:
        dtype: of the parameter.
        units: in the last place, of the distance from 1 at which a product is written; 0: at each
            step.
        amount: lr·λ.
        steps: of the run.
        values: ``"normal"`` or ``"uniform"``, times 0.02.

    Returns:
        ``share``: log of the factor on the start, over that of exact arithmetic; ``error``: root
            mean square of the
        relative errors.
    """
    generator = torch.Generator().manual_seed(0)
    if values == "normal":
        p = torch.randn(20_000, generator=generator) * 0.02
    else:
        p = (torch.rand(20_000, generator=generator) + 0.5) * 0.02
    p = p.to(dtype)
    start, product = p.double(), 1.0
    for _ in range(steps):
        product *= 1 - amount
        if 1 - product < units * torch.finfo(dtype).eps:
            continue
        if not units:
            p.mul_(product)
            product = 1.0
            continue
        written = torch.tensor(product, dtype=torch.float64).to(dtype).item()
        p.mul_(written)
        product /= written
    end, exact = p.double() * product, start * (1 - amount) ** steps
    factor = ((start @ end) / (start @ start)).item()
    error = (end / exact - 1).square().mean().sqrt().item()
    return Kept(math.log(factor) / (steps * math.log1p(-amount)), error)


def main() -> None:
    """Print the table of docs/amp.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.low_precision", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs, for its working order")
    steps = 600 if parser.parse_args().quick else 6_000
    table = Table(title=f"share of the decay kept (rms error), {steps} steps")
    for column in ("dtype", "lr·λ", "values", "each step", *(f"{u}·eps" for u in UNITS[1:])):
        table.add_column(column)
    for dtype in (torch.bfloat16, torch.float16):
        for amount in (1e-4, 1e-3):
            for values in ("normal", "uniform"):
                count = max(1, round(steps * 1e-4 / amount))
                cells = [str(kept(dtype, units, amount, count, values)) for units in UNITS]
                name = str(dtype).removeprefix("torch.")
                table.add_row(name, f"{amount:g}", values, *cells)
        taken = stride(dtype) / torch.finfo(dtype).eps
        table.add_row(str(dtype).removeprefix("torch."), "", f"taken: {taken:g}·eps")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
