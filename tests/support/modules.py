"""Modules made of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Of(nn.Module):
    """A function of inputs, and the modules and parameters that it uses."""

    def __init__(self, function: Callable[..., Any], **held: nn.Module | Tensor) -> None:
        super().__init__()
        self._function = function
        for name, one in held.items():
            setattr(self, name, nn.Parameter(one) if isinstance(one, Tensor) else one)

    def forward(self, *args: Any) -> Any:
        return self._function(self, *args)
