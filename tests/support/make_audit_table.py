"""Remake the tables of docs/audit.md: traces of real architectures against the classifier.

    python tests/support/make_audit_table.py [--show] [LIBRARY ...]

One model of each family of torchvision, timm and transformers is built on the meta device, where
a forward pass costs no arithmetic, and audited with inputs that it accepts. Those that accept
none, or take longer than twenty seconds, are counted. `--show` prints the tables and each
contradiction instead of writing the page.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import wdhook  # noqa: E402

PAGE = ROOT / "docs" / "audit.md"
START, END = "<!-- made by tests/support/make_audit_table.py -->\n", "<!-- end -->\n"
HEAD = (
    "| library | models | without input | tensors | agree | contradict | no use seen "
    "| undecided |\n"
)
SECONDS = 20  # for a model; the slowest trace tens of thousands of operations
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, device="meta")


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long, device="meta")


# ----------------------------------------------------------------------------------------------
# families


def torchvision_models() -> Iterator[
    tuple[str, Callable[[], nn.Module], Callable[[nn.Module], Iterator[Inputs]]]
]:
    """The first architecture of each file of torchvision."""
    import torchvision

    for name in firsts(
        torchvision.models.list_models(),
        lambda n: torchvision.models.get_model_builder(n).__module__,
    ):
        yield name, lambda name=name: torchvision_model(name), torchvision_inputs


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    return torchvision.models.get_model(
        name, **{key: None for key in ("weights", "weights_backbone") if key in takes}
    )


def torchvision_inputs(model: nn.Module) -> Iterator[Inputs]:
    for size in (224, 299, 256):
        yield (random(2, 3, size, size),), {}
    for size in (112, 224):
        yield (random(2, 3, 16, size, size),), {}
    yield (random(2, 3, 128, 128), random(2, 3, 128, 128)), {}
    yield ([random(3, 224, 224)],), {}


def timm_models() -> Iterator[
    tuple[str, Callable[[], nn.Module], Callable[[nn.Module], Iterator[Inputs]]]
]:
    """The first architecture of each file of timm."""
    import timm

    for module in timm.list_modules():
        for name in timm.list_models(module=module)[:1]:
            yield name, lambda name=name: timm.create_model(name), timm_inputs


def timm_inputs(model: nn.Module) -> Iterator[Inputs]:
    yield (random(2, *model.pretrained_cfg["input_size"]),), {}


def transformers_models() -> Iterator[
    tuple[str, Callable[[], nn.Module], Callable[[nn.Module], Iterator[Inputs]]]
]:
    """The model of each third configuration, in its default size but of a few layers."""
    from transformers import MODEL_MAPPING

    for config in list(MODEL_MAPPING)[::3]:
        kinds = MODEL_MAPPING[config]
        kind = kinds[0] if isinstance(kinds, tuple) else kinds
        yield (
            kind.__name__,
            lambda config=config, kind=kind: kind(shallow(config())),
            transformers_inputs,
        )


def shallow(config: Any) -> Any:
    """Four layers tell as much of roles as forty."""
    config._attn_implementation = "eager"
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"):
        if (
            isinstance(getattr(config, name, None), int)
            and getattr(config, "layer_types", None) is None
        ):
            with contextlib.suppress(Exception):
                setattr(config, name, min(getattr(config, name), 4))
    if isinstance(getattr(config, "layer_types", None), list) and hasattr(
        config, "num_hidden_layers"
    ):
        config.num_hidden_layers = min(config.num_hidden_layers, 4)
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def transformers_inputs(model: nn.Module) -> Iterator[Inputs]:
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    size = size[0] if isinstance(size, (list, tuple)) else size
    ids = {"input_ids": ones(2, 12)}
    pixels = {"pixel_values": random(2, getattr(vision, "num_channels", None) or 3, size, size)}
    mels = {"input_features": random(2, getattr(config, "num_mel_bins", None) or 80, 3000)}
    for given in (
        ids,
        pixels,
        ids | pixels,
        ids | {"decoder_input_ids": ones(2, 6)},
        {"input_values": random(2, 16000)},
        mels,
        mels | {"decoder_input_ids": ones(2, 6)},
        {"input_features": random(2, 200, getattr(config, "feature_size", None) or 160)},
        {"pixel_values": random(2, 8, 3, size, size)},
        pixels | {"decoder_input_ids": ones(2, 6)},
        {"input_values": random(2, 12, getattr(config, "num_mel_bins", None) or 80)},
        {"pixel_values": random(2, 4, 3, size, size), "input_ids": ones(2, 12)},
        {"past_values": random(2, getattr(config, "context_length", 32) or 32, 1)},
        {"hidden_states": random(2, 12, getattr(config, "hidden_size", 64) or 64)},
    ):
        yield (), given


def firsts(names: list[str], family: Callable[[str], str]) -> list[str]:
    """The first name of each family."""
    return list({family(name): name for name in reversed(names)}.values())


LIBRARIES = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}

# ----------------------------------------------------------------------------------------------
# audits


def audited(
    model: nn.Module, inputs: Callable[[nn.Module], Iterator[Inputs]]
) -> wdhook.Audit | None:
    """The audit with the first inputs that the model accepts."""
    with contextlib.suppress(Exception):
        for args, kwargs in inputs(model):
            for training in (True, False):
                model.train(training)
                with contextlib.suppress(Exception), torch.device("meta"):
                    return wdhook.audit(model, *args, **kwargs)
    return None


class TooSlowError(BaseException):
    """Nobody that suppresses an `Exception` may hold it up."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooSlowError` inside after some time."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def audits(library: str) -> Iterator[tuple[str, nn.Module | None, wdhook.Audit | None]]:
    """Yield (name, model, audit) of each family; None where it cannot be built or run on meta."""
    for name, build, inputs in LIBRARIES[library]():
        model = audit = None
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.suppress(Exception, TooSlowError), limited(SECONDS):
                with torch.device("meta"):
                    model = build()
                audit = audited(model, inputs)
        yield name, model, audit


