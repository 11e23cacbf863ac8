"""The traced truth about parameter roles, as rows of `data/truth.jsonl.gz`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[tuple[str, str], list[list[Any]]]:
    """(library, name) -> rows of owner, local name, ndim, verdict, role, names."""
    with gzip.open(path, "rt") as lines:
        return {(library, name): rows for library, name, rows in map(json.loads, lines)}


TRUTH = load(Path(__file__).parent / "data" / "truth.jsonl.gz")
