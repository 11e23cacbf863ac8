"""``python -m wdhook audit``: runs a model once and prints the use of each of its parameters."""

from __future__ import annotations

import argparse
import json

from .._audit.report import Audit
from .._audit.run import audit
from .._audit.table import advice, audit_rows, headlines
from .._base.terminal import paragraph
from .inputs import parse_inputs
from .shared import FOUND, Commands, UsageError, add_command
from .tables import print_table
from .targets import TARGETS, build_model, users_code

SCHEMA = "wdhook.audit/1"
"""Of the output of ``--json``. Keys are only added under one number."""

_DESCRIPTION = f"""\
Run a model on example inputs, forward and backward, and print the use of each parameter: the
operation that uses it, whether the use agrees with the plan of `inspect`, and whether the scale
of the parameter matters at all. The model is built on the CPU, and nothing is downloaded or
written.

{TARGETS}
inputs:
  --input EXPR                 in their order; a literal, or a call of randn, rand, randint,
  zeros, ones, full, --input NAME=EXPR            arange, linspace, eye or tensor, which is
  parsed and not evaluated

exit status:
  0  no use contradicts the plan; undecided uses do not count
  1  at least one use contradicts the plan
  2  the audit did not run: the target cannot be built, an input is not understood, or the model
  raised an error

With --json, standard output is one object: schema "{SCHEMA}", target, dtype, threshold, eps_share,
training, stopped, overrides, parameters. What the model prints goes to standard error.
"""

_EXAMPLES = """\
examples:
  python -m wdhook audit my_file.py:build --input 'randn(2, 3, 224, 224)'
  python -m wdhook audit timm:resnet18 --kwargs num_classes=9 --input 'randn(4, 3, 64, 64)' --eval
  python -m wdhook audit hf:BertModel --input 'input_ids=randint(0, 100, (2, 16))'
  python -m wdhook audit my_file.py:build --input 'randn(2, 8)' --json | jq '.overrides'
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the parser of the command."""
    parser = add_command(
        commands,
        run,
        name="audit",
        summary="run a model once and print what it really does with each parameter",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("target", metavar="TARGET", help="what to build; see above")
    parser.add_argument(
        "--kwargs", metavar="NAME=VALUE,...", help="arguments of what builds the model; literals"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="EXPR", help="an input; may be given again"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--train", dest="training", action="store_true", default=None, help="in training mode"
    )
    mode.add_argument(
        "--eval",
        dest="training",
        action="store_false",
        help="in evaluation mode (default: as it is)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print Audit.to_dict(), with the target and a schema"
    )


def run(arguments: argparse.Namespace) -> int:
    """Audit a model and print what was found.

    Raises:
        UsageError: the target cannot be built, an input is not understood, or the model raised
            an error.
        ArgumentError: the model cannot be audited.
    """
    args, kwargs = parse_inputs(arguments.input)
    model, _ = build_model(arguments.target, arguments.kwargs)
    if arguments.training is not None:
        model.train(arguments.training)
    try:
        with users_code(arguments.target):
            found = audit(model, *args, **kwargs)
    except UsageError as error:
        if arguments.input:
            raise
        advice = "Give the inputs of the model, for example --input 'randn(2, 3, 224, 224)'"
        raise UsageError(f"{error}\n  {advice}") from error
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "target": arguments.target, **found.to_dict()}))
    else:
        _print(found)
    return FOUND if found.contradictions else 0


def _print(found: Audit) -> None:
    rows = audit_rows(found)
    for text in headlines(found):
        print(*paragraph(text), sep="\n")
    print()
    print_table(rows, strong=[row[-2].endswith("wrong") for row in rows[1:]])
    for line in advice(found):
        print(line)
