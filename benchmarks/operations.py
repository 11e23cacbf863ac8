"""Counts the operations of a piece of work as they are dispatched to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    """Counts operations, and the bytes of the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what is in its result and was not in its arguments."""
        result = func(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if torch.is_tensor(tensor)
        }
        made = {
            tensor.untyped_storage()._cdata: tensor
            for tensor in tree_leaves(result)
            if torch.is_tensor(tensor)
        }
        self.bytes += sum(
            tensor.untyped_storage().nbytes() for key, tensor in made.items() if key not in known
        )
        self.operations += 1
        return result
