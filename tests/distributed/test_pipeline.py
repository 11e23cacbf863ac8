"""Pipeline stages: micro-batches accumulate, and each rank decays its own stages once per step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from processes import Group
from sharded import BOUND, STEPS, WAYS, assert_clean, needs_dtensor, optimizer_of
from torch import Tensor, nn
from twins import assert_bit_equal, assert_close, own_groups, λ

import wdhook

pytestmark = needs_dtensor

MICRO = 4
SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"]


def layers() -> nn.Sequential:
    """One stage each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()) for _ in range(4))
        ).double()


def examples() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(2 * MICRO, 4, generator=generator, dtype=torch.float64)


def mean(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def share(y: Tensor, target: Tensor) -> Tensor:
    """What a micro-batch has in the mean."""
    return mean(y, target) / MICRO


class Pipeline:
    """The stages of this rank, and their schedule."""

    def __init__(self, kind: str, scale_grads: bool = True) -> None:
        from torch.distributed import pipelining
        from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

        schedule = get_schedule_class(kind)
        several = issubclass(schedule, PipelineScheduleMulti)
        model = layers()
        self.names = {id(p): name for name, p in model.named_parameters()}
        parts = list(model) if several else [model[:2], model[2:]]
        mine = range(torch.distributed.get_rank(), len(parts), torch.distributed.get_world_size())
        self.first, self.last = 0 in mine, len(parts) - 1 in mine
        self.modules = nn.ModuleList([parts[i] for i in mine])
        stages = [
            pipelining.PipelineStage(parts[i], i, len(parts), torch.device("cpu")) for i in mine
        ]
        loss = mean if scale_grads else share
        self.schedule = schedule(
            stages if several else stages[0], MICRO, loss_fn=loss, scale_grads=scale_grads
        )

    def train(self, mode: str, weight_decay: float) -> dict[str, Tensor]:
        """The parameters of this rank after training."""
        optimizer = optimizer_of(mode, own_groups(self.modules, weight_decay))
        for batch in examples():
            optimizer.zero_grad()
            target = {"target": torch.ones_like(batch)} if self.last else {}
            self.schedule.step(*([batch] if self.first else []), **target)
            optimizer.step()
        return {self.names[id(p)]: p.detach() for p in self.modules.parameters()}


def alone(mode: str, weight_decay: float) -> dict[str, Tensor]:
    """The parameters of the whole model after training in this process."""
    model = layers()
    optimizer = optimizer_of(mode, own_groups(model, weight_decay))
    for batch in examples():
        optimizer.zero_grad()
        mean(model(batch), torch.ones_like(batch)).backward()
        optimizer.step()
    return model.state_dict()


def _in_stages(kind: str, mode: str, at: str) -> None:
    scale_grads = at == "step"
    mine = Pipeline(kind, scale_grads)
    handle = wdhook.attach(mine.modules, λ, mode=mode, at=at)
    trained = mine.train(mode, 0.0)
    handle.remove()
    assert_clean(mine.modules)
    theirs = Pipeline(kind, scale_grads).train(mode, λ)
    if at == "step":
        assert_bit_equal(trained, theirs)
    assert_close(
        trained, theirs, BOUND
    )  # λ·p is summed before or after the gradients of the other micro-batches
    assert_close(trained, alone(mode, λ), BOUND)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(trained, alone(mode, 0.0), 1e-4)


@pytest.mark.parametrize(("mode", "at"), WAYS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule(kind: str, mode: str, at: str, two: Group) -> None:
    """Each rank attaches to its stages: one decay a step, however many micro-batches; also where a
    schedule computes the gradients of weights by themselves and assigns them."""
    two(_in_stages, kind, mode, at)


def _refused(kind: str) -> str:
    pipeline = Pipeline(kind)
    before = [p.detach().clone() for p in pipeline.modules.parameters()]
    with wdhook.attach(pipeline.modules, λ), pytest.raises(wdhook.LossScaleError) as error:
        pipeline.train("coupled", 0.0)
    assert all(map(torch.equal, pipeline.modules.parameters(), before))
    return str(error.value)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_scaled_gradients_are_refused(kind: str, two: Group) -> None:
    """A schedule that divides gradients when all are there would divide the decay too: an error,
    before the step."""
    for message in two(_refused, kind):
        assert f"Schedule{kind}(scale_grads=True), {MICRO} micro-batches" in message
        assert 'attach(..., at="step")' in message


def _elsewhere() -> None:
    pipeline, model = Pipeline("GPipe"), layers()
    optimizer = optimizer_of("coupled", model.parameters())
    with wdhook.attach(model, λ):
        for batch in examples():
            optimizer.zero_grad()
            mean(model(batch), torch.ones_like(batch)).backward()
            optimizer.step()
    assert pipeline.schedule.scale_grads
    assert_bit_equal(model.state_dict(), alone("coupled", λ))


def test_a_model_that_is_in_no_schedule_is_not_refused(two: Group) -> None:
    """A schedule for other modules of the process is none of our business."""
    two(_elsewhere)
