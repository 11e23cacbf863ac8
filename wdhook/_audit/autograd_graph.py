"""Finds parameters that enter a custom `autograd.Function`, whose gradient a trace cannot see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .carried import Seen
from .operations import Use

# Nodes that hand a parameter on as it is: views, casts, copies.
_VIEWS = ("View", "UnsafeView", "Reshape", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze")
_PARTS = ("Expand", "AsStrided", "Slice", "Select", "Split", "Unbind")
_TRANSPARENT = frozenset((*_VIEWS, *_PARTS, "Alias", "Clone", "ToCopy"))


def nodes_of(outputs: Iterable[Tensor]) -> list[Any]:
    """Return every node of the graph behind some tensors."""
    return _behind([output.grad_fn for output in outputs if output.grad_fn is not None])


def opaque_uses(nodes: Iterable[Any], leaves: Mapping[str, Tensor]) -> dict[str, list[Seen]]:
    """Find the parameters that a custom autograd function takes, directly or as a view or a cast.

    The forward of such a function can be traced, but its gradient is whatever its author wrote.

    Returns:
        name → its one use, which names the function.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    found: dict[str, list[Seen]] = {}
    for node in _custom(nodes):
        for below in _below(node):
            name = names.get(id(_leaf(below)))
            if name is not None:
                found[name] = [Seen(Use.OPAQUE, type(node).__name__.removesuffix("Backward"))]
    return found


def behind_custom(nodes: Iterable[Any], leaves: Mapping[str, Tensor]) -> set[str]:
    """Return the parameters whose gradient passes a custom autograd function."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    found = {names.get(id(getattr(node, "variable", None))) for node in _behind(_custom(nodes))}
    return {name for name in found if name is not None}


def has_reentrant_checkpoint(nodes: Iterable[Any]) -> bool:
    """Tell whether a backward pass inside the backward pass reaches leaves that the graph lacks."""
    return any(_is_checkpoint(node) for node in nodes)


def _custom(nodes: Iterable[Any]) -> list[Any]:
    custom = (node for node in nodes if isinstance(node, BackwardCFunction))
    return [node for node in custom if not _is_checkpoint(node)]


def _is_checkpoint(node: Any) -> bool:
    return type(node).__name__ == "CheckpointFunctionBackward"


def _behind(start: list[Any]) -> list[Any]:
    todo = list(start)
    met = set(todo)
    for node in todo:  # grows as it is walked
        for below in _below(node):
            if below not in met:
                met.add(below)
                todo.append(below)
    return todo


def _below(node: Any) -> Iterator[Any]:
    return (below for below, _ in node.next_functions if below is not None)


def _leaf(node: Any) -> Tensor | None:
    """Return the leaf at the end of views and casts, if the node is one of them."""
    while not hasattr(node, "variable"):
        kind = type(node).__name__.partition("Backward")[0]
        below = list(_below(node))
        if kind not in _TRANSPARENT or len(below) != 1:
            return None
        node = below[0]
    leaf: Tensor = node.variable
    return leaf
