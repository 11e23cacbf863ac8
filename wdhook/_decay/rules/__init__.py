"""The rules: facts of a training come in, problems go out, and become errors and warnings.

Each rule is one row of `RULES` (in `table`) with a pure function. A rule knows nothing of hooks and
steps, and writes nothing. A count for one rule alone is kept by that rule.
"""
