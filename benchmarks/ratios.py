"""Ratios of times: hook, pass at the step and whole steps, against what each replaces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import wdhook
from wdhook._decay import step_listener as _listener

from .models import NETWORKS, Tensors, Trained
from .timing import Times, Variant, side_by_side

λ = 1e-4
LR = 1e-3


@dataclass(frozen=True)
class Case:
    """Something to measure: variants that do the same work."""

    what: str
    against: str
    make: Callable[[torch.device, bool], Work]
    at_most: dict[str, float | None] = field(default_factory=dict)
    """Variant → the largest ratio to the first variant that is accepted; None: stated only."""
    without: str | None = None
    """A variant that does none of the work: the ratio is also given of what comes above it."""
    at_most_above: float | None = None


@dataclass
class Work:
    """Variants, the reference first; what has to be undone, and what has to live as long."""

    variants: dict[str, Variant]
    handles: list[wdhook.WeightDecay]
    models: list[nn.Module]


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    what: str
    against: str
    variant: str
    ratio: float
    at_most: float | None
    microseconds: float
    spread: float


def measure(case: Case, device: torch.device, quick: bool, runs: int) -> Iterator[Result]:
    """Run one case."""
    work = case.make(device, quick)
    try:
        times: dict[str, Times] = side_by_side(work.variants, runs, device)
    finally:
        for handle in work.handles:
            handle.remove()
    yield from compared(case, times)


def compared(case: Case, times: dict[str, Times]) -> Iterator[Result]:
    """The rows of one case: each variant over the first, whole, and above the one without work."""
    reference, *others = times
    for name in others:
        ratio = times[name].lower / times[reference].lower
        yield Result(
            case.what,
            case.against,
            name,
            ratio,
            case.at_most.get(name),
            times[name].lower * 1e6,
            times[name].spread,
        )
    if case.without is None:
        return
    floor = times[case.without].lower
    for name in others:
        if name != case.without:
            above = times[name].lower - floor
            yield Result(
                f"{case.what}, above no hook",
                case.against,
                name,
                above / (times[reference].lower - floor),
                case.at_most_above,
                above * 1e6,
                times[name].spread,
            )


def _add(param: Tensor) -> None:
    """The bare hook."""
    assert param.grad is not None
    param.grad.add_(param, alpha=λ)


def hook_case(count: int, shape: tuple[int, int]) -> Callable[[torch.device, bool], Work]:
    def make(device: torch.device, quick: bool) -> Work:
        size = max(2, count // 20) if quick else count
        bare, ours, none = (Tensors(size, shape, device) for _ in range(3))
        for param in bare.parameters():
            param.register_post_accumulate_grad_hook(_add)
        handle = wdhook.attach(ours, λ)
        variants = {
            "bare hook": _backward(bare),
            "at backward": _backward(ours),
            "no hook": _backward(none),
        }
        return Work(variants, [handle], [bare, ours, none])

    return make


def _backward(model: Tensors) -> Variant:
    """A backward pass; forward, the end of the window and zeroing are not timed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses: list[Tensor] = []

    def before() -> None:
        optimizer.step()
        optimizer.zero_grad()
        losses[:] = [model.loss()]

    return Variant(lambda: losses[0].backward(), before)


