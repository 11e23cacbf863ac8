"""The models that the benchmarks train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Tensors(nn.Module):
    """`count` weights of one shape; the loss gives each a gradient at the least cost."""

    def __init__(self, count: int, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        rows, columns = shape
        self.layers = nn.ModuleList(
            nn.Linear(columns, rows, bias=False, device=device) for _ in range(count)
        )
        self.towards = torch.randn(shape, device=device)

    def loss(self) -> Tensor:
        """The gradient of every weight is `towards`."""
        return torch.stack([(layer.weight * self.towards).sum() for layer in self.layers]).sum()


class Trained(nn.Module):
    """A network with its input: `loss()` is one forward pass."""

    def __init__(self, body: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.body = body.to(batch.device)
        self.batch = batch

    def loss(self) -> Tensor:
        """A mean of squares."""
        return self.body(self.batch).square().mean()


def small_tensors(device: torch.device, quick: bool) -> Trained:
    """200 small tensors: 100 linear layers of 16 with biases."""
    layers = [
        layer for _ in range(10 if quick else 100) for layer in (nn.Linear(16, 16), nn.Tanh())
    ]
    return Trained(nn.Sequential(*layers), torch.randn(8, 16, device=device))


def transformer(device: torch.device, quick: bool) -> Trained:
    """6 encoder layers of width 256."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1 if quick else 6, enable_nested_tensor=False)
    return Trained(encoder, torch.randn(2, 32, 256, device=device))


def wide(device: torch.device, quick: bool) -> Trained:
    """A multi-layer perceptron whose weights are 16 MiB each."""
    width = 256 if quick else 2048
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return Trained(nn.Sequential(*layers), torch.randn(4, width, device=device))


NETWORKS: dict[str, Callable[[torch.device, bool], Trained]] = {
    "200 small tensors": small_tensors,
    "6 transformer layers": transformer,
    "wide MLP": wide,
}
