"""Megatron-core on two processes: to the last bit the engine's own decay, or refused."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from megatron_runs import Cell, compare, planned, refusal, undecayed
from processes import Group

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason="needs megatron-core (the extra `engines`)"
)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_megatron_decays_as_the_engine_does(
    two: Group, dtype: torch.dtype, sharded: bool, mode: str
) -> None:
    """Three micro-batches for each step; float32 copies, and slices of them, stand for the
    parameters."""
    for clip in (0.0, 0.05):
        for handle in two(compare, Cell(mode, dtype, sharded, clip=clip)):
            assert "steps=5" in handle


def test_the_comparison_can_fail(two: Group) -> None:
    """Without decay the parameters end elsewhere."""
    assert min(two(undecayed, Cell("decoupled"))) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decay_in_the_backward_is_refused(two: Group, dtype: torch.dtype) -> None:
    """At `attach`, with the argument that works."""
    for said in two(refusal, Cell("coupled", dtype, at="backward")):
        assert said.startswith("gradient-taken-by-engine: ")
        assert "Megatron-core" in said
        assert 'Use attach(..., at="step")' in said


def test_the_plan_as_overrides(two: Group) -> None:
    """The lines of docs/distributed.md let Megatron decay what the plan decays."""
    two(planned, Cell("decoupled"))
