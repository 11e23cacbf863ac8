"""Checks the arguments of `plan`: a slip is answered before the model is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .._base.errors import ArgumentError
from .._base.torch_private import is_part_of_flat_parameter
from .._base.validate import check_factor, is_number
from .._roles.marks import is_flattened
from .._roles.places import named_parameters

if TYPE_CHECKING:
    from .._audit.report import Audit


def check_weight_decay(model: object, weight_decay: object) -> float:
    """Return λ as a float.

    Raises:
        ArgumentError: it is no number ≥ 0, or `model` is no module.
    """
    advice = _advice(model, weight_decay)
    if is_number(weight_decay) or not advice:
        λ = check_factor(weight_decay)
        if isinstance(model, nn.Module):
            return λ
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"`model` must be a torch.nn.Module.\n  got: {type(model).__name__}{advice}"
        )
    kind = type(weight_decay).__name__
    raise ArgumentError(f"`weight_decay` must be a number.\n  got: {kind}{advice}")


def _advice(model: object, weight_decay: object) -> str:
    """The call that was probably meant, as the last line of an error; empty for a rarer slip."""
    if isinstance(weight_decay, nn.Module):
        return "\n  The model comes first: wdhook.plan(model, weight_decay)"
    if isinstance(model, Optimizer):
        return (
            "\n  A plan is made of the model: wdhook.plan(model, weight_decay). To take over the "
            "decay of an optimizer: wdhook.adopt(model, optimizer)"
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"\n  Give a model, and not its class: wdhook.plan({model.__name__}(...), ...)"
    if isinstance(weight_decay, Tensor) and weight_decay.numel() == 1:
        return "\n  Give a number: wdhook.plan(model, weight_decay.item())"
    if isinstance(weight_decay, Mapping):
        return (
            "\n  Give a number. Of a plan it is `plan.weight_decay`; a λ for some parameters "
            "belongs in `overrides`"
        )
    if callable(weight_decay):
        return (
            "\n  A schedule is for wdhook.attach(model, schedule). A plan has one λ: "
            "wdhook.plan(model, schedule(0))"
        )
    return ""


def check_sources(audit: object, inputs: object, recipe: object) -> None:
    """Raise if two arguments both say which parameters are decayed."""
    given = {"audit": audit, "inputs": inputs, "recipe": recipe}
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) < 2:
        return
    facts = "" if recipe is None else f"\n  recipe: {recipe}"
    raise ArgumentError(
        f"{' and '.join(names)} both say which parameters are decayed.{facts}\n"
        "  Give one of them; Plan.diff shows the parameters that two plans decide differently"
    )


def check_audit(audit: Audit, model: nn.Module) -> None:
    """Raise if `audit` is no audit of a model like this one."""
    from .._audit.report import Audit

    if not isinstance(audit, Audit):
        raise ArgumentError(
            f"`audit` must be an Audit.\n  got: {type(audit).__name__}\n"
            "  Make one: wdhook.audit(model, *inputs), or plan with inputs=(x,)"
        )
    # A shard or an uninitialized parameter does not have the shape of the whole.
    whole = ((name, p) for name, p in named_parameters(model) if _is_whole(p))
    shapes = {name: tuple(parameter.shape) for name, parameter in whole}
    differences = audit.differences(shapes) if shapes else []
    if differences:
        raise ArgumentError(
            "`audit` is of another model: names or shapes of parameters differ.\n"
            f"  of the audit: {', '.join(list(audit)[:3])}, ...\n"
            f"  of the model: {', '.join(list(shapes)[:3])}, ...\n"
            f"  first difference: {differences[0]}\n"
            "  Make one of this model: wdhook.audit(model, *inputs)"
        )


def _is_whole(parameter: Any) -> bool:
    """Tell a whole parameter from lazy ones and from the shards of FSDP and DeepSpeed."""
    if is_lazy(parameter) or hasattr(parameter, "ds_shape"):
        return False
    return not (is_part_of_flat_parameter(parameter) or is_flattened(parameter))


def audit_with(model: nn.Module, inputs: Any) -> Audit:
    """Audit the model on example inputs.

    Args:
        model: whole and initialized.
        inputs: a tensor; a tuple or list of arguments; or a mapping of arguments by name.

    Raises:
        ArgumentError: `inputs` is none of these, or the model cannot be audited. What the
            model itself raises on these inputs is passed on.
    """
    from .._audit.run import audit

    if isinstance(inputs, Mapping):
        return audit(model, **inputs)
    if isinstance(inputs, (tuple, list)):
        return audit(model, *inputs)
    if isinstance(inputs, Tensor):
        return audit(model, inputs)
    raise ArgumentError(
        "`inputs` must be a tensor, a tuple of arguments or a mapping of arguments by name.\n"
        f"  got: {type(inputs).__name__}\n"
        '  For example inputs=(x,) or inputs={"input_ids": x}'
    )
