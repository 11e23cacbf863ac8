"""``python -m wdhook doctor``: one training step of the user, and what is wrong with its decay."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from .._decay.arguments import MODES, MOMENTS
from .._decay.attach import attach
from .._plan.decide import plan
from .._plan.plan import Plan
from .examination import Examination
from .findings import SEVERITIES, Finding
from .inputs import parse_kwargs
from .plans import add_plan_arguments, overrides_of
from .shared import FOUND, Commands, add_command
from .targets import call, load, users_code
from .training import CONTRACT, Training, training_of

_DESCRIPTION = f"""\
Run one training step of your model and optimizer, and report what is wrong with its weight decay: double
decay, decay of biases and norms, parameters without an optimizer, in two, or without a gradient, decay that
rounds away, a learning rate that cannot be read, a GradScaler that was not given, master weights. What the
step changes is gone when the command ends.

{CONTRACT}
exit status: 0 when nothing is wrong (notes do not count), 1 when something is, 2 when it cannot be told.
"""

_EXAMPLES = """\
examples:
  python -m wdhook doctor train.py:make
  python -m wdhook doctor train.py:make --input 'randn(2, 3, 32, 32)'
  python -m wdhook doctor train.py:make --input 'input_ids=randint(0, 100, (2, 16))'
  python -m wdhook doctor train.py:make --mode decoupled --at step --weight-decay 0.05
  python -m wdhook doctor train.py:make --json | jq '.findings[].kind'
"""

_WIDTH = 120
_SHOWN = 6  # names of parameters in a finding; --json has all


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
        "--input", action="append", default=[], metavar="EXPR", help="of the model, without step"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; docs/command-line.md has its schema"
    )
    attached = parser.add_argument_group(
        "what is attached, where make() has not attached anything itself"
    )
    attached.add_argument(
        "--mode", choices=MODES, help="as in wdhook.attach (default: coupled)"
    )
    attached.add_argument(
        "--at", choices=MOMENTS, default="backward", help="as in wdhook.attach (default: backward)"
    )
    attached.add_argument(
        "--lr", type=float, metavar="LR", help="where it is not the one of the param group"
    )
    add_plan_arguments(attached, weight_decay=1e-4)


def run(arguments: argparse.Namespace) -> int:
    """Run a training step and print what was found.

    Raises:
        UsageError: the target makes no training step, or its code raised an error.
        ArgumentError: an argument of `attach` has no meaning.
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
    examination.run()
    if arguments.json:
        print(json.dumps(_as_json(examination, arguments)))
    else:
        _print(examination)
    return FOUND if any(finding.severity != "note" for finding in examination.findings) else 0


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


def _as_json(examination: Examination, arguments: argparse.Namespace) -> dict[str, Any]:
    training, engines = examination.training, examination.engines
    return {
        "schema": "wdhook.doctor/1",
        "target": arguments.target,
        "model": type(training.model).__name__,
        "optimizers": [type(o).__name__ for o in training.optimizers],
        "steps": sum(examination.seen.steps.values()),
        "tensors": len(examination.names),
        "attached": [
            {"by": "make" if examination.was_attached else "doctor",
             "weight_decay": e.state.rate.weight_decay, "mode": e.state.config.mode,
             "at": e.state.config.at, "decayed_tensors": len(e.plan.decayed)}
            for e in engines
        ],
        "findings": [finding.as_dict() for finding in examination.findings],
    }  # fmt: skip


def _print(examination: Examination) -> None:
    training = examination.training
    kinds = ", ".join(type(o).__name__ for o in training.optimizers)
    steps = sum(examination.seen.steps.values())
    heard = f"{steps} step{'s' * (steps != 1)} heard"
    print(f"{type(training.model).__name__}, {len(examination.names)} tensors; {kinds}, {heard}")
    who = "attached by make()" if examination.was_attached else "attached for this look"
    for engine in examination.engines:
        settings = engine.state.config
        print(f"{who}: {engine.plan!r}, mode={settings.mode!r}, at={settings.at!r}")
    print()
    for finding in examination.findings:
        print(*_lines(finding), sep="\n", end="\n\n")
    counts = [(sum(f.severity == s for f in examination.findings), s) for s in SEVERITIES]
    print(", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts))


def _lines(finding: Finding) -> Iterator[str]:
    yield from wrap(
        f"{finding.severity}: {finding.what}  [{finding.kind}]", _WIDTH, subsequent_indent="  "
    )
    if finding.parameters:
        names, more = finding.parameters[:_SHOWN], len(finding.parameters) - _SHOWN
        rest = f", ... {more} more" if more > 0 else ""
        yield f"  parameters: {len(finding.parameters)}: {', '.join(names)}{rest}"
    for label, value in finding.facts.items():
        yield f"  {label}: {value}"
    yield from wrap(
        finding.do, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False
    )
