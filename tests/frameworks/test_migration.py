"""docs/migration.md: before and after train to the same parameters, to the last bit."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import IMPORT
from torch import Tensor, nn
from twins import assert_bit_equal, batches, convnet, perceptron, twins

import wdhook

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
SECTION = re.compile(r"^## (?P<title>.+?)$(?P<body>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    match["title"]: BLOCK.findall(match["body"]) for match in SECTION.finditer(PAGE.read_text())
}
# Blocks with prompts are doctests, which pytest runs where it finds them.
SECTIONS = {
    title: blocks
    for title, blocks in BLOCKS.items()
    if blocks and not all(block.startswith(">>>") for block in blocks)
}


def train(title: str, code: str, net: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Execute a block, then train with what it has made: a trainer, a learner or an optimizer."""
    folder.mkdir()
    names: dict[str, Any] = {
        "model": net,
        "torch": torch,
        "wdhook": wdhook,
        "loss_fn": nn.CrossEntropyLoss(),
    }
    pairs = [(x, (x.flatten(1).sum(1) > 0).long()) for x in batches(net, 6)]
    for package in dict.fromkeys(IMPORT.findall(code)):
        pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the frameworks: no workers, no GPU, deprecated parts of torch
        warnings.simplefilter("error", wdhook.WdhookWarning)
        patch.chdir(folder)
        if title.startswith("fastai"):
            from fastai.data.core import DataLoaders

            names["dls"] = DataLoaders(pairs, pairs[:1])
        if title.startswith("Hugging Face"):
            from hf_runs import Regression, Rows

            names |= {"model": Regression(net), "dataset": Rows(net)}
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
        if "trainer" in names:
            names["trainer"].train()
        elif "learn" in names:
            names["learn"].fit(1)
        else:
            for x, y in pairs:
                names["optimizer"].zero_grad()
                (names["loss_fn"](net(x), y) + names.get("regularization", float)()).backward()
                names["optimizer"].step()
    if "decay" in names:
        names["decay"].remove()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def start(title: str) -> nn.Module:
    """A model with convolution, linear, biases and norms, or one for the Trainer's rows."""
    return perceptron() if title.startswith("Hugging Face") else convnet()


@pytest.mark.parametrize("title", SECTIONS)
def test_before_is_after(title: str, tmp_path: Path) -> None:
    """The two blocks of a section, as the reader sees them: equal to the last bit."""
    before, after = SECTIONS[title]
    assert "wdhook" not in before
    net, twin = twins(start(title))
    theirs = train(title, before, twin, tmp_path / "before")
    ours = train(title, after, net, tmp_path / "after")
    assert_bit_equal(ours, theirs)


def test_another_recipe_is_not_the_same(tmp_path: Path) -> None:
    """The comparison can fail: Detectron2's rule decays biases, and nanoGPT's does not."""
    before, after = SECTIONS["nanoGPT"]
    net, twin = twins(convnet())
    theirs = train("nanoGPT", before, twin, tmp_path / "before")
    ours = train("nanoGPT", after.replace('"nanogpt"', '"detectron2"'), net, tmp_path / "after")
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_bit_equal(ours, theirs)


def test_every_section_has_a_before_and_an_after() -> None:
    """No block of the page is overlooked, and none is missing: beside the pairs there are two
    sections of doctests and one table."""
    assert {title: len(blocks) for title, blocks in SECTIONS.items()} == dict.fromkeys(SECTIONS, 2)
    assert len(BLOCKS) - len(SECTIONS) == 3
    assert sum(map(len, BLOCKS.values())) == PAGE.read_text().count("```python")
