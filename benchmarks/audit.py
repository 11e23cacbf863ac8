"""What an audit costs against a plain forward and backward pass: ``python -m benchmarks.audit``.

Needs the corpus extra. CPU time of one thread, the best of five runs, which take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import wdhook

LIMIT = 5.0  # times a plain pass
SLOWER = {"LSTM": 8.0, "1,000 tensors": 7.0}  # for the reasons that docs/audit.md gives
Case = tuple[str, nn.Module, dict[str, Any]]


class Recurrent(nn.Module):
    """Two LSTM layers over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2000, 128)
        self.lstm = nn.LSTM(128, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 1000)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


class Many(nn.Module):
    """500 residual layers: 1,000 small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(500))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * torch.tanh(layer(x))
        return x


def cases() -> Iterator[Case]:
    """Models in the size that one core trains in a second, with random weights."""
    import timm
    import transformers

    images = (("resnet50", 224), ("vit_small_patch16_224", 224), ("efficientnet_b0", 128))
    for name, size in images:
        yield name, timm.create_model(name), {"x": torch.randn(4, 3, size, size)}
    ids = torch.randint(0, 2000, (8, 64))
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    llama = transformers.LlamaConfig(vocab_size=2000, intermediate_size=1024, **sizes)
    gpt = transformers.GPT2Config(vocab_size=5000, n_layer=6, n_embd=384, n_head=6)
    for config in (llama, gpt):
        model = transformers.AutoModel.from_config(config)
        yield type(model).__name__, model, {"input_ids": ids}
    yield "LSTM", Recurrent(), {"ids": ids}
    yield "1,000 tensors", Many(), {"x": torch.randn(8, 16)}


def plain(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Run a forward and a backward pass in the model's own type."""
    output = model(**inputs)
    (output if isinstance(output, Tensor) else output[0]).sum().backward()
    model.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> int:
    """Print a table; 1 if the promise is broken."""
    torch.set_num_threads(1)
    missed = False
    print("| model | plain, s | audit, s | times a plain pass |\n|---|---|---|---|")
    for name, model, inputs in cases():
        runs = [
            (
                seconds(lambda m=model, i=inputs: plain(m, i)),
                seconds(lambda m=model, i=inputs: wdhook.audit(m, **i)),
            )
            for _ in range(5)
        ]
        once, audited = map(min, zip(*runs, strict=True))
        missed |= audited / once > SLOWER.get(name, LIMIT)
        print(f"| {name} | {once:.2f} | {audited:.2f} | {audited / once:.1f} |")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
