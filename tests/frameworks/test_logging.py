"""docs/logging.md: its blocks run with the real loggers, and write what the model held."""

from __future__ import annotations

import csv
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import IMPORT
from torch import nn
from torch.utils.data import DataLoader
from twins import batches, perceptron

import wdhook

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"
BLOCK = re.compile(r"^```python\n((?!>>>).*?)^```$", re.MULTILINE | re.DOTALL)
TENSORBOARD, BY_ITSELF, WATCH, TRAINER = BLOCK.findall(PAGE.read_text())
ROLES = {"weight", "bias", "norm"}


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model, and a folder of its own for what is logged."""
    monkeypatch.chdir(tmp_path)
    return perceptron()


def run(code: str, net: nn.Module) -> dict[str, Any]:
    """Execute a block; its names at the end."""
    for package in dict.fromkeys(IMPORT.findall(code)):
        pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
    pairs = [(x, (x.sum(1) > 0).long()) for x in batches(net, 4)]
    names: dict[str, Any] = {
        "model": net,
        "loader": DataLoader(pairs, batch_size=None),
        "loss_fn": nn.CrossEntropyLoss(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the frameworks: no workers, no GPU, deprecated parts of torch
        warnings.simplefilter("error", wdhook.WdhookWarning)
        if "lightning" in code:
            import lightning.pytorch as pl

            class Module(pl.LightningModule):
                def __init__(self) -> None:
                    super().__init__()
                    self.net = net

                def training_step(self, batch: Any, _: int) -> torch.Tensor:
                    return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

                def configure_optimizers(self) -> torch.optim.Optimizer:
                    return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0)

            names["module"] = Module()
        if "transformers" in code:
            from hf_runs import Regression, Rows

            names |= {"model": Regression(net), "dataset": Rows(net)}
        exec(compile(code, PAGE.name, "exec"), names)
    return names


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: tag → steps and values."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    (file,) = folder.rglob("events.out.*")
    accumulator = accumulators.EventAccumulator(str(file.parent))
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def norm_of_weights(net: nn.Module) -> float:
    """By hand: the three linear layers of the model."""
    return (
        torch.cat([m.weight.detach().flatten() for m in net.modules() if isinstance(m, nn.Linear)])
        .norm()
        .item()
    )


def test_tensorboard(net: nn.Module, tmp_path: Path) -> None:
    """λ, norm, gradient, angles, share and change of each role, at every second step."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    start = norm_of_weights(net)
    run(TENSORBOARD, net)
    logged = events(tmp_path / "runs")
    kinds = ("norm", "grad_norm", "cos", "share", "change", "angle")
    tags = {f"wdhook/{kind}/{role}" for kind in kinds for role in ROLES}
    assert logged.keys() == {"wdhook/weight_decay", "wdhook/equilibrium/weight", *tags}
    assert [step for step, _ in logged["wdhook/norm/weight"]] == [0, 2]
    # float32 in the file and in the sums: 61 squares, each rounded by 2⁻²⁴ of itself.
    assert logged["wdhook/norm/weight"][0][1] == pytest.approx(start, rel=1e-6)
    assert logged["wdhook/share/weight"][0][1] > 0 == logged["wdhook/share/bias"][0][1]


def test_lightning_logs_by_itself(net: nn.Module, tmp_path: Path) -> None:
    """`log=True` writes λ and the norms to the Trainer's own logger."""
    run(BY_ITSELF, net)
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {"wdhook/weight_decay", *(f"wdhook/norm/{role}" for role in ROLES)} <= rows[0].keys()
    assert float(rows[-1]["wdhook/norm/weight"]) == pytest.approx(
        norm_of_weights(net), rel=1e-6
    )  # as above


def test_lightning_watch(net: nn.Module, tmp_path: Path) -> None:
    """A snapshot before the steps 0 and 2, with the share of the coupled decay."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    start = norm_of_weights(net)
    run(WATCH, net)
    logged = events(tmp_path)
    assert [step for step, _ in logged["wdhook/share/weight"]] == [0, 2]
    assert logged["wdhook/norm/weight"][0][1] == pytest.approx(start, rel=1e-6)  # as above
    assert 0 < logged["wdhook/share/weight"][0][1] < 1


def test_trainer_watch(net: nn.Module) -> None:
    """The Trainer's own log holds the snapshots."""
    start = norm_of_weights(net)
    history = run(TRAINER, net)["trainer"].state.log_history
    ours = [entry for entry in history if "wdhook/norm/weight" in entry]
    assert [entry["step"] for entry in ours] == list(range(0, history[-1]["step"], 2))
    assert ours[0]["wdhook/norm/weight"] == pytest.approx(start, rel=1e-6)  # as above
    assert 0 < ours[0]["wdhook/share/weight"] < 1


# -- one line for each logger ----------------------------------------------------------------------

LINES = dict(re.findall(r"^\| (.+?) \| `(.+?)` \|$", PAGE.read_text(), re.MULTILINE))


def one_snapshot(net: nn.Module) -> wdhook.Snapshot:
    """Of a backward pass that has happened."""
    with wdhook.attach(net, 0.05) as decay:
        net(batches(net, 1)[0]).square().sum().backward()
        return decay.snapshot()


def test_wandb(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the page, in a run that stays on this machine: its summary has each number."""
    wandb = pytest.importorskip("wandb", reason="needs wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_SILENT", "true")
    snapshot = one_snapshot(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with wandb.init(mode="offline", dir=str(tmp_path), project="wdhook") as run:
            exec(LINES["Weights & Biases"], {"wandb": wandb, "snapshot": snapshot, "step": 3})
            run.log({"later": 1.0}, step=4)  # wandb keeps a step back until the next one comes
            written = {name: run.summary[name] for name in snapshot.scalars()}
    assert written == snapshot.scalars()


def test_mlflow(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the page, into a folder: MLflow reads each number back, at its step."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow", exc_type=ImportError)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs another package
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    snapshot = one_snapshot(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(tmp_path.as_uri())
        mlflow.set_experiment("wdhook")
        with mlflow.start_run() as run:
            exec(LINES["MLflow"], {"mlflow": mlflow, "snapshot": snapshot, "step": 3})
        client = mlflow.MlflowClient()
        assert client.get_run(run.info.run_id).data.metrics == snapshot.scalars()
        (norm,) = client.get_metric_history(run.info.run_id, "wdhook/norm/weight")
    assert norm.step == 3
