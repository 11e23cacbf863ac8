"""docs/frameworks.md: every block runs, and ends as it does with the optimizer's own decay."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import IMPORT
from torch import Tensor, nn
from torch.utils.data import DataLoader
from twins import assert_bit_equal, batches, perceptron, twins, weights

import wdhook

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
BLOCK = re.compile(r"^## (?P<title>.+?)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
λ = 0.05  # on the page


def blocks() -> dict[str, str]:
    """Title of the section and number of the block in it → code."""
    found: dict[str, str] = {}
    title = ""
    for match in BLOCK.finditer(PAGE.read_text()):
        if match["title"]:
            title = match["title"]
        else:
            found[f"{title} {1 + sum(known.startswith(title + ' ') for known in found)}"] = match[
                "code"
            ]
    return found


BLOCKS = blocks()
NO_WDHOOK = [
    # The callbacks and handles go ...
    (r"^(decay = |decay\.|import wdhook|from wdhook|.*register_for_checkpointing).*\n", ""),
    (r"callbacks=\[decay\]", "callbacks=[]"),
    (r', "decay": decay', ""),
    (r"^with wdhook\.attach\(.*\):$", "if True:"),
    # ... and the optimizer decays: by groups, or as the framework lets it.
    (
        r"torch\.optim\.AdamW\((\w+)\.parameters\(\), lr=0\.01, weight_decay=0\)",
        r"torch.optim.AdamW(groups(\1), lr=0.01)",
    ),
    (r"weight_decay=0\.0(?=\s*\))", f"weight_decay={λ}"),
    (
        r"partial\(OptimWrapper, opt=(.*)\)",
        r"lambda _, lr: OptimWrapper(opt=\1(groups(model), lr=lr))",
    ),
    (r"wd=0, cbs", "wd=None, cbs"),
    (
        r"opt_func=SGD, lr=0\.01, wd=0\)",
        f"opt_func=partial(SGD, decouple_wd=False), lr=0.01, wd={λ})",
    ),
]


def without_wdhook(code: str) -> str:
    """The block, with a decay that wdhook has no part in."""
    for pattern, replacement in NO_WDHOOK:
        code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
    assert "wdhook" not in code
    assert str(λ) in code or "groups(" in code
    return code


def groups(model: nn.Module, weight_decay: float = λ) -> list[dict[str, Any]]:
    """Hand-made param groups, a parameter each: some frameworks clip in the order of the groups."""
    decayed = {id(p) for p in weights(model)}
    return [
        {"params": [p], "weight_decay": weight_decay * (id(p) in decayed)}
        for p in model.parameters()
    ]


def world(title: str, net: nn.Module) -> dict[str, Any]:
    """The names that a block takes for granted: model, loss, data."""
    pairs = [(x, (x.sum(1) > 0).long()) for x in batches(net, 8)]
    loader: Any = DataLoader(pairs, batch_size=None)
    names = {
        "model": net,
        "loader": loader,
        "loss_fn": nn.CrossEntropyLoss(),
        "groups": groups,
        "partial": partial,
    }
    if title.startswith("Hugging Face"):
        from hf_runs import Regression, Rows

        names |= {"model": Regression(net), "dataset": Rows(net)}
    elif title.startswith("fastai"):
        from fastai.data.core import DataLoaders

        names["dls"] = DataLoaders(pairs, pairs[:1])
    elif title == "Loops with a closure, as in Composer 2":
        from composer.models import ComposerClassifier

        rows = [(x, y) for xs, ys in pairs for x, y in zip(xs, ys, strict=True)]
        names |= {
            "model": ComposerClassifier(net, num_classes=2),
            "loader": DataLoader(rows, batch_size=4),
        }
    return names


def run(title: str, code: str, net: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Execute a block in a folder of its own, and return the parameters at its end."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the frameworks: no workers, no GPU, deprecated parts of torch
        warnings.simplefilter("error", wdhook.WdhookWarning)
        patch.chdir(folder)
        for package in dict.fromkeys(IMPORT.findall(code)):
            pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), world(title, net))
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("title", BLOCKS)
def test_block(title: str, tmp_path: Path) -> None:
    """The block as the reader sees it, and the same block without wdhook: equal to the last bit."""
    net, twin = twins(perceptron())
    ours = run(title, BLOCKS[title], net, tmp_path / "ours")
    theirs = run(title, without_wdhook(BLOCKS[title]), twin, tmp_path / "theirs")
    assert_bit_equal(ours, theirs)
    assert not torch.equal(ours["0.weight"], perceptron()[0].weight)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """With a λ that is wrong by one percent the blocks differ."""
    title = "Loops with a closure, as in Composer 1"
    net, twin = twins(perceptron())
    ours = run(title, BLOCKS[title], net, tmp_path / "ours")
    code = without_wdhook(BLOCKS[title]).replace("groups(model)", f"groups(model, {1.01 * λ})")
    theirs = run(title, code, twin, tmp_path / "theirs")
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_bit_equal(ours, theirs)


def test_every_block_is_found() -> None:
    """No block of the page is overlooked."""
    assert len(BLOCKS) == PAGE.read_text().count("```python")
    assert {title.rsplit(" ", 1)[0] for title in BLOCKS} == set(
        re.findall("^## (.+)$", PAGE.read_text(), re.MULTILINE)
    )
