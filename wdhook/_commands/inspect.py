"""``wdhook inspect``: the plan of a model, built without memory for parameters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from .. import plot
from .._audit.report import Audit
from .._audit.run import audit
from .._base.terminal import paragraph
from .._base.text import Row, fold_by
from .._plan.decide import plan
from .._plan.decision import Decision
from .._plan.plan import Plan, PlanDiff
from .._plan.recipes import RECIPES
from .._plan.table import diff_headline, diff_rows, fold, headline, plan_rows, totals
from .inputs import parse_inputs
from .plans import add_plan_arguments, as_dict, diff_as_dict, overrides_of, sums
from .shared import (
    FOUND,
    Commands,
    UsageError,
    add_command,
    braced,
    one_of,
    picture,
    require,
    say,
)
from .tables import FAINT, GREEN, print_table
from .targets import TARGETS, build_model, users_code

_DESCRIPTION = f"""\
Print which parameters of a model would be decayed, and why. The model is built on the meta device,
where parameters have shapes and no memory: seven billion of them are no more work than seven
thousand. With --input the model is built on the CPU and runs once, which settles guesses.

{TARGETS}
exit status: 0; with --diff 1 when the recipe decides differently; 2 when the model cannot be built.
"""

_EXAMPLES = """\
examples:
  python -m wdhook inspect torchvision.models:resnet50
  python -m wdhook inspect timm:vit_base_patch16_224 --kwargs 'num_classes=10'
  python -m wdhook inspect hf:BertConfig --only guessed
  python -m wdhook inspect hf:LlamaConfig --depth 2
  python -m wdhook inspect my_file.py:build --input 'randn(2, 3, 224, 224)'
  python -m wdhook inspect my_file.py:build_model --override 'layer4.*=0' --override norm=true
  python -m wdhook inspect torchvision.models:resnet50 --diff timm
  python -m wdhook inspect hf:LlamaConfig --summary --plot plan.svg
  python -m wdhook inspect my_file.py:build_model --json | jq '.parameters[] | select(.guess).name'
"""

Only = Literal["decayed", "exempt", "guessed"]
_ONLY: tuple[str, ...] = get_args(Only)


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
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="EXPR",
        help="an input, to settle guesses by one pass of the model, as in `audit`; may be repeated",
    )
    add_plan_arguments(parser, weight_decay=1e-4)
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument(
        "--diff",
        type=one_of(list(RECIPES)),
        metavar="NAME",
        help="show what this recipe decides differently",
    )
    tables.add_argument(
        "--depth",
        type=_depth,
        metavar="N",
        help="show a row for each module at this depth: 1 is layer4, 2 is layer4.0",
    )
    parser.add_argument(
        "--only",
        type=one_of(_ONLY),
        metavar=braced(_ONLY),
        help="show these parameters; the totals are of all",
    )
    parser.add_argument("--summary", action="store_true", help="show the totals alone")
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="FILE",
        help="draw the plan too, with wdhook.plot.plan: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; docs/command-line.md has its schema"
    )


def _depth(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, or the difference to a recipe.

    Raises:
        UsageError: the target cannot be built or run on the inputs, or matplotlib is missing for
            --plot.
        ArgumentError: an override has no meaning, or matches nothing.
    """
    if arguments.plot is not None:
        require("--plot", ["matplotlib"])
    if arguments.input and arguments.recipe is not None:
        raise UsageError(
            "`--input` settles guesses, and a recipe makes none.\n"
            "  Leave out --input or --recipe; --diff NAME compares with a recipe"
        )
    model, why = build_model(arguments.target, arguments.kwargs, meta=not arguments.input)
    if why is not None:
        say(arguments, f"built on the CPU, as it cannot be built on the meta device: {why}")
    made = plan(
        model,
        arguments.weight_decay,
        overrides=overrides_of(arguments),
        recipe=arguments.recipe,
        audit=_audit(model, arguments),
    )
    if arguments.plot is not None:
        plot.plan(made).savefig(arguments.plot)
        say(arguments, f"wrote {arguments.plot}")
    diff = None
    if arguments.diff is not None:
        diff = made.diff(plan(model, arguments.weight_decay, recipe=arguments.diff))
    if arguments.json:
        print(json.dumps(_as_json(made, arguments, diff)))
    elif diff is None:
        _print_plan(made, arguments)
    else:
        _print_diff(diff, arguments.summary)
    return FOUND if diff else 0


