"""What happens when an optimizer of the catalogue meets wdhook: runs, compared to the last bit."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from catalogue import Case
from catalogue_loops import AFTER, BEFORE, LR, STEPS, Hand, batches, groups_of, weights, λ
from torch import Tensor, nn

import wdhook

MODES: dict[str, dict[str, Any]] = {
    "coupled at backward": {"mode": "coupled"},
    "coupled at step": {"mode": "coupled", "at": "step"},
    "decoupled": {"mode": "decoupled", "at": "step"},
}
Attach = Callable[[nn.Module, Any], contextlib.AbstractContextManager[Any]]

# Of the effect of the decay: float32 rounds a hundred times less, other formulas differ by more.
CLOSE = 1e-3
SIMILAR = 0.15  # the same formula where the update reads the parameter before or after it


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    modes: tuple[str, ...]  # in the order of MODES
    own: str
    adopt: str
    keeps: float | None  # the share of a shrinkage before the step that is there after it


# ------------------------------------------------------------------ runs


def run(case: Case, mode: str = "none", own: float = 0.0, attach: Attach | None = None) -> Tensor:
    """Train, and return all parameters in one vector.

    Args:
        mode: of the decay by hand.
        own: the optimizer's own weight_decay.
        attach: makes a handle from the model and the optimizer.
    """
    with (
        prepared(case, own) as (model, optimizer, hand),
        attach(model, optimizer) if attach else _NOTHING,
    ):
        hand.mode = mode
        for i, batch in enumerate(batches(STEPS)):
            if i == 3:
                halve_lr(case.groups(optimizer))
            case.loop(model, optimizer, batch, hand)
        return vector(list(model.parameters()))


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def prepared(case: Case, own: float = 0.0) -> Iterator[tuple[nn.Module, Any, Hand]]:
    """Model, optimizer and hand, the same each time."""
    with case.surroundings(), quiet():
        seed()
        model = case.model()
        optimizer = case.build(model, groups_of(model, own))
        hand = Hand(model, "none", case.lr)
        hand.groups = case.groups(optimizer)
        yield model, optimizer, hand


def halve_lr(groups: list[dict[str, Any]]) -> None:
    """As a scheduler would: formulas that differ by the schedule alone would look the same else."""
    for group in groups:
        if isinstance(group.get("lr"), float):
            group["lr"] /= 2


def vector(tensors: list[Any]) -> Tensor:
    return torch.cat([t.detach().flatten().float() for t in tensors])


def seed() -> None:
    """Everything that an optimizer may draw from."""
    torch.manual_seed(0)
    random.seed(0)
    if importlib.util.find_spec("numpy"):
        import numpy as np

        np.random.seed(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Third-party code warns of many things, and prints; of ours, every warning is an error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", wdhook.WdhookWarning)
        if hasattr(torch.compiler, "set_stance"):  # compiling a step takes longer than all steps
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# ------------------------------------------------------------------ verdicts


@functools.cache
def by_hand(case: Case, mode: str) -> Tensor:
    return run(case, mode)


@functools.cache
def verdict(case: Case) -> Verdict:
    """Run a case in all modes."""
    keeps = survival(case)
    return Verdict(
        tuple(in_mode(case, mode) for mode in MODES), own_formula(case), adoption(case), keeps
    )


def attached(case: Case, mode: str) -> Attach:
    return lambda model, optimizer: wdhook.attach(
        model, λ, **MODES[mode], **case.attach(optimizer, mode)
    )


def in_mode(case: Case, mode: str) -> str:
    """ "exact", "refused: ..." or "not equal: ..."."""
    try:
        result = run(case, attach=attached(case, mode))
    except wdhook.WdhookError as error:
        return f"refused: {type(error).__name__}"
    except wdhook.WdhookWarning:
        return "warned of"
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return "refused: by autograd"
        raise
    try:
        expected = by_hand(case, mode)
    except KeyError as missing:
        return f"not equal: decayed, though its param groups have no {missing}"
    if not torch.equal(result, expected):
        return f"not equal: by {(result - expected).abs().max().item():g}"
    return "not equal: no effect" if torch.equal(result, by_hand(case, "none")) else "exact"


def own_formula(case: Case) -> str:
    """What the optimizer's own weight_decay does, told by what it leads to."""
    result, plain = run(case, own=λ), by_hand(case, "none")
    if torch.equal(result, plain):
        return "none"
    effect = (result - plain).norm()
    distances: dict[str, float] = {}
    for mode in ("coupled at step", "decoupled", *BEFORE[1:], *AFTER):
        try:
            expected = by_hand(case, mode)
        except (KeyError, TypeError, RuntimeError):
            continue  # no learning rate in its groups, or autograd refuses
        name = mode.removesuffix(" at step")
        if torch.equal(result, expected):
            return name
        distances[name] = float((result - expected).norm() / effect)
    name, distance = min(distances.items(), key=lambda item: item[1], default=("", 1.0))
    if distance < CLOSE:
        return f"{name}, rounded otherwise"
    return (
        f"about {name}"
        if distance < SIMILAR and name in ("coupled", "decoupled", "decoupled after")
        else "another"
    )


def adoption(case: Case) -> str:
    """The mode that `adopt` picks, or that it asks, or that there is nothing to adopt."""
    with prepared(case, own=λ) as (model, optimizer, _):
        try:
            handle = wdhook.adopt(model, optimizer)
        except wdhook.ArgumentError as error:
            return "asks" if "`mode` cannot be picked" in str(error) else "nothing to adopt"
        except AttributeError:
            return "no param groups"
        handle.remove()
        return (
            handle._mode
            if hasattr(handle, "_mode")
            else repr(handle).split("mode='")[1].split("'")[0]
        )


def survival(case: Case) -> float | None:
    """The part of a shrinkage before the third step that is left after it: 1 if updates add."""
    ends, before = [], None
    for factor in (1.0, 0.9):
        with prepared(case) as (model, optimizer, hand):
            hand.mode = "probe"
            try:
                for i, batch in enumerate(batches(3)):
                    hand.probe = factor if i == 2 else 1.0
                    case.loop(model, optimizer, batch, hand)
            except RuntimeError:
                return None  # autograd refuses
            ends.append(vector(weights(model)))
            before = hand.before
    if before is None:
        return None
    whole = 0.1 * before
    return float((ends[0] - ends[1]) @ whole / (whole @ whole))


def sees_own_decay(case: Case) -> bool:
    """Whether a step of an optimizer that decays is refused."""
    with prepared(case, own=λ) as (model, optimizer, hand):
        try:
            with wdhook.attach(
                model, λ, mode="coupled", **case.attach(optimizer, "coupled at backward")
            ):
                case.loop(model, optimizer, batches(1)[0], hand)
        except wdhook.DoubleDecayError:
            return True
        return False


__all__ = ["LR", "MODES", "Verdict", "own_formula", "run", "sees_own_decay", "verdict"]
