"""accelerate: no class of ours, its wrappers go in and out of `attach` as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import LR, assert_bit_equal, batches, loss_of, own_groups, perceptron, twins, weights, λ

import wdhook

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package's imports
    pytest.importorskip("accelerate", reason="needs accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

KINDS: dict[str, Any] = {"coupled": torch.optim.SGD, "decoupled": torch.optim.AdamW}
MOMENTS = [(mode, at) for mode in KINDS for at in ("backward", "step")]


def accelerator(micro: int, scaled: bool) -> Any:
    """On the CPU; accelerate makes a scaler on GPUs only, so that it is put in its place."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    made = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    if scaled:
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        made.native_amp = True
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"  # so that clipping un-scales
    return made


def play(
    acc: Any,
    model: Any,
    optimizer: Any,
    clip: float | None,
    overflows: tuple[int, ...],
    by_hand: bool,
) -> None:
    """accelerate's documented loop, with decay by hand after the first backward of each step."""
    for i, batch in enumerate(batches(model, 12)):
        with acc.accumulate(model):
            first = next(model.parameters()).grad is None
            acc.backward(loss_of(model, batch) * (float("inf") if i in overflows else 1.0))
            for p in weights(model) if by_hand and first else ():
                p.grad.add_(p.detach(), alpha=λ * (acc.scaler.get_scale() if acc.scaler else 1.0))
            if clip is not None and acc.sync_gradients:
                acc.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.3},
    "accumulated, clipped": {"micro": 3, "clip": 0.3},
    "scaled": {"scaled": True, "overflows": (3, 4)},
    "scaled, accumulated, clipped": {"scaled": True, "overflows": (3,), "micro": 3, "clip": 0.3},
}

CASES = [
    (*moment, loop)
    for moment in MOMENTS
    # Decoupled decay of accumulated or skipped steps needs at="step", as its warning says.
    for loop in (("plain", "clipped") if moment == ("decoupled", "backward") else LOOPS)
]


def compare(
    mode: str,
    at: str,
    order: str,
    *,
    micro: int = 1,
    clip: float | None = None,
    scaled: bool = False,
    overflows: tuple[int, ...] = (),
    off: float = 1.0,
) -> None:
    """Raise unless attached models and a reference without wdhook end with the same parameters."""
    net, twin = twins(perceptron())
    acc = accelerator(micro, scaled)
    optimizer: Any = KINDS[mode](net.parameters(), lr=LR, weight_decay=0)
    arguments = {"mode": mode, "at": at, "scaler": acc.scaler}
    if order == "attach, prepare":
        decay = wdhook.attach(net, λ * off, optimizer=optimizer, **arguments)
        model, prepared = acc.prepare(net, optimizer)
    else:
        model, prepared = acc.prepare(net, optimizer)
        given = prepared if order == "prepare, attach the wrapper" else optimizer
        decay = wdhook.attach(model, λ * off, optimizer=given, **arguments)
    play(acc, model, prepared, clip, overflows, by_hand=False)
    decay.remove()

    by_hand = (mode, at) == ("coupled", "backward")
    theirs = KINDS[mode](own_groups(twin, 0.0 if by_hand else λ), lr=LR)
    acc = accelerator(micro, scaled)
    play(acc, *acc.prepare(twin, theirs), clip, overflows, by_hand)
    assert_bit_equal(net.state_dict(), twin.state_dict())
    assert not torch.equal(net[0].weight, perceptron()[0].weight)


@pytest.mark.parametrize(
    "order", ["attach, prepare", "prepare, attach", "prepare, attach the wrapper"]
)
@pytest.mark.parametrize(("mode", "at", "loop"), CASES)
def test_every_loop(mode: str, at: str, loop: str, order: str) -> None:
    """Before or after `prepare`; `accumulate`, `clip_grad_norm_`, scaler: bit for bit."""
    compare(mode, at, order, **LOOPS[loop])


@pytest.mark.parametrize(("mode", "at"), MOMENTS)
def test_the_comparison_can_fail(mode: str, at: str) -> None:
    """A λ that is wrong by one percent is seen."""
    with pytest.raises(AssertionError, match="differs by up to"):
        compare(mode, at, "attach, prepare", off=1.01)


def test_a_scaler_that_was_not_given() -> None:
    """accelerate's wrapper hides nothing: a scaler that steps is seen."""
    acc, net = accelerator(1, scaled=True), perceptron()
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    with wdhook.attach(model, λ), pytest.raises(wdhook.LossScaleError, match="scaler=scaler"):
        play(acc, model, optimizer, None, (), by_hand=False)


def test_own_decay_behind_the_wrapper() -> None:
    """accelerate's wrapper hides nothing: the inner decay is seen, and can be adopted."""
    net, twin = twins(perceptron())
    acc = accelerator(1, scaled=False)
    model, optimizer = acc.prepare(net, torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=λ))
    with wdhook.attach(model, λ), pytest.raises(wdhook.DoubleDecayError, match="AdamW"):
        play(acc, model, optimizer, None, (), by_hand=False)
    model.zero_grad()
    with wdhook.adopt(model, optimizer, mode="decoupled"):
        play(acc, model, optimizer, None, (), by_hand=False)
    acc = accelerator(1, scaled=False)
    play(
        acc,
        *acc.prepare(twin, torch.optim.AdamW(own_groups(twin, λ), lr=LR)),
        None,
        (),
        by_hand=False,
    )
    assert_bit_equal(net.state_dict(), twin.state_dict())


def test_register_for_checkpointing(tmp_path: Path) -> None:
    """A handle is what accelerate takes for a state: λ comes back with `load_state`."""
    acc, net = accelerator(1, scaled=False), perceptron()
    model, _ = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    with wdhook.attach(model, λ) as decay:
        acc.register_for_checkpointing(decay)
        decay.weight_decay = 3 * λ
        acc.save_state(str(tmp_path))
        decay.weight_decay = 0.9
        acc.load_state(str(tmp_path))
        assert decay.weight_decay == 3 * λ
