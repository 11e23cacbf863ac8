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


# On an accelerator -------------------------------------------------------------------------------


class UnderAutocast(Trained):
    """A network whose forward pass runs under bfloat16 autocast."""

    def loss(self) -> Tensor:
        """As of `Trained`, in float32."""
        with torch.autocast(self.batch.device.type, torch.bfloat16):
            output = self.body(self.batch)
        return output.float().square().mean()


class _Bottleneck(nn.Module):
    """A residual block of ResNet-50 (He et al. 2016), with the stride in the 3×3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def _resnet(width: int, blocks: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(_Bottleneck(inputs, width << stage, stride))
            inputs = 4 * (width << stage)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*layers)


class _Transformer(nn.Module):
    """Encoder layers with the norm first, and one norm behind."""

    def __init__(self, width: int, depth: int, causal: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64 or 1, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.layers = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(
                tokens.shape[1], device=tokens.device, dtype=tokens.dtype
            )
        return self.layers(tokens, mask, is_causal=self.causal)


class _Vit(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021)."""

    def __init__(self, side: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.body = _Transformer(width, depth, causal=False)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), 1)
        return self.head(self.body(tokens + self.pos_embed)[:, 0])


class _Gpt(nn.Module):
    """A decoder of the size of GPT-2 (Radford et al. 2019), its head tied to the tokens."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.body = _Transformer(width, depth, causal=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        return self.head(self.body(self.tokens(words) + self.positions(places)))


def resnet50(device: torch.device, quick: bool) -> Trained:
    """ResNet-50 on 64 images of 224 pixels."""
    if quick:
        return UnderAutocast(_resnet(4, (1, 1)), torch.randn(2, 3, 32, 32, device=device))
    return UnderAutocast(_resnet(64, (3, 4, 6, 3)), torch.randn(64, 3, 224, 224, device=device))


def vit_b(device: torch.device, quick: bool) -> Trained:
    """ViT-B/16 on 64 images of 224 pixels."""
    if quick:
        return UnderAutocast(_Vit(32, 16, 32, 2), torch.randn(2, 3, 32, 32, device=device))
    return UnderAutocast(_Vit(224, 16, 768, 12), torch.randn(64, 3, 224, 224, device=device))


def gpt(device: torch.device, quick: bool) -> Trained:
    """A GPT of 12 layers on 8×512 tokens."""
    if quick:
        words = torch.randint(100, (2, 8), device=device)
        return UnderAutocast(_Gpt(100, 8, 32, 2), words)
    words = torch.randint(50304, (8, 512), device=device)
    return UnderAutocast(_Gpt(50304, 512, 768, 12), words)


LARGE_NETWORKS: dict[str, Callable[[torch.device, bool], Trained]] = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b,
    "GPT, 12 layers": gpt,
}
