"""What is swept: methods, shares and budgets, each combination a recipe with a name and the commands that repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mea_compress.errors import RequestError
from mea_compress.recipe import Recipe, make_recipe

SHARES = (0.25, 0.5, 0.75)
"""Shares of the cache that are kept where none are asked for."""

DEFAULT = "default"
"""The method that leaves keys and values to the recipe and, where that is silent, to `compress`."""


@dataclass(frozen=True)
class GridPoint:
    """One way to compress.

    Attributes:
        name: Of the directory it is made in, unlike that of any other.
        method: As it was asked for: ``frequency+latent``, ``joint`` or ``default``.
        share: Of the cache to keep.
        budget: How layers share it; None leaves it to `compress`.
        recipe: All that `compress` is told.
    """

    name: str
    method: str
    share: float
    budget: str | None
    recipe: Recipe


def grid(
    recipe: Recipe, methods: Sequence[str], shares: Sequence[float], budgets: Sequence[str | None]
) -> list[GridPoint]:
    """Return every combination, by method, then budget, then share.

    Args:
        recipe: What all have in common.
        methods: ``KEY+VALUE``, one name for both sides, or ``default``.
        shares: Of the cache to keep.
        budgets: As recipes name them; None for what the recipe says.

    Raises:
        RequestError: Something is asked for twice, or is no method, share or budget.
    """
    for name, asked in (("methods", methods), ("shares", shares), ("budgets", budgets)):
        if not asked:
            raise RequestError(f"`{name}` names nothing to sweep over: give one or more, or leave it out")
        for value in asked:
            if list(asked).count(value) > 1:
                raise RequestError(f"`{name}` has {value} twice: give it once")
    common = recipe.model_copy(update={"source": None, "out": None, "evaluate": None})
    points: list[GridPoint] = []
    for method, budget, share in product(methods, budgets, shares):
        settings = _sides(method) | {"kv_ratio": share, "budget": budget}
        stem = Path(budget).stem if budget else None
        name = re.sub(r"[^\w.+-]", "_", "-".join(filter(None, [method, stem, f"{share:g}"])))
        names = [point.name for point in points]
        count = sum(other == name or other.startswith(f"{name}~") for other in names)
        name = f"{name}~{count}" if count else name
        points.append(GridPoint(name, method, share, budget, make_recipe(common, settings)))
    return points


def _sides(method: str) -> dict[str, Any]:
    """Return the settings that a method's name stands for."""
    if method == DEFAULT:
        return {}
    keys, _, values = method.partition("+")
    return {"key_composition": keys.strip(), "value_composition": values.strip() or keys.strip()}


def commands(point: GridPoint, source: Path | str, evaluation: dict[str, Any]) -> list[str]:
    """Return the commands that make a point again and measure it, in the current directory.

    Args:
        point: The point.
        source: The checkpoint, as it was named.
        evaluation: Fields of `EvaluateRecipe` that it is measured with.
    """
    recipe = point.recipe.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    recipe.pop("description", None)
    program = ["mea-compress"]
    compress = [*program, "compress", str(source), point.name, *_flags(recipe)]
    evaluate = [*program, "evaluate", point.name, "--reference", str(source), *_flags(evaluation)]
    return [shlex.join(words) for words in (compress, evaluate)]


def _flags(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [flag, f"{item:g}" if isinstance(item, float) and float(f"{item:g}") == item else str(item)]
    return words


__all__ = ["DEFAULT", "SHARES", "GridPoint", "commands", "grid"]
