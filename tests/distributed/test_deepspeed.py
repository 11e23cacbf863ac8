"""DeepSpeed's ZeRO on two processes: to the last bit the engine's own decay, or refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import Group
from zero_runs import Cell, compare, refusal, resumed, undecayed

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed (the extra `engines`)"
)

STAGES = [1, 2, 3]
MODES = ["coupled", "decoupled", "independent"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_zero_decays_as_the_engine_does(two: Group, stage: int, mode: str) -> None:
    """Weights and other parameters share a flat tensor, and only the weights are decayed."""
    [(_, handle), *_] = two(compare, Cell(stage, mode))
    assert f"mode='{mode}', at='step', decayed=3 of 8 tensors, steps=6" in handle


@pytest.mark.parametrize("stage", STAGES)
def test_the_comparison_can_fail(two: Group, stage: int) -> None:
    """Without decay the parameters end elsewhere."""
    assert min(two(undecayed, Cell(stage))) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_with_accumulation_and_clipping(two: Group, stage: int, dtype: str, mode: str) -> None:
    """Decay comes once for three micro-batches, after clipping, on float32 values. Two groups: two
    flat tensors."""
    [(_, handle), *_] = two(compare, Cell(stage, mode, 3, clip=0.05, dtype=dtype, split=True))
    assert "steps=6" in handle


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_with_loss_scaling(two: Group, stage: int, mode: str) -> None:
    """Steps that overflow are skipped, and do not decay."""
    skipped = two(compare, Cell(stage, mode, dtype="fp16", steps=12))
    assert all(0 < count < 12 for count, _ in skipped)
    assert f"steps={12 - skipped[0][0]}" in skipped[0][1]


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_with_offload(two: Group, stage: int, mode: str) -> None:
    """The flat tensors and their gradients stay in the memory of the host."""
    two(compare, Cell(stage, mode, 2, clip=0.05, offload=True, split=True))


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_and_unused_parameters(two: Group, stage: int) -> None:
    """A frozen layer is not decayed. An unused one is, as by the engine: its part of the flat
    gradient is zero."""
    two(compare, Cell(stage, "coupled", frozen=True))
    two(compare, Cell(stage, "decoupled", frozen=True, before=True))


@pytest.mark.parametrize("stage", STAGES)
def test_attached_before_and_to_the_engine(two: Group, stage: int) -> None:
    """Before or after `deepspeed.initialize`, to the model or to the engine around it."""
    two(compare, Cell(stage, "decoupled", 2, before=True))
    two(compare, Cell(stage, "coupled", 2, wrapper=True))


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_was_given(two: Group, stage: int) -> None:
    """The base optimizer, whose groups the engine replaces, or the engine's own around it."""
    for cell in (
        Cell(stage, given="base", before=True, split=True),
        Cell(stage, given="base"),
        Cell(stage, "coupled", given="engine"),
        Cell(stage, given="engine", split=True),
    ):
        [(_, handle), *_] = two(compare, cell)
        assert "steps=6" in handle


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on(two: Group, stage: int, tmp_path: Path) -> None:
    """A schedule of λ, and the largest learning rate, go on from what one rank has saved."""
    [(handle, seen), *_] = two(resumed, Cell(stage, "independent", split=True), str(tmp_path))
    assert "steps=3" in handle
    assert seen == [0.1 / 4, 0.1 / 7]


@pytest.mark.parametrize("stage", STAGES)
def test_decay_in_the_backward_is_refused(two: Group, stage: int) -> None:
    """At `attach`, with the argument that works."""
    for said in two(refusal, Cell(stage, "coupled", at="backward")):
        assert said.startswith("attach: gradient-taken-by-engine: ")
        assert f"DeepSpeed ZeRO-{stage}" in said
        assert 'Use attach(..., at="step")' in said


@pytest.mark.parametrize("stage", STAGES)
def test_decay_in_the_backward_is_refused_when_attached_before(two: Group, stage: int) -> None:
    """In the first backward pass, where the engine did not exist at `attach`."""
    for said in two(refusal, Cell(stage, "coupled", at="backward", before=True)):
        assert said.startswith("training: gradient-taken-by-engine: ")
