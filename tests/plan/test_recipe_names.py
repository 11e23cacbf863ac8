"""The names of recipes, for type checkers and for tools that read YAML."""

from __future__ import annotations

from typing import get_args

from wdhook._plan.recipes import RECIPES, Recipe


def test_the_type_has_every_recipe_and_no_other() -> None:
    """`Recipe` lists the keys of the table, in its order."""
    assert get_args(Recipe) == tuple(RECIPES)
