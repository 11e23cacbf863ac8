"""`python -m wdhook audit` and the picture of an audit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import wdhook
from wdhook import cli, plot
from wdhook.plot.audit import outliers

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.mixer = nn.Parameter(torch.linspace(0.5, 1.5, 24).reshape(4, 6))

    def forward(self, x, *, rows):
        print("running")
        return self.norm(self.fc(x)) * self.mixer + rows[:, None]

def build():
    return Net().eval()

def right():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "my_file.py"
    path.write_text(FILE)
    return str(path)


INPUTS = ["--input", "randn(4, 8)", "--input", "rows=tensor([0, 1, 1, 0])"]


def test_the_table_and_the_status(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Contradictions end with status 1 and what to paste, none with 0; what the model prints
    goes to stderr.
    """
    assert cli.main(["audit", f"{file}:build", *INPUTS]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("audit of 5 tensors in evaluation mode: 1 contradicts the plan")
    assert out.endswith("overrides={\n    'mixer': 0.0,\n}\n")
    assert "running" in err
    assert "running" not in out
    assert cli.main(["audit", f"{file}:right", "--input", "randn(4, 8)"]) == 0
    assert "to follow the uses" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "training"), [([], False), (["--train"], True), (["--eval"], False)]
)
def test_json_and_the_mode(
    file: str, flags: list[str], training: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` is `Audit.to_dict()` with a schema; the mode is that of the target unless a flag
    says otherwise.
    """
    assert cli.main(["audit", f"{file}:build", *INPUTS, *flags, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["training"]) == ("wdhook.audit/1", training)
    rows = {row["name"]: row for row in data["parameters"]}
    assert rows["fc.weight"]["invariant"] is training
    assert rows["mixer"]["use"] == "multiplication"


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--input", "randn(4, 7)"], ["raised an error", "TypeError", "rows"]),
        ([], ["missing 1 required", "Give the inputs of the model, for example --input"]),
        (["--input", "__import__('os').getcwd()"], ["`--input` must be", "none of the factories"]),
        (["--input", "open('x')"], ["`--input` must be", "open is none of the factories"]),
    ],
)
def test_what_cannot_run(
    file: str, arguments: list[str], pieces: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs that are not understood, and errors of the model, end with status 2 and no
    traceback.
    """
    assert cli.main(["audit", f"{file}:build", *arguments]) == cli.BAD_USAGE
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err


def test_one_mode_at_most(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--train` and `--eval` exclude each other."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit", f"{file}:right", "--train", "--eval"])
    assert stop.value.code == cli.BAD_USAGE
    assert "not allowed with" in capsys.readouterr().err


def test_the_schema_names_every_key(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys of the JSON are those that docs/audit.md lists, of the audit and of each
    parameter.
    """
    cli.main(["audit", f"{file}:right", "--input", "randn(4, 8)", "--json"])
    data = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    section = page[page.index("## The command") :]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert listed == {*data, *data["parameters"][0]}


def test_the_exit_status_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists every status, as docs/audit.md does."""
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    shown = capsys.readouterr().out
    for said in ("0  no use contradicts", "1  at least one use", "2  the audit did not run"):
        assert said in shown


# ----------------------------------------------------------------------------------------------
# the picture


PLOT = """
import sys, torch, wdhook
assert "matplotlib" not in sys.modules and "wdhook.plot" not in sys.modules
figure = wdhook.plot.audit(wdhook.audit(torch.nn.Linear(3, 2), torch.randn(4, 3)))
print(type(figure).__name__, "plot" in dir(wdhook))
"""


def test_plots_need_no_import_of_their_own() -> None:
    """`wdhook.plot.audit` works after `import wdhook`, which loads neither it nor matplotlib."""
    pytest.importorskip("matplotlib")
    run = subprocess.run([sys.executable, "-c", PLOT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["Figure", "True"]


def test_the_picture_shows_every_gradient() -> None:
    """Each parameter with a gradient is one mark at its sensitivity; the threshold is a line."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(3, 2).requires_grad_(False)
    )
    found = wdhook.audit(model, torch.randn(7, 8))
    (ax,) = plot.audit(found).axes
    drawn = {round(x): y for marks in ax.collections for x, y in marks.get_offsets()}
    expected = {i: f.sensitivity for i, f in enumerate(found.values()) if f.sensitivity is not None}
    assert drawn == pytest.approx(expected)
    assert len(drawn) == 5  # not the bias before the norm, nor the frozen layer
    assert ax.get_yscale() == "log"
    assert ax.lines[0].get_ydata()[0] == found.threshold


def test_the_picture_rings_contradictions() -> None:
    """What contradicts the plan has a mark and a ring around it; where nothing does there is no
    ring.
    """
    pytest.importorskip("matplotlib")

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Parameter(torch.linspace(0.5, 1.5, 12).reshape(4, 3))
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x * self.mixer)

    figure = plot.audit(wdhook.audit(Gate(), torch.randn(2, 4, 3)))
    labels = [marks.get_label() for marks in figure.axes[0].collections]
    assert labels.count("contradicts the plan") == 1
    rings = next(
        marks for marks in figure.axes[0].collections if marks.get_label() == "contradicts the plan"
    )
    assert [round(x) for x, _ in rings.get_offsets()] == [0]
    assert [text.get_text() for text in figure.axes[0].texts][1:] == ["mixer"]
    title = figure.legends[0].get_title().get_text()
    assert title == "audit of 3 tensors in training mode: 1 contradicts the plan; 0 undecided"
    plain = plot.audit(wdhook.audit(nn.Linear(3, 2), torch.randn(2, 3)))
    assert "contradicts the plan" not in [marks.get_label() for marks in plain.axes[0].collections]


def test_the_picture_names_outliers() -> None:
    """The one decayed weight whose scale matters, among five whose scale does not, has its name;
    where half of them differ nobody is an outlier.
    """
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    layers = [part for _ in range(5) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    found = wdhook.audit(nn.Sequential(*layers, nn.Linear(4, 2)), torch.randn(7, 4))
    assert [label for label, _ in outliers(list(found.values()))] == ["10.weight"]
    half = wdhook.audit(nn.Sequential(*layers[:2], nn.Linear(4, 2)), torch.randn(7, 4))
    assert outliers(list(half.values())) == []


def test_an_audit_is_drawn_into_given_axes() -> None:
    """`ax=` takes axes of a figure of your own, which gets no title."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert plot.audit(wdhook.audit(nn.Linear(3, 2), torch.randn(2, 3)), ax=right) is mine
    assert right.collections
    assert not left.collections
    assert right.get_legend() is not None
    assert not mine.legends
    assert mine.get_suptitle() == ""


def test_an_audit_without_gradients_has_a_picture(tmp_path: Path) -> None:
    """On the meta device there is nothing to draw, and nothing fails."""
    pytest.importorskip("matplotlib")
    with torch.device("meta"):
        found = wdhook.audit(nn.Linear(3, 2), torch.randn(2, 3))
    plot.audit(found).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