class Tally:
    """The counts of one library, and what contradicts by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kinds: dict[tuple[str, ...], tuple[set[str], str]] = {}
        self.absent: list[str] = []

    def add(self, name: str, model: nn.Module | None, audit: wdhook.Audit | None) -> None:
        """Count one model."""
        if model is None or audit is None:
            self.absent.append(name)
            return
        self.counts["models"] += 1
        owners = {
            f"{path}.{local}".lstrip("."): m
            for path, m in model.named_modules()
            for local in m._parameters
        }
        for finding in audit.values():
            said = {True: "agree", False: "contradict"}.get(finding.agrees)
            self.counts[said or ("no use" if finding.use == "unused" else "silent")] += 1
            if said == "contradict":
                local = re.sub(r"\d+", "#", finding.name.rpartition(".")[2])
                key = (
                    type(owners[finding.name]).__name__,
                    local,
                    str(finding.use),
                    *finding.operations,
                    finding.reason,
                )
                self.kinds.setdefault(key, (set(), f"{name}: {finding.name} {finding.shape}"))[
                    0
                ].add(name)

    def row(self, library: str) -> str:
        """One line of the table."""
        c = self.counts
        tensors = sum(n for key, n in c.items() if key != "models")
        cells = (
            c["models"],
            len(self.absent),
            tensors,
            c["agree"],
            c["contradict"],
            c["no use"],
            c["silent"],
        )
        return f"| {library} | {' | '.join(f'{n:,}' for n in cells)} |\n"


def main() -> int:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--show", action="store_true", help="print instead of writing the page")
    arguments = parser.parse_args()
    rows = HEAD + "|---|---|---|---|---|---|---|---|\n"
    for library in arguments.libraries:
        tally = Tally()
        for name, model, audit in audits(library):
            tally.add(name, model, audit)
            print(library, name, "-" if audit is None else len(audit), file=sys.stderr, flush=True)
        rows += tally.row(library)
        for key, (names, example) in sorted(tally.kinds.items(), key=lambda item: -len(item[1][0])):
            print(len(names), *key, "|", example, sep="  ", flush=True)
        print("without input:", library, *tally.absent, flush=True)
    print(rows)
    if not arguments.show:
        page = PAGE.read_text()
        PAGE.write_text(
            page[: page.index(START) + len(START)] + "\n" + rows + "\n" + page[page.index(END) :]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
