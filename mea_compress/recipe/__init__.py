"""What is asked for: settings that are flags, recipe keys and documentation at once, and recipes read from YAML."""

from mea_compress.recipe.loading import builtin_recipes, load_recipe, make_recipe, read_changes
from mea_compress.recipe.settings import (
    FORMER_NAMES,
    EvaluateRecipe,
    HealRecipe,
    Recipe,
    budget_file,
    compression_settings,
    from_flags,
    given_settings,
    parse_counts,
    parse_names,
    parse_size,
    select_layers,
    to_yaml,
    value_type,
)

__all__ = [
    "FORMER_NAMES",
    "EvaluateRecipe",
    "HealRecipe",
    "Recipe",
    "budget_file",
    "builtin_recipes",
    "compression_settings",
    "from_flags",
    "given_settings",
    "load_recipe",
    "make_recipe",
    "parse_counts",
    "parse_names",
    "parse_size",
    "read_changes",
    "select_layers",
    "to_yaml",
    "value_type",
]
