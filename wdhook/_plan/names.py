"""Names of parameters that have others at times: wrappers, parametrizations, pruning and adapters
rename them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .._roles.marks import bare_name

# The parts of parameter names that parametrizations, pruning, the older norms of weights, and
# adapters insert or append.
_RENAMED = re.compile(
    r"(?<![^.])(?:(?:base_layer|original_module|modules_to_save\.[^.]+)\."
    r"|parametrizations\.(?P<local>\w+)\.original\d*$|(?P<pruned>\w+)_orig$|(?P<normed>weight\w*)_v$)"
)


def former_name(name: str) -> str:
    """The name before the parameter was renamed."""
    return _RENAMED.sub(_former_part, name)


def _former_part(found: re.Match[str]) -> str:
    return found["local"] or found["pruned"] or found["normed"] or ""


def plain_name(name: str) -> str:
    """The name without the traces of wrappers and renaming."""
    return former_name(bare_name(name))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name → plain name; the name itself where several have one plain name."""
    plain = {name: plain_name(name) for name in names}
    count = Counter(plain.values())
    return {name: short if count[short] == 1 else name for name, short in plain.items()}
