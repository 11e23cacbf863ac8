"""Python values from a command line: ``num_classes=10``, ``randn(2, 3)``. Parsed, never run."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch

from .._base.text import did_you_mean
from .shared import UsageError, first_line


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Parse keyword arguments: ``"num_classes=10, act='gelu'"`` is a dict of two.

    Raises:
        UsageError: the text has another form, or a value is not a literal.
    """
    try:
        call = ast.parse(f"f({text or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("not of the form name=value, name=value")
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError) as error:
        raise UsageError(
            f"`--kwargs` must be name=value, with literals for values.\n  got: {text!r}\n"
            "  For example --kwargs \"num_classes=10, act_layer='gelu'\""
        ) from error


_FACTORIES = (
    "randn",
    "rand",
    "randint",
    "zeros",
    "ones",
    "full",
    "arange",
    "linspace",
    "eye",
    "tensor",
)


def parse_inputs(texts: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Make positional and keyword inputs of a model, from the same random numbers at each call.

    Args:
        texts: each a literal, or a call of a torch factory such as ``randn(2, 3, 32, 32)`` or
            ``randint(0, 100, (2, 16))``, with ``name=`` before it for a keyword input. Texts are
            parsed, not evaluated.

    Raises:
        UsageError: an input has another form.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for text in texts:
            name, value = _parse_input(text)
            if name is None:
                args.append(value)
            else:
                kwargs[name] = value
    return args, kwargs


def _parse_input(text: str) -> tuple[str | None, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or len([*call.args, *call.keywords]) != 1:
            raise ValueError("not one input")
        if call.args:
            return None, _value(call.args[0])
        name = call.keywords[0].arg
        if name is None:
            raise ValueError("** is not understood")
        return name, _value(call.keywords[0].value)
    except (ValueError, TypeError, SyntaxError, RuntimeError) as error:
        raise UsageError(
            "`--input` must be a literal or a call of a torch factory.\n"
            f"  got: {text!r}\n  {first_line(error)}\n"
            f"  factories: {', '.join(_FACTORIES)}\n"
            "  For example --input 'randn(2, 3, 224, 224)' "
            "or --input 'input_ids=randint(0, 100, (2, 16))'"
        ) from error


def _value(node: ast.expr) -> Any:
    """Evaluate a literal, a dtype, or a call of a factory with such arguments."""
    if isinstance(node, ast.Call):
        factory = _name(node.func)
        if factory not in _FACTORIES:
            near = did_you_mean(ast.unparse(node.func), _FACTORIES)
            raise ValueError(f"{ast.unparse(node.func)} is none of the factories{near}")
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("** is not understood")
        named = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        return getattr(torch, factory)(*map(_value, node.args), **named)
    name = _name(node)
    if name is not None:
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{ast.unparse(node)} is no dtype of torch")
        return dtype
    return ast.literal_eval(node)


def _name(node: ast.expr) -> str | None:
    """The name in ``randn`` and in ``torch.randn``; None for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "torch" else None
    return None