def pass_case(
    count: int, shape: tuple[int, int], mode: str
) -> Callable[[torch.device, bool], Work]:
    def make(device: torch.device, quick: bool) -> Work:
        model = Tensors(max(2, count // 20) if quick else count, shape, device)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=LR)
        handle = wdhook.attach(model, λ, mode=mode, at="step")

        def raw() -> None:
            with torch.no_grad():
                trained = [p for p in params if p.grad is not None]
                if mode == "coupled":
                    torch._foreach_add_([p.grad for p in trained], trained, alpha=λ)
                else:
                    torch._foreach_mul_(trained, 1 - LR * λ)

        def ours() -> None:
            _listener._before_step(optimizer, (optimizer,), {})
            _listener._after_step(optimizer, (optimizer,), {})

        def fresh() -> None:
            for param in params:  # as after zero_grad and a backward pass
                param.grad = param.grad.detach()

        return Work(
            {"one foreach call": Variant(raw, fresh), f"{mode} at step": Variant(ours, fresh)},
            [handle],
            [model],
        )

    return make


def cautious_case(count: int, shape: tuple[int, int]) -> Callable[[torch.device, bool], Work]:
    """An update with cautious decay around it, against the paper's formula by foreach calls."""

    def make(device: torch.device, quick: bool) -> Work:
        model = Tensors(max(2, count // 20) if quick else count, shape, device)
        params = list(model.parameters())
        for param in params:
            param.grad = torch.randn_like(param)
        updates = [torch.randn_like(param) for param in params]
        optimizer = torch.optim.SGD(params, lr=LR)
        handle = wdhook.attach(model, λ, mode="decoupled", at="step", cautious=True)

        @torch.no_grad()
        def update() -> None:
            torch._foreach_add_(params, updates, alpha=-LR)

        @torch.no_grad()
        def raw() -> None:
            before = [param.clone() for param in params]
            update()
            agrees = torch._foreach_sub(before, params)
            torch._foreach_mul_(agrees, before)
            decay = torch._foreach_mul(before, [product.ge(0) for product in agrees])
            torch._foreach_sub_(params, decay, alpha=LR * λ)

        def ours() -> None:
            _listener._before_step(optimizer, (optimizer,), {})
            update()
            _listener._after_step(optimizer, (optimizer,), {})

        return Work(
            {"the formula by foreach calls": Variant(raw), "cautious at step": Variant(ours)},
            [handle],
            [model],
        )

    return make


def deferred_case(count: int, shape: tuple[int, int]) -> Callable[[torch.device, bool], Work]:
    """The pass over bfloat16 parameters: every factor written, or collected."""

    def make(device: torch.device, quick: bool) -> Work:
        variants, handles, models = {}, [], []
        for name, how in (("rounded at step", "round"), ("deferred at step", "defer")):
            model = Tensors(max(2, count // 20) if quick else count, shape, device).bfloat16()
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            handles.append(wdhook.attach(model, λ, mode="decoupled", at="step", low_precision=how))
            models.append(model)
            variants[name] = _around(optimizer)
        return Work(variants, handles, models)

    return make


def _around(optimizer: torch.optim.Optimizer) -> Variant:
    """What comes before and after a step of the optimizer."""

    def work() -> None:
        _listener._before_step(optimizer, (optimizer,), {})
        _listener._after_step(optimizer, (optimizer,), {})

    return Variant(work)


def _training(
    optimizer: Callable[..., Any],
    network: str,
    ways: dict[str, dict[str, Any]],
    floors: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Work]:
    """Times whole training steps: the optimizer's own decay, and each of `ways` to attach.

    Args:
        floors: also without any decay, and with the hook that does nothing but `grad.add_`.
        dtype: of the parameters and of the input.
    """

    def make(device: torch.device, quick: bool) -> Work:
        first = NETWORKS[network](device, quick).to(dtype)
        first.batch = first.batch.to(dtype)
        variants = {"own decay": _step(first, optimizer(wdhook.param_groups(first, λ)))}
        handles, models = [], [first]
        for name, arguments in ways.items():
            models.append(model := copy.deepcopy(first))
            handles.append(wdhook.attach(model, λ, **arguments))
            variants[name] = _step(model, optimizer(model.parameters()))
        if floors:
            plain, hooked = copy.deepcopy(first), copy.deepcopy(first)
            for group in wdhook.param_groups(hooked, λ):
                for param in group["params"] if group["weight_decay"] else ():
                    param.register_post_accumulate_grad_hook(_add)
            variants["no decay"] = _step(plain, optimizer(plain.parameters()))
            variants["bare hook"] = _step(hooked, optimizer(hooked.parameters()))
        return Work(variants, handles, models)

    return make


def _step(
    model: Trained, optimizer: torch.optim.Optimizer, extra: Callable[[], Tensor] | None = None
) -> Variant:
    def work() -> None:
        loss = model.loss()
        (loss if extra is None else loss + extra()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(work)


def _peers(device: torch.device, quick: bool) -> Work:
    """What people write instead, on the transformer with SGD."""
    first = NETWORKS["6 transformer layers"](device, quick)

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=LR, momentum=0.9, foreach=True)

    def forum_loop(model: nn.Module) -> Callable[[], None]:
        """The forum's: walk over the modules in each step, between backward and step."""

        def decay() -> None:
            for module in model.modules():
                if not isinstance(module, nn.LayerNorm):
                    for name, param in module.named_parameters(recurse=False):
                        if "bias" not in name and param.grad is not None:
                            param.grad.data.add_(param.data, alpha=λ)

        return decay

    def looped(model: Trained, optimizer: torch.optim.Optimizer) -> Variant:
        decay = forum_loop(model)

        def work() -> None:
            model.loss().backward()
            decay()
            optimizer.step()
            optimizer.zero_grad()

        return Variant(work)

    by_shape, loop, penalty, attached = (copy.deepcopy(first) for _ in range(4))
    # timm's rule: whatever has one dimension or is a bias is not decayed
    matrices = [p for p in by_shape.parameters() if p.ndim > 1]
    others = [p for p in by_shape.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": λ}, {"params": others, "weight_decay": 0.0}]
    handle = wdhook.attach(attached, λ)
    return Work(
        {
            "no decay": _step(first, sgd(first.parameters())),
            "param groups (timm)": _step(by_shape, sgd(groups)),
            "the forum's loop over modules": looped(loop, sgd(loop.parameters())),
            "l2_penalty in the loss": _step(
                penalty, sgd(penalty.parameters()), lambda: wdhook.l2_penalty(penalty, λ)
            ),
            "wdhook, at backward": _step(attached, sgd(attached.parameters())),
        },
        [handle],
        [attached],
    )


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9, foreach=True)


def _adamw(**how: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW; the groups of the own decay bring theirs, everything else has none."""
    return lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **how)


MOMENTS = {"at backward": {}, "at step": {"at": "step"}}
DECOUPLED = {"decoupled at step": {"at": "step", "mode": "decoupled"}}
CAUTIOUS = {"cautious at step": {"at": "step", "mode": "decoupled", "cautious": True}}
DEFERRED = {
    "deferred at step": {"at": "step", "mode": "decoupled"},
    "rounded at step": {"at": "step", "mode": "decoupled", "low_precision": "round"},
}
SMALL, LARGE = (16, 16), (2048, 2048)


def cases() -> Iterator[Case]:
    """Everything that is a ratio of times."""
    yield Case(
        "hook, 500 tensors of 16×16",
        "bare hook",
        hook_case(500, SMALL),
        {"at backward": 1.0},
        without="no hook",
        at_most_above=0.8,
    )
    yield Case(
        "hook, 6 tensors of 16 MiB",
        "bare hook",
        hook_case(6, LARGE),
        {"at backward": 1.05},
        without="no hook",
    )
    for mode in ("coupled", "decoupled"):
        name = f"{mode} at step"
        yield Case(
            "pass, 300 tensors of 16×16",
            "one foreach call",
            pass_case(300, SMALL, mode),
            {name: 2.0},
        )
        yield Case(
            "pass, 8 tensors of 16 MiB", "one foreach call", pass_case(8, LARGE, mode), {name: 1.03}
        )
    for number, shape in ((300, SMALL), (8, LARGE)):
        size = "16 MiB" if shape == LARGE else "16×16"
        yield Case(
            f"update, {number} tensors of {size}",
            "the formula by foreach calls",
            cautious_case(number, shape),
            {"cautious at step": 1.0},
        )
        yield Case(
            f"pass, {number} bfloat16 tensors of {shape[0]}×{shape[1]}",
            "rounded at step",
            deferred_case(number, shape),
            {"deferred at step": None},
        )
    targets = {
        "200 small tensors": (1.02, 0.97),
        "6 transformer layers": (1.00, 1.00),
        "wide MLP": (0.95, 0.95),
    }
    for network, (backward, step) in targets.items():
        at_most = {"at backward": backward, "at step": step}
        yield Case(
            f"SGD step, {network}",
            "own decay",
            _training(_sgd, network, MOMENTS, floors=True),
            at_most,
        )
    for network in NETWORKS:
        make = _training(_adamw(foreach=True), network, DECOUPLED | CAUTIOUS)
        yield Case(f"AdamW step, {network}", "own decay", make, {"decoupled at step": 1.0})
    make = _training(_adamw(foreach=True), "6 transformer layers", DEFERRED, dtype=torch.bfloat16)
    yield Case("bfloat16 AdamW step, 6 transformer layers", "own decay", make)
    for network in NETWORKS:
        make = _training(_adamw(fused=True), network, DECOUPLED)
        yield Case(f"fused AdamW step, {network}", "own decay", make, {"decoupled at step": 1.01})
    yield Case("SGD step, 6 transformer layers", "no decay", _peers)
