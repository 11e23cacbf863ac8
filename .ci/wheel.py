"""Checks an installed wheel from outside the source tree; `.ci/run wheel` runs it."""

import sys
from importlib import metadata, resources

import torch

import wdhook

assert wdhook.__file__.startswith(sys.prefix), wdhook.__file__
assert resources.files(wdhook).joinpath("py.typed").is_file()
assert metadata.version("wdhook") == wdhook.__version__
needs = [r for r in metadata.requires("wdhook") or [] if "extra ==" not in r]
assert needs == ["torch>=2.4"], needs
model = torch.nn.Linear(2, 1)
with wdhook.attach(model, 0.5):
    (model(torch.zeros(1, 2)) * 0).sum().backward()
assert torch.equal(model.weight.grad, 0.5 * model.weight)
print("wheel", metadata.version("wdhook"), "works from", wdhook.__file__)
