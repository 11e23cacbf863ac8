"""The house: what is public, what imports what, what the reader is shown."""

from __future__ import annotations

import ast
import configparser
import doctest
import inspect
from pathlib import Path

import pytest

import wdhook

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "wdhook"

# A file imports only from layers below its own.
LAYERS = [
    {"_errors", "_role_names", "_trace_ops", "_norm_eps", "_isolated", "_invariance"},
    {"_numbers", "_conventions", "_arithmetic", "_window", "_members"},
    {"schedules", "_roles", "_optimizers", "_table", "_trace", "_averages"},
    {"_decisions", "_overrides", "_recipes", "_audit_table", "_graph"},
    {"_findings"},
    {"_audit"},
    {"_plan"},
    {"_state", "_guards"},
    {"_progress"},
    {"_backward", "_views"},
    {"_engine"},
    {"_step", "_snapshot"},
    {"_listener"},
    {"_arguments", "_handle", "_oneshot"},
    {"_attach"},
    {"__init__"},
    {"_plot_plan", "_plot_audit"},
    {"plot", "integrations.__init__", "integrations._callback"},
    {"_demo", "integrations.lightning", "integrations.transformers"},
    {"_commands.__init__", "_commands._shared"},
    {"_commands._inputs", "_commands.demo"},
    {"_commands._targets", "_commands._plans"},
    {"_commands.inspect", "_commands.audit", "_commands._findings", "_commands._training"},
    {"_commands._examination"},
    {"_commands.doctor"},
    {"cli"},
    {"__main__"},
]
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
FOLDERS = ("integrations.", "_commands.")
OPTIONAL = {"plot", "_plot_plan", "_demo", "cli", "__main__", *(name for name in FILES if name.startswith(FOLDERS))}


def imports_of(path: Path, typing_too: bool = False) -> set[str]:
    """Files of the package that a file imports when it runs (inside functions too)."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = (
        {id(n) for node in ast.walk(tree) if _is_typing(node) for n in ast.walk(node)} if not typing_too else set()
    )
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        parts = node.module.split(".") if node.module else []
        if node.level:
            parts = [*folder[: len(folder) + 1 - node.level], *parts]
        elif parts[0] == "wdhook":
            parts = parts[1:]
        else:
            continue
        for name in node.names:
            choices = (parts, [*parts, name.name], [*parts, "__init__"])  # a file, a file of a package, the package
            found.add(next(known for choice in choices if (known := ".".join(choice)) in FILES))
    return found


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_imports_point_downwards() -> None:
    """Every file has a layer, and imports only from layers below."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert set(FILES) == set(level)
    for name, path in FILES.items():
        for other in imports_of(path):
            assert level[other] < level[name], f"{name} imports {other}"


def test_the_layer_test_sees_imports() -> None:
    """The check above is not blind: it finds imports that are there, and tells typing from running."""
    assert {"_engine", "_errors", "_plan"} <= imports_of(PACKAGE / "_attach.py")
    assert "_engine" not in imports_of(PACKAGE / "_guards.py")
    assert "_engine" in imports_of(PACKAGE / "_guards.py", typing_too=True)
    assert imports_of(PACKAGE / "integrations" / "lightning.py") == {"__init__", "integrations._callback"}


def test_the_core_never_imports_optional_faces() -> None:
    """`import wdhook` reaches neither the command line nor plots."""
    for name, path in FILES.items():
        if name not in OPTIONAL:
            assert not imports_of(path) & OPTIONAL, path


def test_no_file_is_too_large() -> None:
    """One file, one concern: none has more than 330 lines."""
    sizes = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: size for name, size in sizes.items() if size > 330} == {}


@pytest.mark.parametrize("name", [n for n in wdhook.__all__ if not n.startswith("__")])
def test_every_public_name_has_a_docstring(name: str) -> None:
    """Public ⇒ documented; tests/test_documented.py sees to the page that is made from the docstrings."""
    assert inspect.getdoc(getattr(wdhook, name))


FUNCTIONS = ["adopt", "apply_weight_decay", "attach", "audit", "l2_penalty", "param_groups", "plan"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example_and_names_its_errors(name: str) -> None:
    """Docstrings show a doctest and say what is raised."""
    text = inspect.getdoc(getattr(wdhook, name)) or ""
    assert doctest.DocTestParser().get_examples(text)
    assert "Raises:" in text or "errors are those" in text


def test_public_functions_are_all_listed() -> None:
    """The list above misses no function."""
    assert [n for n in wdhook.__all__ if inspect.isfunction(getattr(wdhook, n))] == FUNCTIONS


def test_the_order_of_all() -> None:
    """__all__ is sorted and complete: everything in it exists."""
    assert wdhook.__all__ == sorted(wdhook.__all__)
    assert all(hasattr(wdhook, name) for name in wdhook.__all__)


def test_every_error_is_also_a_builtin() -> None:
    """Code that does not know wdhook can handle its errors."""
    errors = [getattr(wdhook, n) for n in wdhook.__all__ if n.endswith("Error") and n != "WdhookError"]
    assert len(errors) == 11
    for error in errors:
        assert issubclass(error, wdhook.WdhookError)
        assert issubclass(error, (ValueError, RuntimeError))
    assert issubclass(wdhook.WdhookWarning, UserWarning)


def test_one_version() -> None:
    """The version of the package is that of its metadata and of the changelog."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == wdhook.__version__
    assert f"## [{wdhook.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_is_the_only_requirement() -> None:
    """Everything else is an optional extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options"]["install_requires"].split() == ["torch>=2.4"]
    assert config["options"]["packages"] == "find:"
    assert (PACKAGE / "py.typed").exists()
