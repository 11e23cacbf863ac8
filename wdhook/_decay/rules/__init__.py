"""The rules: facts of a training come in, problems go out, and errors or warnings are made of them.

Each rule is one row of `RULES` (in `table`) with a pure function. A rule knows nothing of hooks
and steps, and writes nothing. What only one rule counts is kept by that rule.
"""
