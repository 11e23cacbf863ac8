"""Any optimizer: every one of every package that is installed, in three modes, against decay
written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import Case, Package, cases_of, listed, packages
from catalogue_loops import LR
from catalogue_verdict import MODES, in_mode, run, sees_own_decay, verdict
from make_optimizer_table import PAGE, difference, is_same_version, sections

EVERY = pytest.mark.parametrize("name", packages())
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of the packages; of ours, `catalogue_verdict.quiet` makes errors

FINE = ("exact", "refused: ", "warned of")


def installed(name: str) -> Package:
    package = packages()[name]
    if not package.installed:
        pytest.skip(f"{name} is not installed")
    return package


def failing(name: str, is_right: Callable[[Case], object]) -> list[str]:
    """The cases of a package of which something is not true."""
    installed(name)
    return [str(case) for case in cases_of(name) if not (case.cannot or is_right(case))]


@EVERY
def test_every_mode_is_exact_or_loud(name: str) -> None:
    """Coupled at backward, coupled at step, decoupled at step: the bits of the loop decayed by
    hand, or refused."""
    wrong = failing(name, lambda case: all(mode.startswith(FINE) for mode in verdict(case).modes))
    assert not wrong, {case: verdict(case).modes for case in cases_of(name) if str(case) in wrong}


@EVERY
def test_coupled_in_the_backward_is_never_refused(name: str) -> None:
    """The decay travels in the gradient: whatever reads gradients is decayed.

    PCGrad alone collects gradients of several passes and puts its own in their place: nobody can
    tell how much decay that one holds.
    """
    refused = failing(name, lambda case: not verdict(case).modes[0].startswith("refused"))
    assert refused == (["pytorch_optimizer: PCGrad"] if name == "pytorch_optimizer" else [])


@EVERY
def test_the_own_decay_is_seen(name: str) -> None:
    """Where an optimizer decays by itself, the first step is an error: nothing is decayed twice."""
    assert not failing(name, lambda case: verdict(case).own == "none" or sees_own_decay(case))


@EVERY
def test_adopt_picks_what_the_optimizer_does(name: str) -> None:
    """Where `adopt` picks a mode, the optimizer's own decay has the bits of that mode; else it
    asks."""
    right = ("asks", "nothing to adopt", "no param groups")
    assert not failing(name, lambda case: verdict(case).adopt in (*right, verdict(case).own))


def test_adopt_knows_the_optimizers_of_torch() -> None:
    """All of torch.optim that have a decay of one of our formulas are adopted without being
    asked."""
    known = {
        case.name: verdict(case).adopt
        for case in cases_of("torch")
        if verdict(case).own in ("coupled", "decoupled")
    }
    assert {*known.values()} == {"coupled", "decoupled"}, known


@EVERY
def test_the_table_is_current(name: str) -> None:
    """docs/optimizers.md says what is found here, for the version that it was made with."""
    package = installed(name)
    section = sections(PAGE.read_text())[1][name]
    if not is_same_version(package, section):
        pytest.skip(f"{package.version} is installed, the table was made with another version")
    assert not (found := difference(package, section)), found


def test_every_package_has_a_table() -> None:
    """The page has a section for each package of the catalogue, in its order, and no other."""
    assert list(sections(PAGE.read_text())[1]) == list(packages())


# ------------------------------------------------------------------ the comparisons can fail


def changed(case: Case, mode: str) -> str:
    """The verdict on a case whose attached decay is a tenth too weak."""
    weak = lambda optimizer, mode: {**case.attach(optimizer, mode), "overrides": {"*": 0.09}}  # noqa: E731
    return in_mode(
        Case(case.package, case.name, case.build, case.loop, case.model, attach=weak), mode
    )


def test_a_decay_that_is_not_right_is_not_exact() -> None:
    """Every optimizer of torch tells λ from 0.9·λ, in every mode."""
    verdicts = {
        (case.name, mode): changed(case, mode) for case in cases_of("torch") for mode in MODES
    }
    assert {v.partition(":")[0] for v in verdicts.values()} == {"not equal"}, verdicts


def test_a_new_optimizer_is_found() -> None:
    """A class that the catalogue does not know gets a case; a name that a package no longer has is
    an error."""

    class Newest(torch.optim.SGD):
        pass

    (case,) = listed("torch", {"Newest": Newest}, {})
    assert torch.equal(run(case), run(next(c for c in cases_of("torch") if c.name == "SGD")))
    with pytest.raises(LookupError, match="Oldest"):
        listed("torch", {"Newest": Newest}, {"Oldest": {}})


def test_an_own_decay_that_nobody_sees_fails() -> None:
    """The test of the own decay fails for an optimizer whose number is not in its groups."""

    class Hidden(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad.add_(p, alpha=group["hidden"]), alpha=-group["lr"])

    def build(model: torch.nn.Module, groups: list[dict[str, Any]]) -> Hidden:
        return Hidden(
            [{"params": g["params"], "hidden": g["weight_decay"]} for g in groups], {"lr": LR}
        )

    case = Case("torch", "Hidden", build)
    assert verdict(case).own == "coupled"
    assert not sees_own_decay(case)
