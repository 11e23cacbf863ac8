"""docs/recipes.md: every script runs as it stands, and its decay works."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from snippets import IMPORT

import wdhook

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCK = re.compile(r"^## (?P<title>.+?)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINES = 40  # of code: a script that can be read at a glance
PROCESSES = {"DistributedDataParallel", "FSDP2"}
# gloo may abort a process that has done its work and ends: seen in one of six runs without wdhook.
TEARDOWN = "terminate called without an active exception"
CLI = "LightningCLI and YAML"
YAML = "".join(re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(PAGE.parents[1]),
}  # of this tree, not an installed one


def scripts() -> dict[str, str]:
    """Title of the section → its script."""
    found: dict[str, str] = {}
    title = ""
    for match in BLOCK.finditer(PAGE.read_text()):
        if match["title"]:
            title = match["title"]
            continue
        assert title not in found, f"two scripts under {title}"
        found[title] = match["code"]
    return found


SCRIPTS = scripts()
ALONE = [title for title in SCRIPTS if title not in {*PROCESSES, CLI}]


def run(title: str, code: str) -> str:
    """Execute a script in this process, and return what it prints."""
    for package in dict.fromkeys(IMPORT.findall(code)):
        pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")  # of the frameworks: no workers, no GPU
        warnings.simplefilter("error", wdhook.WdhookWarning)
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), {"__name__": "__main__"})
    return said.getvalue()


@pytest.mark.parametrize("title", ALONE)
def test_script(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs, warns of nothing, and each of its checks says that decay works."""
    monkeypatch.chdir(tmp_path)
    code = SCRIPTS[title]
    said = run(title, code)
    if title == "Convnet with SGD":
        assert said.splitlines()[-1] in PAGE.read_text().splitlines()
    assert said.count("Decay works: step ") == code.count(".check())") > 0
    if "last bit" in code:
        assert "equal to the last bit: True" in said


@pytest.mark.slow
@pytest.mark.parametrize("title", sorted(PROCESSES))
def test_script_of_several_processes(title: str, tmp_path: Path) -> None:
    """As above, in processes of its own: the script starts the others."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if title == "FSDP2" and not hasattr(fsdp, "fully_shard"):
        pytest.skip("fully_shard needs torch 2.6")
    file = tmp_path / "script.py"
    file.write_text(SCRIPTS[title])
    command = [sys.executable, "-u", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 or TEARDOWN in done.stderr, done.stderr
    assert "WdhookWarning" not in done.stderr
    assert done.stdout.count("Decay works: step 5 ") == 1


def run_cli(folder: Path, settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script of LightningCLI with its YAML file."""
    for package in ("lightning", "jsonargparse"):
        pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPTS[CLI])
    (folder / "train.yaml").write_text(settings)
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "train.py", "fit", "--config", "train.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_lightning_cli(tmp_path: Path) -> None:
    """The script with its YAML file; a slip in the file is an error before training begins."""
    done = run_cli(tmp_path / "right", YAML)
    assert done.returncode == 0, done.stderr
    assert "Decay works: step 8 decayed 2 of 2 eligible tensors" in done.stdout
    assert "1e-05·p (1)" in done.stdout  # the override: 0.01 times the learning rate
    done = run_cli(tmp_path / "wrong", YAML.replace("decoupled", "decupled"))
    assert done.returncode != 0
    assert "decupled" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_whose_decay_does_not_work_is_seen() -> None:
    """The check above can fail: no step, other parameters, another selection."""
    code = SCRIPTS["Convnet with SGD"]
    assert "Decay works" not in run("", code.replace("optimizer.step()", "pass"))
    half = code.replace("SGD(model.parameters()", "SGD(model[0].parameters()")
    assert "Decay is incomplete" in run("", half)
    code = SCRIPTS["The selection of your old script, bit for bit"]
    assert "last bit: False" in run("", code.replace(', overrides={"*": True}', ""))


@pytest.mark.parametrize("title", SCRIPTS)
def test_a_script_is_short(title: str) -> None:
    """It can be read at a glance."""
    lines = [line for line in SCRIPTS[title].splitlines() if line.strip()]
    assert len(lines) < LINES
