"""`python -m wdhook inspect`: what it builds, prints and says when it cannot."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wdhook
import wdhook.plot
from wdhook import cli
from wdhook._commands.inputs import parse_inputs, parse_kwargs
from wdhook._commands.shared import UsageError
from wdhook._commands.targets import load

FILE = """
import torch
from torch import nn
from beside import WIDTH

class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.ones(width, 1))
        self.mixer = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.norm(self.fc(x)) * self.gamma.mT * self.mixer

def build(depth=2, width=WIDTH):
    return nn.Sequential(*(Block(width) for _ in range(depth)))

def chatty():
    print("building")
    return build()

class Family:
    build = staticmethod(build)

ready = build()
devices = []

def noted():
    devices.append(nn.Linear(2, 2).weight.device.type)
    return nn.Linear(2, 2)

def needs_values():
    return nn.Linear(int(torch.tensor(3).item()), 2)

def no_module():
    return 3

def fails():
    return nn.Linear(WIDTH, 2)(torch.zeros(3, 3))

def stops():
    raise SystemExit("no arguments given")

text = "a string"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file of the user, that imports what lies beside it."""
    before = set(sys.modules)
    (tmp_path / "models.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("models", "beside", "_wdhook_target"):
            del sys.modules[name]


def build() -> nn.Module:
    """The model of the file."""
    model: nn.Module = load("models.py:build")()
    return model


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert cli.main(["inspect", *arguments]) == status
    streams = capsys.readouterr()
    return streams.err if status == cli.BAD_USAGE else streams.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    return json.loads(inspect(capsys, *arguments, "--json", status=status))


def printed(plan: wdhook.Plan) -> str:
    """The text of `inspect` for a plan: an option settles guesses, in place of an argument."""
    return f"{plan}\n".replace("an audit or inputs= settles", "--input settles")


# -- what is built ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["models.py:build", "models.py:Family.build", "models.py:ready", "models:build"]
)
def test_plain_output_is_that_of_print(
    target: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A function, a member of a class or a model in a file, or in a module: what is printed is
    `print(plan)`, with the option that settles guesses in place of the argument."""
    sys.path.insert(0, str(folder))
    out = inspect(capsys, target, "--weight-decay", "0.01")
    assert out == printed(wdhook.plan(build(), 0.01))
    assert "0-1.fc.weight ×2" in out


