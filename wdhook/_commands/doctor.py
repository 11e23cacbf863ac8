"""``wdhook doctor``: runs one training step of the user and reports mistakes in its decay."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from textwrap import indent
from typing import Any

from .._base.terminal import folded_lines, paragraph
from .._decay.arguments import MODES, MOMENTS
from .._decay.attach import attach
from .._plan.decide import plan
from .._plan.plan import Plan
from .examination import Examination
from .findings import SEVERITIES, Finding
from .forecast import Forecast
from .inputs import parse_kwargs
from .plans import add_plan_arguments, overrides_of
from .shared import FOUND, Commands, add_command, braced, counted, one_of, whole
from .tables import CYAN, RED, YELLOW, painted
from .targets import call, load, users_code
from .training import CONTRACT, Training, training_of

_DESCRIPTION = f"""\
Run one training step of your model and optimizer, and report what is wrong with its weight decay:
double decay; decay of biases and norms; parameters without an optimizer, in two, or without a
gradient; decay that rounds away; an unreadable learning rate; a GradScaler that attach was not
given; master weights. All changes of the step are gone when the command ends.

{CONTRACT}
exit status: 0 when nothing is wrong (notes do not count), 1 when something is, 2 when the step
cannot be run.
"""

_EXAMPLES = """\
examples:
  python -m wdhook doctor train.py:make
  python -m wdhook doctor train.py:make --input 'randn(2, 3, 32, 32)'
  python -m wdhook doctor train.py:make --input 'input_ids=randint(0, 100, (2, 16))'
  python -m wdhook doctor train.py:make --mode decoupled --at step --weight-decay 0.05
  python -m wdhook doctor train.py:make --steps 3000
  python -m wdhook doctor train.py:make --json | jq '.findings[].kind'
"""

_SHOWN = 6  # names of parameters in a finding; --json has all
_COLOURS = {"error": RED, "warning": YELLOW, "note": CYAN}


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the parser of the command."""
    parser = add_command(
        commands,
        run,
        name="doctor",
        summary="run one training step and report what is wrong with its decay",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("target", metavar="TARGET", help="my_file.py:make or package.module:make")
    parser.add_argument("--kwargs", metavar="NAME=VALUE,...", help="arguments of make; literals")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="EXPR",
        help="an input of the model, where make() returns no step",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; docs/command-line.md has its schema"
    )
    parser.add_argument(
        "--steps",
        type=whole,
        metavar="N",
        help="say the dose of a run of N optimizer steps: how much of a weight its decay leaves",
    )
    parser.add_argument(
        "--scheduler-every",
        type=whole,
        default=1,
        metavar="K",
        help="with --steps: optimizer steps for each step of the LR scheduler (default: 1)",
    )
    attached = parser.add_argument_group("the decay to attach, unless make() attaches its own")
    attached.add_argument(
        "--mode",
        type=one_of(MODES),
        metavar=braced(MODES),
        help="as in wdhook.attach (default: coupled)",
    )
    attached.add_argument(
        "--at",
        type=one_of(MOMENTS),
        metavar=braced(MOMENTS),
        default="backward",
        help="as in wdhook.attach (default: backward)",
    )
    attached.add_argument(
        "--lr", type=float, metavar="LR", help="where the param group does not hold the one in use"
    )
    add_plan_arguments(attached, weight_decay=1e-4)


def run(arguments: argparse.Namespace) -> int:
    """Run a training step and print the findings.

    Raises:
        UsageError: the target makes no training step, or its code raised an error.
        ArgumentError: an argument of `attach` has no meaning, or an override matches nothing.
    """
    made = load(arguments.target)
    with users_code(arguments.target):
        made = call(made, arguments.target, parse_kwargs(arguments.kwargs))
    training = training_of(made, arguments.target, arguments.input)
    examination = Examination(
        training,
        lambda: _attach(training, arguments),
        lambda: _plan(training, arguments),
        arguments.mode,
        arguments.at,
    )
    forecast = None
    if arguments.steps is not None:
        forecast = Forecast(training, arguments.steps, arguments.scheduler_every)
    examination.run(lambda: _look_ahead(examination, forecast))
    if arguments.json:
        print(json.dumps(_as_json(examination, forecast, arguments)))
    else:
        _print(examination, forecast)
    return FOUND if any(finding.severity != "note" for finding in examination.findings) else 0