def _audit(model: nn.Module, arguments: argparse.Namespace) -> Audit | None:
    """Run the model on the inputs that were given."""
    if not arguments.input:
        return None
    args, kwargs = parse_inputs(arguments.input)
    with users_code(arguments.target):
        return audit(model, *args, **kwargs)


def _shown(made: Plan, only: Only | None) -> list[Decision]:
    if only == "guessed":
        return [d for d in made.values() if d.guess]
    if only == "decayed":
        return list(made.decayed.values())
    if only == "exempt":
        return list(made.exempt.values())
    return list(made.values())


# -- as text ---------------------------------------------------------------------------------------


def _print_plan(made: Plan, arguments: argparse.Namespace) -> None:
    everything, shown = list(made.values()), _shown(made, arguments.only)
    _print_headline(headline(made.weight_decay, everything, settled_by="--input"))
    if not arguments.summary:
        if not shown:
            print(
                "no parameters\n"
                if arguments.only is None
                else f"no parameter is {arguments.only}\n"
            )
        elif arguments.depth is not None:
            _print_modules(shown, arguments.depth)
        else:
            _print_decisions(shown)
    print_table(totals(everything), right=range(1, 5))


def _print_headline(text: str) -> None:
    print(*paragraph(text), sep="\n", end="\n\n")


def _print_decisions(decisions: Sequence[Decision]) -> None:
    first = sorted(decisions, key=lambda d: not d.guess)
    print_table(
        plan_rows(decisions),
        strong=[d.guess for _, d in fold(first)],
        colours=[GREEN if d.weight_decay > 0 else FAINT for _, d in fold(first)],
    )
    print()


def _print_diff(diff: PlanDiff, summary: bool) -> None:
    print(diff_headline(diff))
    if diff and not summary:
        print()
        print_table(diff_rows(diff))


# -- by module -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """Sums of the decisions below a module.

    Attributes:
        name: path in the model, cut at a depth; "(model)" for parameters of the model itself.
        tensors: how many parameters, and `decayed_tensors` of them decayed.
        elements: how many numbers, and `decayed_elements` of them decayed.
    """

    name: str
    tensors: int
    decayed_tensors: int
    elements: int
    decayed_elements: int


def modules(decisions: Sequence[Decision], depth: int) -> list[Module]:
    """Sum decisions by module at this depth, in the order of the model."""
    held: dict[str, list[Decision]] = {}
    for decision in decisions:
        path = ".".join(decision.name.split(".")[:-1][:depth])
        held.setdefault(path or "(model)", []).append(decision)
    return [Module(name, **sums(mine)) for name, mine in held.items()]


def _print_modules(decisions: Sequence[Decision], depth: int) -> None:
    found = modules(decisions, depth)
    folded = fold_by(found, _numbers)
    rows: list[Row] = [("module", "tensors", "decayed", "elements", "decayed")]
    for label, module in folded:
        rows.append((label, *(f"{number:,}" for number in _numbers(module))))
    colours = [GREEN if module.decayed_tensors else FAINT for _, module in folded]
    print_table(rows, right=range(1, 5), colours=colours)
    print()


def _numbers(module: Module) -> tuple[int, ...]:
    return module.tensors, module.decayed_tensors, module.elements, module.decayed_elements


# -- as JSON ---------------------------------------------------------------------------------------


def _as_json(made: Plan, arguments: argparse.Namespace, diff: PlanDiff | None) -> dict[str, Any]:
    everything, shown = list(made.values()), _shown(made, arguments.only)
    roles = {}
    for role in dict.fromkeys(d.role for d in everything):
        roles[str(role)] = sums([d for d in everything if d.role is role])
    found: dict[str, Any] = {
        "schema": "wdhook.inspect/1",
        "target": arguments.target,
        "weight_decay": made.weight_decay,
        "recipe": arguments.recipe,
        "totals": sums(everything),
        "roles": roles,
    }
    if not arguments.summary:
        found["parameters"] = [as_dict(d) for d in shown]
    if arguments.depth is not None:
        found["modules"] = [vars(module) for module in modules(shown, arguments.depth)]
    if diff is not None:
        found["diff"] = diff_as_dict(diff, arguments.diff)
    return found
