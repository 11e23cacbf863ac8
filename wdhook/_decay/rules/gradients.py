"""Rules about gradients between their decay and the step: replaced, changed, never decayed."""

from __future__ import annotations

from collections.abc import Iterator

from ..._base.problem import Problem
from .base import Facts

AT_STEP = 'Use attach(..., at="step")'


def _of_parameter(facts: Facts, what: str, fix: str) -> Problem:
    return Problem(what, fix, {"parameter": facts.name}, (facts.name,))


def replaced(facts: Facts) -> Iterator[Problem]:
    """Report a gradient replaced between decay and step."""
    yield _of_parameter(
        facts,
        "A gradient was replaced between its decay and the optimizer step, and wdhook adds no "
        "decay to the new one. Right where it is derived from the decayed gradient; one that was "
        "made otherwise is not decayed.",
        f"{AT_STEP}, which decays whatever gradient the step reads",
    )


def ambiguous(facts: Facts) -> Iterator[Problem]:
    """Report a gradient with an unknown number of decays."""
    yield _of_parameter(
        facts,
        "wdhook cannot tell how often the gradient contains the decay of this step: gradients "
        "were moved, replaced or put back between backward passes, and each pass decays the "
        "gradient that it finds.",
        f"{AT_STEP}, which decays once, whatever was done to gradients before; to go on now, "
        "zero_grad() and compute the gradients again",
    )


def changed_between(facts: Facts) -> Iterator[Problem]:
    """Report a gradient changed in place between the backward passes of a step."""
    yield _of_parameter(
        facts,
        "A gradient that holds the decay of this step was changed in place (clipped, scaled) "
        "before another backward pass added to it, and the decay was changed with it.",
        f"{AT_STEP}, which decays after accumulation",
    )


def zeroed_or_changed(facts: Facts) -> Iterator[Problem]:
    """Report a gradient zeroed or scaled in place, without another gradient as evidence."""
    yield _of_parameter(
        facts,
        "A gradient was changed in place between two backward passes without a step, and no other "
        "gradient tells whether it was zeroed (then its decay is gone) or scaled (then it is not).",
        f"Use zero_grad(set_to_none=True), or {AT_STEP[4:]}",
    )


def sums_without_graph(facts: Facts) -> Iterator[Problem]:
    """Report a second gradient under create_graph: either a sum or a new gradient."""
    yield _of_parameter(
        facts,
        "Under backward(create_graph=True) a gradient without a graph came before the optimizer "
        "had stepped. wdhook cannot tell a sum with the one before from a new gradient, and "
        "decays it as a new one.",
        AT_STEP,
    )


def sparse_then_dense(facts: Facts) -> Iterator[Problem]:
    """Report a sparse gradient followed by a dense gradient."""
    yield _of_parameter(
        facts,
        "A parameter got a sparse gradient and then a dense one before the optimizer stepped: "
        "rows of the first are decayed twice, unless it was zeroed in between.",
        AT_STEP,
    )


def second_gradient(facts: Facts) -> Iterator[Problem]:
    """Report a second gradient of a step, after the first has shrunk the parameter."""
    yield _of_parameter(
        facts,
        "A parameter got a second gradient before the optimizer stepped: decoupled decay in the "
        "backward has already changed it, so the micro-batches of this step see different "
        "parameters.",
        f"{AT_STEP} with gradient accumulation",
    )


def stepped_again(facts: Facts) -> Iterator[Problem]:
    """Report a second step with an old gradient, decay included."""
    yield _of_parameter(
        facts,
        "A gradient was stepped again, and its version has not changed since the last decay: it "
        "is taken to contain that decay still. If new values were written without a version (a "
        "CUDA graph, .data, numpy), they are NOT decayed.",
        "Zero gradients after each step, or write them with torch operations. With CUDA graphs: "
        'capture the step with the backward pass, or use attach(..., at="backward"), whose decay '
        "is in the graph",
    )


def replayed_backward(facts: Facts) -> Iterator[Problem]:
    """Report a CUDA gradient changed since the last step without a call of the hook."""
    yield _of_parameter(
        facts,
        "A gradient has changed since the last step, and no backward pass has called its hook: it "
        "is decayed now. If a CUDA graph replays the backward pass, the decay is in the graph "
        "too, and this one is too much.",
        'Capture the step with the backward pass, or use attach(..., at="step")',
    )


def captured_weight_decay(facts: Facts) -> Iterator[Problem]:
    """Find a change of λ after the capture of a CUDA graph."""
    now = facts.state.rate.weight_decay
    if facts.state.captured and facts.value != now:
        yield Problem(
            "λ was changed after a CUDA graph was captured. The graph keeps replaying the old λ.",
            'Capture the graph again; or leave the step out of it, with attach(..., at="step")',
            {"weight_decay": f"{now:g}, now {facts.value:g}"},
        )


def unannounced_steps(facts: Facts) -> Iterator[Problem]:
    """Report moving parameters without an announced optimizer step."""
    yield Problem(
        "Parameters change between backward passes, and no optimizer step was announced by torch's "
        "step hooks: no decay was made. (A loop without torch.optim, an optimizer whose step() is "
        "replaced or never called.)",
        'Use attach(..., at="backward"), or call optimizer.step()',
        {"parameter": facts.name, "at": facts.state.config.at},
        (facts.name,),
    )


def moved_in_the_pass(facts: Facts) -> Iterator[Problem]:
    """Report a parameter updated in the backward pass before the decay."""
    yield _of_parameter(
        facts,
        "A parameter was changed in place during the backward pass, after its gradient had come "
        "and before the decay, which is added when the pass ends: if that was its update, this "
        "decay is lost.",
        "Step in a post-accumulate-grad hook of the parameter (decay then comes first), or with an "
        "optimizer whose step() torch announces",
    )


def schedule_waits(facts: Facts) -> Iterator[Problem]:
    """Report a schedule of λ without an optimizer step to move along."""
    yield Problem(
        "1000 backward passes without an optimizer step: the schedule of λ stays at its beginning.",
        "If the optimizer is no torch.optim.Optimizer, attach with a number, and set "
        "handle.weight_decay = schedule(step) yourself",
        {"weight_decay": f"{facts.state.rate.weight_decay:g}"},
    )


def undecayed(facts: Facts) -> Iterator[Problem]:
    """Report gradients read by a finished step without decay."""
    for param, entry in facts.suspects:
        yield Problem(
            "A step has ended in which a decayed parameter got a gradient that no decay has "
            "reached: step() has made it itself (a line search that calls backward(), a closure "
            "that wdhook cannot see), or has ignored the closure that it was given.",
            'Use attach(..., at="backward"), or pass the closure as step(closure)',
            {
                "parameter": facts.state.describe(entry.name, param),
                "optimizer": facts.optimizer_name,
            },
            (entry.name,),
        )


def lower_precision_gradient(facts: Facts) -> Iterator[Problem]:
    """Find the first gradient of lower precision than its parameter."""
    for _, pairs in facts.owned.all_buckets():
        param, entry = pairs[0]
        grad = param.grad
        if grad is None or grad.dtype.itemsize >= param.dtype.itemsize:
            continue
        yield Problem(
            "A gradient has a lower precision than its parameter, and λ·p is rounded to it.",
            'Use mode="decoupled", which changes the parameter',
            {"parameter": f"{entry.name} {param.dtype}", "gradient": grad.dtype},
            (entry.name,),
        )
        return
