"""What is asked for: settings that are flags, recipe keys and documentation at once, and recipes read from YAML."""

from mea_compress.recipe.settings import (
    EvaluateRecipe,
    HealRecipe,
    Recipe,
    budget_file,
    builtin_recipes,
    from_flags,
    given_settings,
    load_recipe,
    make_recipe,
    parse_counts,
    parse_size,
    select_layers,
    to_yaml,
    value_type,
)

__all__ = [
    "EvaluateRecipe",
    "HealRecipe",
    "Recipe",
    "budget_file",
    "builtin_recipes",
    "from_flags",
    "given_settings",
    "load_recipe",
    "make_recipe",
    "parse_counts",
    "parse_size",
    "select_layers",
    "to_yaml",
    "value_type",
]
