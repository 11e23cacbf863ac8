"""``python -m wdhook inspect``: the plan of a model, which is built without memory for its parameters."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import plot
from .._plan.decide import plan
from .._plan.decision import Decision
from .._plan.plan import Plan
from .._plan.recipes import RECIPES
from .._plan.table import diff_rows, diff_table, headline, plan_rows, totals
from .plans import add_plan_arguments, as_dict, diff_as_dict, overrides_of, print_table, sums
from .shared import FOUND, PROGRAM, Commands, add_command, png, require
from .targets import TARGETS, build_model

_DESCRIPTION = f"""\
Print which parameters of a model would be decayed, and why. The model is built on the meta device, where
parameters have shapes and no memory: seven billion of them are no more work than seven thousand.

{TARGETS}
exit status: 0; with --diff 0 when both decide alike and 1 when not; 2 when it cannot be told.
"""

_EXAMPLES = """\
examples:
  python -m wdhook inspect torchvision.models:resnet50
  python -m wdhook inspect timm:vit_base_patch16_224 --kwargs 'num_classes=10'
  python -m wdhook inspect hf:BertConfig --only guessed
  python -m wdhook inspect my_file.py:build_model --override 'layer4.*=0' --override norm=true
  python -m wdhook inspect torchvision.models:resnet50 --diff timm
  python -m wdhook inspect hf:LlamaConfig --summary --plot plan.png
  python -m wdhook inspect my_file.py:build_model --json | jq '.parameters[] | select(.guess).name'
"""

_ONLY = ("decayed", "exempt", "guessed")


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the parser of the command."""
    parser = add_command(
        commands,
        run,
        name="inspect",
        summary="print which parameters of a model would be decayed, and why",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("target", metavar="TARGET", help="what to build; see above")
    parser.add_argument(
        "--kwargs", metavar="NAME=VALUE,...", help="arguments of what builds the model; literals"
    )
    add_plan_arguments(parser, weight_decay=1e-4)
    parser.add_argument(
        "--diff",
        choices=list(RECIPES),
        metavar="NAME",
        help="show what this recipe decides otherwise",
    )
    parser.add_argument(
        "--only", choices=_ONLY, help="show these parameters; the totals are of all"
    )
    parser.add_argument("--summary", action="store_true", help="show the totals alone")
    parser.add_argument(
        "--plot", type=png, metavar="PNG", help="draw the plan too, with wdhook.plot.plan"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; docs/command-line.md has its schema"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, or its difference.

    Raises:
        UsageError: the target cannot be built, or --plot lacks matplotlib.
        ArgumentError: an override matches nothing.
    """
    model, why = build_model(arguments.target, arguments.kwargs, meta=True)
    if why is not None:
        print(
            f"{PROGRAM} inspect: built on the CPU, as it cannot be built on the meta device: {why}",
            file=sys.stderr,
        )
    made = plan(
        model, arguments.weight_decay, overrides=overrides_of(arguments), recipe=arguments.recipe
    )
    if arguments.plot is not None:
        require("--plot", ["matplotlib"])
        plot.plan(made).savefig(arguments.plot)
    diff = None
    if arguments.diff is not None:
        diff = made.diff(plan(model, arguments.weight_decay, recipe=arguments.diff))
    if arguments.json:
        print(
            json.dumps(
                _as_json(
                    made, arguments, None if diff is None else diff_as_dict(diff, arguments.diff)
                )
            )
        )
    elif diff is None:
        _print_plan(made, arguments)
    elif arguments.summary or not diff:
        print(diff_table(diff).partition("\n")[0])
    else:
        print(diff_table(diff).partition("\n")[0], end="\n\n")
        print_table(diff_rows(diff))
    return FOUND if diff else 0


def _shown(made: Plan, only: str | None) -> list[Decision]:
    if only == "guessed":
        return [d for d in made.values() if d.guess]
    part = {"decayed": made.decayed, "exempt": made.exempt}.get(only or "", made)
    return list(part.values())


def _print_plan(made: Plan, arguments: argparse.Namespace) -> None:
    everything, shown = list(made.values()), _shown(made, arguments.only)
    print(headline(made.weight_decay, everything), end="\n\n")
    if shown and not arguments.summary:
        rows = plan_rows(shown)
        print_table(rows, strong=[row[-1].startswith("guess") for row in rows[1:]])
        print()
    elif arguments.only and not arguments.summary:
        print(f"no parameter is {arguments.only}", end="\n\n")
    print_table(totals(everything), right=range(1, 5))


def _as_json(
    made: Plan, arguments: argparse.Namespace, diff: dict[str, Any] | None
) -> dict[str, Any]:
    everything = list(made.values())
    roles = dict.fromkeys(d.role for d in everything)
    found: dict[str, Any] = {
        "schema": "wdhook.inspect/1",
        "target": arguments.target,
        "weight_decay": made.weight_decay,
        "recipe": arguments.recipe,
        "totals": sums(everything),
        "roles": {str(role): sums([d for d in everything if d.role is role]) for role in roles},
    }
    if not arguments.summary:
        found["parameters"] = [as_dict(d) for d in _shown(made, arguments.only)]
    return found if diff is None else {**found, "diff": diff}
