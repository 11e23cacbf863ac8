"""What an audit costs against a plain forward and backward pass: ``python -m benchmarks.audit``.

Needs the corpus extra. CPU time of one thread, the best of three runs, which take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import wdhook

LIMIT = 5.0  # what docs/audit.md promises
Case = tuple[str, nn.Module, dict[str, Any]]


def cases() -> Iterator[Case]:
    """Models in the size that one core trains in a second, with random weights."""
    import timm
    import transformers

    for name, size in (("resnet18", 224), ("vit_tiny_patch16_224", 224), ("efficientnet_b0", 128)):
        yield name, timm.create_model(name), {"x": torch.randn(4, 3, size, size)}
    sizes = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    for kind in (transformers.BertConfig, transformers.LlamaConfig):
        model = transformers.AutoModel.from_config(kind(vocab_size=2000, **sizes))
        yield type(model).__name__, model, {"input_ids": torch.randint(0, 2000, (8, 64))}


def plain(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A forward and a backward pass in the model's own type."""
    output = model(**inputs)
    (output if isinstance(output, Tensor) else output[0]).sum().backward()
    model.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    """CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> int:
    """Print a table; 1 if the promise is broken."""
    torch.set_num_threads(1)
    worst = 0.0
    print("| model | plain, s | audit, s | times a plain pass |\n|---|---|---|---|")
    for name, model, inputs in cases():
        runs = [
            (
                seconds(lambda m=model, i=inputs: plain(m, i)),
                seconds(lambda m=model, i=inputs: wdhook.audit(m, **i)),
            )
            for _ in range(3)
        ]
        once, audited = map(min, zip(*runs, strict=True))
        worst = max(worst, audited / once)
        print(f"| {name} | {once:.2f} | {audited:.2f} | {audited / once:.1f} |")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
