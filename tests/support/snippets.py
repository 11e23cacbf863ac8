"""Reads the code blocks of the documentation."""

from __future__ import annotations

import re

IMPORT = re.compile(r"^(?:import|from) (?P<package>\w+)", re.MULTILINE)