def test_what_the_users_code_prints_is_no_output(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a constructor prints goes to stderr: JSON stays JSON."""
    assert cli.main(["inspect", "models.py:chatty", "--json"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["totals"]["tensors"] == 12
    assert "building" in streams.err


def test_kwargs_reach_the_constructor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--kwargs` gives literals to what is called: a class, a function."""
    found = as_json(
        capsys, "torch.nn:Linear", "--kwargs", "in_features=3, out_features=2, bias=False"
    )
    assert [(p["name"], p["shape"]) for p in found["parameters"]] == [("weight", [2, 3])]
    assert as_json(capsys, "models.py:build", "--kwargs", "depth=5")["totals"]["tensors"] == 30


def test_builds_on_the_meta_device(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that no memory could hold is planned: 2⁴⁶ elements in one layer."""
    found = as_json(
        capsys,
        "torch.nn:Linear",
        "--kwargs",
        "in_features=2**23, out_features=2**23".replace("2**23", "8388608"),
    )
    assert found["totals"]["elements"] == 2**46 + 2**23
    inspect(capsys, "models.py:noted")
    assert sys.modules["models"].devices == ["meta"]


def test_falls_back_to_the_cpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A constructor that reads values is built on the CPU, and one line on stderr says so."""
    assert cli.main(["inspect", "models.py:needs_values"]) == 0
    streams = capsys.readouterr()
    assert streams.out == f"{wdhook.plan(nn.Linear(3, 2), 1e-4)}\n"
    assert streams.err.count("\n") == 1
    assert (
        "built on the CPU, as it cannot be built on the meta device: RuntimeError: " in streams.err
    )


def test_a_file_may_have_the_name_of_a_module(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is called as a module that is imported already replaces nothing."""
    (folder / "torch.py").write_text(
        "import json\nfrom torch import nn\n\ndef build():\n    return nn.Linear(2, 2)\n"
    )
    sys.path.remove(str(folder)) if str(folder) in sys.path else None
    assert as_json(capsys, "torch.py:build")["totals"]["tensors"] == 2
    assert sys.modules["torch"] is torch


# -- what is shown ---------------------------------------------------------------------------------


def test_overrides_by_name_and_by_role(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--override` takes globs and roles, numbers and `true`; the last match wins, also if it is
    given twice."""
    found = as_json(
        capsys, "models.py:build", "--weight-decay", "0.5",
        *("--override", "norm=0.25"), *("--override", "*.norm.bias=true"),
        *("--override", "norm=true"),
        *("--override", "1.*=0"),
    )  # fmt: skip
    λs = {p["name"]: (p["weight_decay"], p["follows"]) for p in found["parameters"]}
    assert λs["0.fc.weight"] == λs["0.norm.weight"] == λs["0.norm.bias"] == (0.5, True)
    assert λs["0.fc.bias"] == (0.0, False)
    assert {value for name, value in λs.items() if name.startswith("1.")} == {(0.0, False)}


def test_inputs_settle_guesses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--input` runs the model: what was a guess follows its use, as with `inputs=` of `plan`."""
    net = build()
    assert [n for n, d in wdhook.plan(net, 1e-4).items() if d.guess] == ["0.mixer", "1.mixer"]
    out = inspect(capsys, "models.py:build", "--input", "randn(2, 4)")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settled = wdhook.plan(net, 1e-4, inputs=torch.randn(2, 4))
    assert out == f"{settled}\n"
    assert "guess" not in out
    found = as_json(capsys, "models.py:build", "--input", "input=randn(2, 4)", "--only", "guessed")
    assert found["parameters"] == []


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--input", "randn(2, 3)"], "models.py:build raised an error"),
        (["--input", "randm(2, 4)"], "randm is none of the factories. Did you mean rand"),
        (["--input", "randn(2, 4)", "--recipe", "timm"], "Leave out --input or --recipe"),
    ],
)
def test_inputs_that_settle_nothing(
    arguments: list[str], piece: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twin: inputs that do not fit, that are no inputs, and where there is no guess."""
    assert piece in inspect(capsys, "models.py:build", *arguments, status=2)


def test_only_and_summary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--only` shows a part, `--summary` nothing but totals, which are of all parameters in each
    case."""
    plan = wdhook.plan(build(), 1e-4)
    head, _, totals = printed(plan).rstrip("\n").split("\n\n")
    assert inspect(capsys, "models.py:build", "--summary") == f"{head}\n\n{totals}\n"
    parts = {
        "decayed": [n for n, d in plan.items() if d.weight_decay],
        "exempt": [n for n, d in plan.items() if not d.weight_decay],
        "guessed": [n for n, d in plan.items() if d.guess],
    }
    for only, names in parts.items():
        found = as_json(capsys, "models.py:build", "--only", only)
        assert [p["name"] for p in found["parameters"]] == names, only
        assert found["totals"]["tensors"] == len(plan)
        text = inspect(capsys, "models.py:build", "--only", only)
        assert text.startswith(head), only
        assert text.endswith(f"{totals}\n"), only
    assert len(parts["decayed"]) + len(parts["exempt"]) == len(plan) == 12
    assert parts["guessed"] == ["0.mixer", "1.mixer"]
    assert inspect(
        capsys, "torch.nn:Linear", "--kwargs", "in_features=2, out_features=2", "--only", "guessed"
    ).count("no parameter is guessed")


def test_the_schema_of_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys of the JSON are those of the documentation, and the numbers those of the plan."""
    found = as_json(capsys, "models.py:build", "--diff", "nanogpt", status=1)
    assert found["schema"] == "wdhook.inspect/1"
    assert list(found) == [
        "schema",
        "target",
        "weight_decay",
        "recipe",
        "totals",
        "roles",
        "parameters",
        "diff",
    ]
    sums = ["tensors", "decayed_tensors", "elements", "decayed_elements"]
    assert list(found["totals"]) == sums
    assert all(list(role) == sums for role in found["roles"].values())
    for key in sums:
        assert sum(role[key] for role in found["roles"].values()) == found["totals"][key]
    plan = wdhook.plan(build(), 1e-4)
    for row, decision in zip(found["parameters"], plan.values(), strict=True):
        assert row == {
            "name": decision.name, "shape": list(decision.shape), "numel": decision.numel,
            "role": str(decision.role), "weight_decay": decision.weight_decay,
            "follows": decision.follows, "guess": decision.guess,
            "reason": decision.reason,
        }  # fmt: skip
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    keys = {*found, *sums, *found["parameters"][0], *found["diff"], *found["diff"]["parameters"][0]}
    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_diff_ends_like_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--diff` shows what a recipe decides otherwise: 1 where there is something, 0 where not."""
    out = inspect(capsys, "models.py:build", "--diff", "nanogpt", status=1)
    assert (
        out == f"{wdhook.plan(build(), 1e-4).diff(wdhook.plan(build(), 1e-4, recipe='nanogpt'))}\n"
    )
    assert "0-1.gamma ×2" in out  # two dimensions, and no weight
    assert "2 tensors with 8 elements get a different λ" in out
    same = inspect(capsys, "models.py:build", "--recipe", "nanogpt", "--diff", "nanogpt")
    assert same == "0 tensors with 0 elements get a different λ\n"
    assert (
        inspect(capsys, "models.py:build", "--diff", "nanogpt", "--summary", status=1).count("\n")
        == 1
    )


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, *arguments: str) -> str:
    """The output of `inspect` on a terminal of so many columns."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert cli.main(["inspect", *arguments]) == 0
    return terminal.getvalue()


CODES = re.compile(r"\x1b\[[\d;]*m")


def test_a_wide_terminal_has_the_same_table_in_colour(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decayed rows are green, exempt ones faint, guesses bold; without the codes it is
    `print(plan)`."""
    drawn = on_terminal(monkeypatch, 200, "models.py:build")
    assert CODES.sub("", drawn) == printed(wdhook.plan(build(), 1e-4))
    lines = dict(line.split("0-1.", 1)[::-1] for line in drawn.splitlines() if "0-1." in line)
    codes = {name.split()[0]: code for name, code in lines.items()}
    assert codes == {
        "mixer": "\x1b[1;2m",
        "fc.weight": "\x1b[32m",
        "fc.bias": "\x1b[2m",
        "norm.weight": "\x1b[2m",
        "norm.bias": "\x1b[2m",
        "gamma": "\x1b[2m",
    }


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_declined(
    variable: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR and a dumb terminal get plain text, as a pipe does."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["inspect", "models.py:build"]) == 0
    assert terminal.getvalue() == printed(wdhook.plan(build(), 1e-4))


LONG = "d_model=4, nhead=2, dim_feedforward=4, batch_first=True"


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_table_is_as_wide_as_the_terminal(
    columns: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is wider than the terminal; no letter is lost; words are whole from 80 columns on."""
    arguments = ["torch.nn:Transformer", "--kwargs", LONG]
    drawn = CODES.sub("", on_terminal(monkeypatch, columns, *arguments))
    whole = CODES.sub("", on_terminal(monkeypatch, 300, *arguments))
    assert max(map(len, drawn.splitlines())) <= columns < max(map(len, whole.splitlines()))
    pieces = r"[A-Za-z_]+" if columns >= 80 else r"[A-Za-z_]"
    assert sorted(re.findall(pieces, drawn)) == sorted(re.findall(pieces, whole))


def test_a_pipe_gets_the_whole_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: what is no terminal is not cut to one."""
    monkeypatch.setenv("COLUMNS", "60")
    out = inspect(capsys, "torch.nn:Transformer", "--kwargs", LONG)
    assert max(map(len, out.splitlines())) > 60


def test_modules_at_a_depth(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--depth` sums the parameters below each module; equal modules are one row."""
    out = inspect(capsys, "models.py:build", "--kwargs", "depth=3", "--depth", "1")
    rows = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert rows[0] == ["module", "tensors", "decayed", "elements", "decayed"]
    # A block has 4×4 + 4 of fc, 4 + 4 of norm, 4 of gamma and 4 of mixer.
    assert rows[2:] == [["0-2", "×3", "6", "1", "36", "16"]]
    found = as_json(capsys, "models.py:build", "--depth", "2")["modules"]
    assert [m["name"] for m in found] == ["0.fc", "0.norm", "0", "1.fc", "1.norm", "1"] or [
        m["name"] for m in found
    ] == ["0", "0.fc", "0.norm", "1", "1.fc", "1.norm"]
    assert sum(m["elements"] for m in found) == 72
    alone = inspect(
        capsys, "torch.nn:Linear", "--kwargs", "in_features=2, out_features=2", "--depth", "1"
    )
    assert alone.split("\n\n")[1].splitlines()[2].split() == ["(model)", "2", "1", "6", "4"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_suffix_decides_the_format(
    suffix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--plot` writes the format of the suffix, and says on stderr that it has."""
    pytest.importorskip("matplotlib")
    assert cli.main(["inspect", "models.py:build", "--plot", f"plan.{suffix}"]) == 0
    assert capsys.readouterr().err == f"python -m wdhook inspect: wrote plan.{suffix}\n"
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert (folder / f"plan.{suffix}").read_bytes().startswith(begins[suffix])


def test_the_plan_is_drawn_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """`--plot` writes the picture of the plan and prints what it always prints; without matplotlib
    it is an error."""
    pytest.importorskip("matplotlib")
    out = inspect(capsys, "models.py:build", "--plot", "plan.png")
    assert out == printed(wdhook.plan(build(), 1e-4))
    stream = io.BytesIO()
    wdhook.plot.plan(wdhook.plan(build(), 1e-4)).savefig(stream)
    assert (folder / "plan.png").read_bytes() == stream.getvalue()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    err = inspect(capsys, "models.py:build", "--plot", "plan.png", status=2)
    assert "--plot needs packages that are not installed: matplotlib" in err


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["models.py"], ["must be PLACE:NAME", "timm:", "Did you mean models.py:Block or :build"]),
        (["models"], ["must be PLACE:NAME", "Did you mean models.py:Block or :build"]),
        (["torch.nn.Linear"], ["must be PLACE:NAME", "Did you mean torch.nn:Linear?"]),
        (["no.py:build"], ["names a file that does not exist", "file: no.py\n"]),
        (["model.py:build"], ["names a file that does not exist", "Did you mean models.py?"]),
        (["models.py:built"], ["does not exist", "there are: build", "Did you mean build?"]),
        (["no_such_package.models:a"], ["cannot be imported", "package: no_such_package.models\n"]),
        (["troch.nn:Linear"], ["cannot be imported", "package: troch.nn. Did you mean torch"]),
        (["torch.optmi:SGD"], ["cannot be imported", "package: torch.optmi. Did you mean optim"]),
        (["models.py:no_module"], ["must make a torch.nn.Module", "made: int"]),
        (["models.py:text"], ["must name a function, a class or a model", "is: str"]),
        (["models.py:fails"], ["fails raised an error", "RuntimeError: mat1 and mat2", "in fails"]),
        (["models.py:stops"], ["SystemExit: no arguments given", "in stops"]),
        (["broken.py:build"], ["broken.py raised an error", "ZeroDivisionError", "broken.py:2"]),
        (["torch.nn:Linear"], ["TypeError", "in_features"]),
        (["torch.nn:Linear", "--kwargs", "3"], ["must be name=value", "got: '3'"]),
        (["torch.nn:Linear", "--kwargs", "a=open('x')"], ["literals for values"]),
        (["models.py:ready", "--kwargs", "a=1"], ["is a model already"]),
        (["models.py:build", "--override", "no=0"], ["matches nothing", "selector: 'no'"]),
        (["models.py:build", "--override", "nrom=0"], ["matches nothing", "Did you mean 'norm'?"]),
        (["models.py:build", "--override", "0.fc.wieght=0"], ["Did you mean '0.fc.weight'"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_errors(
    arguments: list[str], pieces: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be built ends with status 2 and a message that says what and where, without a
    traceback."""
    (folder / "broken.py").write_text("a = 0\nb = 1 / a\n")
    err = inspect(capsys, *arguments, status=2)
    assert "python -m wdhook inspect: error: " in err
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err


def test_values_are_parsed_and_never_run(tmp_path: Path) -> None:
    """An input is a literal or a factory of torch; anything else is refused, and not called."""
    witness = tmp_path / "witness"
    for text in (
        f"__import__('pathlib').Path({str(witness)!r}).touch()",
        f"open({str(witness)!r}, 'w')",
        "randn(2).numpy()",
        "torch.load('x')",
        "randn(*[1])",
        "**{}",
        "randn(2), randn(2)",
        "randn(2",
        "randn(-1)",
        "x",
    ):
        with pytest.raises(UsageError, match="must be a literal or a call of a torch factory"):
            parse_inputs([text])
    assert not witness.exists()
    with pytest.raises(UsageError, match="literals for values"):
        parse_kwargs(f"a=open({str(witness)!r}, 'w')")


def test_inputs_are_tensors_and_the_same_each_time() -> None:
    """Positional and keyword inputs, dtypes with and without `torch.`; made anew from the same
    numbers."""
    texts = [
        "randn(2, 3)",
        "ids=torch.randint(0, 9, (2, 4))",
        "mask=ones(2, 4, dtype=torch.bool)",
        "flag=True",
    ]
    state = torch.random.get_rng_state()
    (x,), named = parse_inputs(texts)
    again, _ = parse_inputs(texts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert x.shape == (2, 3)
    assert torch.equal(x, again[0])
    assert again[0] is not x
    assert named["ids"].dtype == torch.int64
    assert named["mask"].dtype == torch.bool
    assert named["flag"] is True
    assert parse_kwargs("a=1, b='x', c=(1, 2)") == {"a": 1, "b": "x", "c": (1, 2)}
    assert parse_kwargs(None) == {}


# -- the packages of others ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "package", "decayed", "tensors"),
    [
        ("torchvision.models:resnet50", "torchvision", 54, 161),
        ("timm:vit_base_patch16_224", "timm", 50, 152),
        ("hf:BertConfig", "transformers", 76, 199),
    ],
)
def test_models_of_others(
    target: str, package: str, decayed: int, tensors: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The targets of the help text are built without memory and planned."""
    pytest.importorskip(package)
    found = as_json(capsys, target)
    assert (found["totals"]["decayed_tensors"], found["totals"]["tensors"]) == (decayed, tensors)


def test_transformers_are_configured_and_never_downloaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`hf:` takes configurations and model classes with sizes; the name of a checkpoint is an
    error."""
    pytest.importorskip("transformers")
    sizes = "num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8"
    found = as_json(capsys, "hf:BertForMaskedLM", "--kwargs", sizes)
    assert {p["name"].split(".")[3] for p in found["parameters"] if ".layer." in p["name"]} == {"0"}
    err = inspect(capsys, "hf:bert-base-uncased", status=2)
    assert "it downloads nothing" in err
    assert "hf:BertConfig" in err
    assert "Did you mean BertConfig" in inspect(capsys, "hf:BertConfg", status=2)


def test_a_slip_in_a_model_of_timm_gets_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    """timm's own error has no names; ours has the nearest ones."""
    pytest.importorskip("timm")
    err = inspect(capsys, "timm:vit_base_patch16_24", status=2)
    assert "timm has no model of this name" in err
    assert "Did you mean vit_base_patch16_224" in err
    assert inspect(capsys, "timm:resnet18.a1_in1k", "--summary")  # a model with the tag of weights
