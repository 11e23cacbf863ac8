"""Measure the effect of decay on weights before a BatchNorm.

    python -m benchmarks.science --json docs/figures/science.json

Three experiments with the demo's network and the scanned digits of scikit-learn; docs/science.md
explains them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import wdhook
from wdhook._commands.digits import Data, _accuracy, _load, _model

BATCH = 64


def main() -> None:
    """Run what is asked for, and write every number that the page quotes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="write all numbers there")
    parser.add_argument(
        "--quick", action="store_true", help="few steps and seeds: for its working order"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    report: dict[str, Any] = {
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
    }
    report["equilibrium"] = equilibrium(*((40, 1) if options.quick else (1000, 3)))
    report["equivalence"] = equivalence(*((10, 1) if options.quick else (200, 2)))
    report["roles"] = roles(*((2, 2) if options.quick else (12, 12)))
    report["seconds"] = round(time.perf_counter() - start)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


def before_batchnorm(model: nn.Module) -> dict[str, Tensor]:
    """The weights on whose scale the demo's network does not depend: all its convolutions."""
    return {
        f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }


def batches(
    data: Data, seed: int, steps: int, noise: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches; a share `noise` of the labels is drawn anew: gradients do not vanish."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(data.labels), (BATCH,), generator=generator)
        wrong = torch.rand(BATCH, generator=generator) < noise
        drawn = torch.randint(10, (BATCH,), generator=generator)
        yield data.images[index], torch.where(wrong, drawn, data.labels[index])


# -- 1. the norm goes where lr, λ and the gradients send it ----------------------------------------


# lr, λ, momentum, factor on the initial weights, seeds. The first four differ in the start alone.
SETTINGS = [
    (0.1, 0.04, 0.0, 1.0, 3),
    (0.1, 0.04, 0.0, 0.5, 1),
    (0.1, 0.04, 0.0, 2.0, 1),
    (0.1, 0.04, 0.0, 4.0, 1),
    (0.1, 0.0, 0.0, 1.0, 3),
    (0.1, 0.02, 0.0, 1.0, 3),
    (0.4, 0.005, 0.0, 1.0, 3),
    (0.01, 0.02, 0.9, 1.0, 3),
]


def equilibrium(steps: int, most: int) -> list[dict[str, Any]]:
    """Norm and rotation of each convolution at constant lr, beside the values of the theory."""
    jobs = [(seed, *setting) for *setting, seeds in SETTINGS for seed in range(min(seeds, most))]
    return [_to_equilibrium(*job, steps) for job in tqdm(jobs, desc="equilibrium", leave=False)]


def _to_equilibrium(
    seed: int, lr: float, λ: float, momentum: float, factor: float, steps: int
) -> dict[str, Any]:
    data, model = _load(seed), _model(seed)
    weights = before_batchnorm(model)
    with torch.no_grad():
        for w in weights.values():
            w.mul_(factor)
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    norms: list[Tensor] = []
    pulls: list[Tensor] = []  # ‖g‖²·‖w‖², which does not depend on the scale of w
    angles: list[Tensor] = []  # between w and the w after it
    with wdhook.attach(model, λ, at="step") if λ else nullcontext():
        for images, labels in batches(data, seed, steps, noise=0.2):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            before = [w.detach().clone() for w in weights.values()]
            gradients = [w.grad.clone() for w in weights.values() if w.grad is not None]
            optimizer.step()
            norms.append(torch.stack([w.norm() for w in before]))
            pulls.append(
                torch.stack(
                    [g.norm() ** 2 * w.norm() ** 2 for g, w in zip(gradients, before, strict=True)]
                )
            )
            angles.append(
                torch.stack([_angle(a, b) for a, b in zip(before, weights.values(), strict=True)])
            )
    tail = slice(steps * 2 // 3, None)
    pull = torch.stack(pulls)[tail].mean(0)
    measured = torch.stack(norms)[tail].square().mean(0).sqrt()
    layers = {}
    for i, name in enumerate(weights):
        layers[name] = {
            "norm": measured[i].item(),
            "predicted": (lr * pull[i].item() / (2 * λ * (1 - momentum))) ** 0.25 if λ else None,
            "angle": torch.stack(angles)[tail].square().mean(0).sqrt()[i].item(),
            "norms": [round(n, 4) for n in torch.stack(norms)[::20, i].tolist()]
            if seed == 0
            else None,
        }
    return {
        "seed": seed,
        "lr": lr,
        "weight_decay": λ,
        "momentum": momentum,
        "factor": factor,
        "predicted_angle": math.sqrt(2 * lr * λ / (1 + momentum)),
        "layers": layers,
    }


def _angle(a: Tensor, b: Tensor) -> Tensor:
    # From the difference of the unit vectors: the arc cosine near 1 has no digits left in float32.
    return 2 * torch.asin((a / a.norm() - b / b.norm()).norm() / 2)


# -- 2. decay is a schedule of the learning rate ---------------------------------------------------


def equivalence(steps: int, seeds: int) -> dict[str, Any]:
    """Largest difference of logits between decay at constant lr and no decay at growing lr.

    In float64.
    """
    lr, λ = 0.1, 0.02
    report: dict[str, Any] = {
        "lr": lr,
        "weight_decay": λ,
        "steps": steps,
        "growth": (1 - lr * λ) ** (1 - 2 * steps),
    }
    for name, exponent in (("same", 2), ("no_schedule", 0)):
        gaps, ratios = zip(
            *(_gap(seed, lr, λ, exponent, steps) for seed in range(seeds)), strict=True
        )
        report[name] = {"logits": max(gaps), "weights": mean(ratios)}
    return report


def _gap(seed: int, lr: float, λ: float, exponent: int, steps: int) -> tuple[float, float]:
    """Largest difference of test logits over the largest; and ‖w without‖ / ‖w with decay‖."""
    data = _load(seed)
    data = data._replace(images=data.images.double(), test_images=data.test_images.double())
    models = [_without_eps(_model(seed).double()) for _ in range(2)]
    kept = 1 - lr * λ
    for model, decays in zip(models, (True, False), strict=True):
        convolutions = list(before_batchnorm(model).values())
        rest = [p for p in model.parameters() if all(p is not w for w in convolutions)]
        optimizer = SGD([{"params": convolutions}, {"params": rest}], lr=lr)
        overrides = {"*": 0.0, nn.Conv2d: True}
        with wdhook.attach(model, λ, overrides=overrides) if decays else nullcontext():
            for step, (images, labels) in enumerate(batches(data, seed, steps)):
                if not decays and exponent:
                    # With w = cᵗ·u, c = 1 − lr·λ and ∇(cᵗ·u) = c⁻ᵗ·∇(u):
                    # u moves at the rate lr·c^−(2t+1).
                    optimizer.param_groups[0]["lr"] = lr * kept ** -(exponent * step + 1)
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()
    with torch.no_grad():
        one, two = (model.train()(data.test_images) for model in models)
    sizes = [
        torch.cat([w.detach().flatten() for w in before_batchnorm(m).values()]).norm().item()
        for m in models
    ]
    return ((one - two).abs().max() / one.abs().max()).item(), sizes[1] / sizes[0]


def _without_eps(model: nn.Module) -> nn.Module:
    """BatchNorm's eps is what keeps the network from being invariant to the last bit."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30
    return model


# -- 3. which roles should be decayed? -------------------------------------------------------------


ARMS: dict[str, dict[Any, Any] | None] = {
    "nothing": None,
    "convolutions": {"*": 0.0, nn.Conv2d: True},
    "last layer": {"*": 0.0, "head.weight": True},
    "weights": {},
    "weights and gains": {"norm": 0.0, "*bn*.weight": True, "*shortcut.1.weight": True},
    "weights and biases": {"bias": True, "*bn*.bias": True, "*shortcut.1.bias": True},
    "everything": {"*": True},
}


def roles(epochs: int, seeds: int) -> dict[str, Any]:
    """Held-out accuracy when other roles are decayed, from few digits, over seeds."""
    few, lr, λ = 200, 0.1, 5e-3
    accuracy: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in tqdm(range(seeds), desc="roles", leave=False):
        data = _load(seed)
        data = data._replace(images=data.images[:few], labels=data.labels[:few])
        for name, overrides in ARMS.items():
            accuracy[name].append(_train(data, seed, lr, λ, overrides, epochs * 1000 // BATCH))
    base = accuracy["weights"]
    report = {
        name: {"accuracy": values, **_against(values, base)} for name, values in accuracy.items()
    }
    return {
        "digits": few,
        "tested": 797,
        "lr": lr,
        "weight_decay": λ,
        "seeds": seeds,
        "arms": report,
    }


def _train(
    data: Data, seed: int, lr: float, λ: float, overrides: dict[Any, Any] | None, steps: int
) -> float:
    model = _model(seed)
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, steps)
    with nullcontext() if overrides is None else wdhook.attach(model, λ, overrides=overrides):
        for images, labels in batches(data, seed, steps):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return _accuracy(model, data)


def _against(values: list[float], base: list[float]) -> dict[str, float]:
    """Mean, and the mean of the paired differences with half a 95 % interval (Student's t)."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    return {
        "mean": mean(values),
        "difference": mean(differences),
        "interval": T_95.get(len(values), math.nan)
        * stdev(differences)
        / math.sqrt(len(differences)),
    }


T_95 = {2: 12.706, 12: 2.201}  # quantile 0.975 of Student's t with n − 1 degrees of freedom


if __name__ == "__main__":
    main()
