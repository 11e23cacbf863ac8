"""DeepSpeed's ZeRO below accelerate and the Hugging Face Trainer, on two processes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import Group
from zero_frameworks import compare_accelerate, compare_trainer
from zero_runs import Cell


def _lacks(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@_lacks("deepspeed", "accelerate")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accelerate(two: Group, stage: int) -> None:
    """accelerate's plugin, its wrapper given or not: the decay of the engine with
    `param_groups`."""
    two(compare_accelerate, Cell(stage, micro=3))


@_lacks("deepspeed", "transformers")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_trainer(two: Group, stage: int, tmp_path: Path) -> None:
    """The callback at the step is the Trainer's own decay; in the backward it is refused, with
    advice that works."""
    for said in two(compare_trainer, Cell(stage, micro=2), str(tmp_path)):
        assert f"ZeRO-{stage}" in said
        assert 'Use attach(..., at="step")' in said
