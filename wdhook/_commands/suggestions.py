"""Near names of files, packages and the objects in them, for targets with a slip."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from .._base.text import did_you_mean, near

_MANY = 15  # names in a message


def near_file(path: Path) -> str:
    """Ask about a missing file: near names in the same folder."""
    folder = path.parent
    return did_you_mean(path.name, _python_files(folder)) if folder.is_dir() else ""


def near_package(name: str) -> str:
    """Ask about a package that cannot be imported: near packages or submodules."""
    parent, _, last = name.rpartition(".")
    if not parent:
        files = [file.removesuffix(".py") for file in _python_files(Path.cwd())]
        return did_you_mean(name, {*packages_distributions(), *files, "timm", "hf"})
    try:
        found = importlib.import_module(parent)
    except ImportError:
        return near_package(parent)
    siblings = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return did_you_mean(last, siblings)


def place_and_name(target: str) -> str:
    """Ask about a target without a colon: the same place and name, with a colon."""
    path = Path(target)
    if path.suffix == ".py" and path.is_file():
        names = _defined(path)
        return f". Did you mean {path}:{' or :'.join(names[:3])}?" if names else ""
    if target in _python_files(Path.cwd(), suffix=False):
        return place_and_name(f"{target}.py")
    parent, _, last = target.rpartition(".")
    return f". Did you mean {parent}:{last}?" if parent and path.suffix != ".py" else ""


def listed(module: Any, like: str) -> str:
    """List the functions and classes of a module, near names first, and ask."""
    names = []
    for name, value in vars(module).items():
        if callable(value) and not name.startswith("_"):
            names.append(name)
    shown = list(dict.fromkeys([*near(like, names), *names]))
    text = ", ".join(shown[:_MANY]) or "no functions and no classes"
    more = ", ..." if len(names) > _MANY else ""
    return f"{text}{more}{did_you_mean(like, names)}"


def near_model_of_timm(name: str) -> str:
    """Ask about a name unknown to timm."""
    timm: Any = sys.modules["timm"]
    return did_you_mean(name, timm.list_models())


def _python_files(folder: Path, suffix: bool = True) -> list[str]:
    paths: Iterable[Path] = folder.glob("*.py")
    return sorted(path.name if suffix else path.stem for path in paths)


def _defined(path: Path) -> list[str]:
    """List the functions and classes of a file by parsing, without running it."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError):
        return []
    names = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            names.append(node.name)
    return names
