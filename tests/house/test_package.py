"""The house: what is public, what imports what, what the reader is shown."""

from __future__ import annotations

import ast
import configparser
import doctest
import inspect

import pytest
from imports import FILES, PACKAGE, ROOT, imports_of

import wdhook

# A room imports only from rooms above it in this list. A dotted name of a file is its own room.
ROOMS = [
    "_base",
    "schedules",
    "_roles",
    "_audit",
    "_plan",
    "_decay",
    "__init__",
    "plot",
    "integrations",
    "_commands",
    "cli",
    "__main__",
]
OPTIONAL = {"plot", "integrations", "_commands", "cli", "__main__"}


def room_of(name: str) -> str:
    """The room of a file, by its dotted name."""
    return name.split(".")[0]


def test_imports_point_upwards_in_the_list_of_rooms() -> None:
    """Every file is in a room, and imports only from there and above; typing imports count."""
    assert {room_of(name) for name in FILES} == set(ROOMS)
    for name, path in FILES.items():
        for other in imports_of(path, typing_too=True):
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(name)), (
                f"{name} imports {other}"
            )


def test_no_file_imports_itself_by_a_detour() -> None:
    """No cycle between files, typing imports counted."""
    edges = {name: imports_of(path, typing_too=True) for name, path in FILES.items()}
    for name, others in edges.items():
        others.discard(name)  # `from . import plot` in the package itself is no detour
    for start in edges:
        reached: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting.extend(edges[name])
        assert start not in reached, f"{start} imports itself by a detour"


def test_the_tests_of_imports_see_them() -> None:
    """Twin of the checks above: they find imports that are there, and tell typing from running."""
    decide = PACKAGE / "_plan" / "decide.py"
    assert {"_base.errors", "_roles.classifier", "_plan.decision"} <= imports_of(decide)
    assert "_audit.report" in imports_of(decide, typing_too=True)
    assert "integrations._callback" in imports_of(PACKAGE / "integrations" / "lightning.py")


def test_the_core_never_imports_optional_faces() -> None:
    """`import wdhook` reaches neither the command line nor plots."""
    for name, path in FILES.items():
        if room_of(name) not in OPTIONAL:
            assert not {room_of(other) for other in imports_of(path)} & OPTIONAL, path


def test_every_room_has_a_door() -> None:
    """The `__init__` of a private room is one paragraph for the newcomer, and no code."""
    for room in ROOMS:
        door = PACKAGE / room / "__init__.py"
        if room.startswith("_") and door.exists():
            assert ast.get_docstring(ast.parse(door.read_text())), door


def test_no_file_is_too_large() -> None:
    """One file, one concern: none has more than 450 lines."""
    sizes = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: size for name, size in sizes.items() if size > 450} == {}


@pytest.mark.parametrize("name", [n for n in wdhook.__all__ if not n.startswith("__")])
def test_every_public_name_has_a_docstring(name: str) -> None:
    """Public ⇒ documented; tests/docs/test_documented.py checks the page of names itself."""
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


def test_dir_lists_what_is_public_and_nothing_else() -> None:
    """Completion shows no name that this package imports for itself."""
    names = {name for name in dir(wdhook) if not name.startswith("__")}
    assert names == {name for name in wdhook.__all__ if not name.startswith("__")}
    assert "__doc__" in dir(wdhook)
    assert "TYPE_CHECKING" in vars(wdhook)  # which dir() would show by itself


def test_every_error_is_also_a_builtin() -> None:
    """Code that does not know wdhook can handle its errors."""
    errors = [
        getattr(wdhook, n) for n in wdhook.__all__ if n.endswith("Error") and n != "WdhookError"
    ]
    assert len(errors) == 13
    for error in errors:
        assert issubclass(error, wdhook.WdhookError)
        assert issubclass(error, (ValueError, RuntimeError))
    assert issubclass(wdhook.WdhookWarning, UserWarning)


def test_one_version() -> None:
    """The version of the package is that of its metadata and of the changelog."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: wdhook.__version__"
    assert f"## [{wdhook.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_is_the_only_requirement() -> None:
    """Everything else is an optional extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options"]["install_requires"].split() == ["torch>=2.4"]
    assert config["options"]["packages"] == "find:"
    assert (PACKAGE / "py.typed").exists()
