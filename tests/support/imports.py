"""The files of the package, and the files that each of them imports."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "wdhook"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(path: Path, typing_too: bool = False) -> set[str]:
    """Files of the package that a file imports when it runs (inside functions too)."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = (
        {id(n) for node in ast.walk(tree) if _is_typing(node) for n in ast.walk(node)}
        if not typing_too
        else set()
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
            choices = (
                parts,
                [*parts, name.name],
                [*parts, name.name, "__init__"],
                [*parts, "__init__"],
            )  # a file, a file of a package, the package
            found.add(next(known for choice in choices if (known := ".".join(choice)) in FILES))
    return found


def _is_typing(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
