"""Custom autograd functions, read off the graph: their forward can be traced, their gradient is whatever they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ._trace import Seen
from ._trace_ops import Use

# Nodes that hand a parameter on as it is: views, casts, copies.
_TRANSPARENT = (
    *("View", "UnsafeView", "Reshape", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Expand", "AsStrided"),
    *("Slice", "Select", "Split", "Unbind", "Alias", "Clone", "ToCopy"),
)


def opaque_uses(outputs: Iterable[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, list[Seen]]:
    """The parameters that a custom autograd function takes, directly or as a view or a cast.

    Returns:
        name → its one use, which names the function.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    found: dict[str, list[Seen]] = {}
    todo = [output.grad_fn for output in outputs if output.grad_fn is not None]
    met = set(todo)
    while todo:
        node: Any = todo.pop()
        behind = [below for below, _ in node.next_functions if below is not None]
        if isinstance(node, BackwardCFunction):
            for below in behind:
                name = names.get(id(_leaf(below)))
                if name is not None:
                    found[name] = [Seen(Use.OPAQUE, type(node).__name__.removesuffix("Backward"))]
        new = set(behind) - met
        met |= new
        todo += new
    return found


def _leaf(node: Any) -> Tensor | None:
    """The leaf at the end of views and casts, if that is what a node is."""
    while not hasattr(node, "variable"):
        kind = type(node).__name__.partition("Backward")[0]
        behind = [below for below, _ in node.next_functions if below is not None]
        if kind not in _TRANSPARENT or len(behind) != 1:
            return None
        node = behind[0]
    leaf: Tensor = node.variable
    return leaf
