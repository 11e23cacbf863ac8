"""``python -m wdhook audit``: one forward and one backward pass of a model, and what it does with its parameters."""

from __future__ import annotations

import argparse
import json

from .._audit.report import advice, audit_rows, headlines
from .._audit.run import audit
from .inputs import parse_inputs
from .plans import print_table
from .shared import FOUND, Commands, add_command
from .targets import TARGETS, build_model, users_code

_DESCRIPTION = f"""\
Run a model once on example inputs and once backward, and print what it does with each parameter: which
operation uses it and as what, whether that agrees with `inspect`, and whether its scale matters at all. The
model is built on the CPU, and nothing is downloaded or written.

{TARGETS}
inputs:
  --input EXPR                 in their order; a literal, or a call of randn, rand, randint, zeros, ones, full,
  --input NAME=EXPR            arange, linspace, eye or tensor, which is parsed and not evaluated

exit status: 0 when no use contradicts the plan, 1 when one does, 2 when it cannot be told.
"""

_EXAMPLES = """\
examples:
  python -m wdhook audit my_file.py:build --input 'randn(2, 3, 224, 224)'
  python -m wdhook audit timm:resnet18 --input 'randn(4, 3, 64, 64)' --eval
  python -m wdhook audit hf:BertModel --kwargs 'num_hidden_layers=2' --input 'input_ids=randint(0, 100, (2, 16))'
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
        UsageError: the target cannot be built, an input is not understood, or the model raised an error.
        ArgumentError: the model cannot be audited.
    """
    args, kwargs = parse_inputs(arguments.input)
    model, _ = build_model(arguments.target, arguments.kwargs)
    if arguments.training is not None:
        model.train(arguments.training)
    with users_code(arguments.target):
        found = audit(model, *args, **kwargs)
    if arguments.json:
        print(
            json.dumps({"schema": "wdhook.audit/1", "target": arguments.target, **found.to_dict()})
        )
    else:
        rows = audit_rows(found)
        print(*headlines(found), sep="\n", end="\n\n")
        print_table(rows, strong=[row[-2].endswith("wrong") for row in rows[1:]])
        for line in advice(found):
            print(line)
    return FOUND if found.contradictions else 0