def _look_ahead(examination: Examination, forecast: Forecast | None) -> None:
    """Let the forecast look at the decay of the training step."""
    if forecast is not None:
        with users_code("the schedule of the run"):
            forecast.look(examination.engines)
        examination.findings += forecast.findings()


def _plan(training: Training, arguments: argparse.Namespace) -> Plan:
    return plan(
        training.model,
        arguments.weight_decay,
        overrides=overrides_of(arguments),
        recipe=arguments.recipe,
    )


def _attach(training: Training, arguments: argparse.Namespace) -> Any:
    return attach(
        training.model,
        arguments.weight_decay,
        mode=arguments.mode,
        at=arguments.at,
        optimizer=training.optimizers,
        lr=arguments.lr,
        scaler=training.scaler,
        overrides=overrides_of(arguments),
        recipe=arguments.recipe,
    )


def _as_json(
    examination: Examination,
    forecast: Forecast | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    training = examination.training
    attached = []
    for engine in examination.engines:
        attached.append(
            {
                "by": "make" if examination.was_attached else "doctor",
                "weight_decay": engine.state.rate.weight_decay,
                "mode": engine.state.config.mode,
                "at": engine.state.config.at,
                "decayed_tensors": len(engine.plan.decayed),
            }
        )
    return {
        "schema": "wdhook.doctor/1",
        "target": arguments.target,
        "model": type(training.model).__name__,
        "optimizers": [type(o).__name__ for o in training.optimizers],
        "steps": sum(examination.seen.steps.values()),
        "tensors": len(examination.names),
        "attached": attached,
        "dose": None if forecast is None else forecast.as_dict(),
        "findings": [one.as_dict() for one in examination.findings],
    }


def _print(examination: Examination, forecast: Forecast | None) -> None:
    training = examination.training
    kinds = ", ".join(type(o).__name__ for o in training.optimizers)
    tensors = counted(len(examination.names), "tensor")
    steps = counted(sum(examination.seen.steps.values()), "step")
    print(f"{type(training.model).__name__}, {tensors}; {kinds}, {steps} seen")
    by = "attached by make()" if examination.was_attached else "attached by the doctor for this run"
    for engine in examination.engines:
        settings = engine.state.config
        line = f"{by}: {engine.plan!r}, mode={settings.mode!r}, at={settings.at!r}"
        print(*paragraph(line, later="  "), sep="\n")
    if all(finding.severity == "note" for finding in examination.findings):
        for check in examination.checks:
            print(*paragraph(check.sentence, later="  "), sep="\n")
    if forecast is not None:
        _print_forecast(forecast)
    print()
    for one in examination.findings:
        print(*_lines(one), sep="\n", end="\n\n")
    counts = []
    for severity in SEVERITIES:
        number = sum(one.severity == severity for one in examination.findings)
        text = counted(number, severity)
        counts.append(painted(text, _COLOURS[severity]) if number else text)
    print(", ".join(counts))


def _print_forecast(forecast: Forecast) -> None:
    heading, *lines = forecast.lines()
    print(*paragraph(heading, later="  "), sep="\n")
    for line in lines:
        print(*paragraph(line, indent="  ", later="    "), sep="\n")


def _lines(finding: Finding) -> Iterator[str]:
    first, *rest = paragraph(f"{finding.severity}: {finding.what}  [{finding.kind}]", later="  ")
    severity, colon, what = first.partition(":")
    yield painted(severity, _COLOURS[finding.severity]) + colon + what
    yield from rest
    if finding.parameters:
        names = ", ".join(finding.parameters[:_SHOWN])
        more = len(finding.parameters) - _SHOWN
        if more > 0:
            names += f", ... {more} more"
        yield from paragraph(
            f"parameters: {len(finding.parameters)}: {names}", indent="  ", later="    "
        )
    for label, value in finding.facts.items():
        yield from paragraph(f"{label}: {value}", indent="  ", later="    ")
    yield from folded_lines(indent(finding.do, "  "))
