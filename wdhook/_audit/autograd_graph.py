"""What the autograd graph of a forward pass tells, and a trace does not: whose gradient is of somebody's own making."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .operations import Use
from .trace import Seen

# Nodes that hand a parameter on as it is: views, casts, copies.
_TRANSPARENT = (
    *(
        "View",
        "UnsafeView",
        "Reshape",
        "T",
        "Transpose",
        "Permute",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "AsStrided",
    ),
    *("Slice", "Select", "Split", "Unbind", "Alias", "Clone", "ToCopy"),
)


def nodes_of(outputs: Iterable[Tensor]) -> list[Any]:
    """Every node of the graph behind some tensors."""
    todo: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    met = set(todo)
    for node in todo:  # grows as it is walked
        new = {below for below, _ in node.next_functions if below is not None} - met
        met |= new
        todo += new
    return todo


def opaque_uses(nodes: Iterable[Any], leaves: Mapping[str, Tensor]) -> dict[str, list[Seen]]:
    """The parameters that a custom autograd function takes, directly or as a view or a cast.

    Its forward can be traced, but its gradient is whatever it says.

    Returns:
        name → its one use, which names the function.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    found: dict[str, list[Seen]] = {}
    for node in nodes:
        for below, _ in node.next_functions if isinstance(node, BackwardCFunction) else ():
            name = names.get(id(_leaf(below)))
            if name is not None:
                found[name] = [Seen(Use.OPAQUE, type(node).__name__.removesuffix("Backward"))]
    return found


def has_reentrant_checkpoint(nodes: Iterable[Any]) -> bool:
    """Whether gradients come to leaves that the graph does not show, from a backward pass inside the backward pass."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes)


def _leaf(node: Any) -> Tensor | None:
    """The leaf at the end of views and casts, if that is what a node is."""
    while not hasattr(node, "variable"):
        if node is None:
            return None
        kind = type(node).__name__.partition("Backward")[0]
        behind = [below for below, _ in node.next_functions if below is not None]
        if kind not in _TRANSPARENT or len(behind) != 1:
            return None
        node = behind[0]
    leaf: Tensor = node.variable
    return leaf
