"""Recipes as files: the built-in ones, those that extend others, and values that are changed on top of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from mea_compress.errors import RequestError
from mea_compress.recipe.settings import EXTENDS, Recipe, field_hint, settings_in, validated, value_type

_COUNTS = ("key_components", "value_components")


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name, in alphabetical order.

    They lie in `recipes` inside an installed package, and beside the package in a source checkout.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    directory = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def load_recipe(name_or_file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a built-in name or a YAML file, with flags on top of it.

    A file may say ``extends: NAME|FILE``: it then holds only what is different there. Its keys win over those of the
    recipe it extends, those of the sections `heal` and `evaluate` one by one. FILE is relative to the file with it.

    Args:
        name_or_file: A built-in recipe's name, a YAML file, or None for the defaults alone.
        overrides: Values by field name that win over the recipe's, those of a section as ``heal.steps``; None means
            "not given".

    Returns:
        The validated recipe. It says how much to keep: `kv_ratio`, `key_components` or `value_components` is set.

    Raises:
        RequestError: No such recipe, not YAML, an unknown key, a wrong type, an impossible value, a recipe that extends
            itself, or nothing that says how much to keep.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if name_or_file is not None:
        values, origins = _read_chain(_find(name_or_file))
    where = "the recipe" if name_or_file is None else str(_find(name_or_file))
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    return _saying_how_much(validated(Recipe, _changed(values, flags), where, flags, origins))


def make_recipe(recipe: Recipe | Path | str | None, settings: Mapping[str, Any]) -> Recipe:
    """Return a recipe from what a call in Python names: a recipe, its name or file, and fields that win over it.

    Args:
        recipe: A `Recipe`, a built-in recipe's name, a YAML file, or None for the defaults.
        settings: Values by field name, those of a section as ``heal.steps``; None means "not given".

    Raises:
        RequestError: As `load_recipe`.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, settings)
    flags = {name: value for name, value in settings.items() if value is not None}
    values = _changed(recipe.model_dump(exclude_unset=True), flags)
    return _saying_how_much(validated(Recipe, values, "the recipe", flags))


def _saying_how_much(recipe: Recipe) -> Recipe:
    """Return a recipe that says how much of the cache to keep.

    Raises:
        RequestError: It does not.
    """
    if not recipe.says_how_much:
        raise RequestError(
            "nothing says how much of the cache to keep: give `kv_ratio` 0.5, or `key_components` and "
            "`value_components`"
        )
    return recipe


def read_changes(changes: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values of changes such as ``kv_ratio=0.25`` or ``heal.steps=100``, typed as their fields are.

    A value in brackets or braces is read as YAML, so that ``text=[a.txt, b.txt]`` names two texts. A value that its
    field cannot take stays text: who makes a recipe of it says so.

    Args:
        changes: ``key=value``, the key of a section behind its name and a dot.
        given: Values by field name that stand beside them; None means "not given".

    Raises:
        RequestError: A change has no key and value, names no field, or one that is given already.
    """
    values = {name: value for name, value in (given or {}).items() if value is not None}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise RequestError(f"`set` {change} changes nothing: write KEY=VALUE, such as kv_ratio=0.5")
        if name in values:
            raise RequestError(f"`set` {change} is one of two values for {name}: give one")
        values[name] = _typed(_field_type(name), text)
    return values


def _field_type(name: str) -> Any:
    """Return the type of the field that a dotted name leads to."""
    keys = name.split(".")
    inside: type[BaseModel] | None = Recipe
    annotation: Any = None
    for count, key in enumerate(keys, start=1):
        if inside is None:
            raise RequestError(f"`set` {name} leads nowhere: {'.'.join(keys[: count - 1])} has one value, without keys")
        if key not in inside.model_fields:
            raise RequestError(f"`set` names the unknown key {name}: {field_hint(keys[:count])}")
        annotation = inside.model_fields[key].annotation
        inside = next(iter(settings_in(annotation)), None)
    return value_type(annotation)


def _typed(kind: Any, text: str) -> Any:
    if text[:1] + text[-1:] in ("[]", "{}"):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError:
            return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with others on top, which win over whatever was said of the same."""
    # A share says what counts of components would say too.
    changed = {key: value for key, value in values.items() if "kv_ratio" not in changes or key not in _COUNTS}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if field:
            inside = changed.get(section)
            changed[section] = {**(inside if isinstance(inside, Mapping) else {}), field: value}
        else:
            changed[name] = value
    return changed


def _read_chain(path: Path, below: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a file on top of those it extends, and by the same dotted names which file said each."""
    if any(path.samefile(file) for file in below):
        chain = " -> ".join(str(file) for file in (*below, path))
        raise RequestError(f"{path} extends itself ({chain}): let one of them stand alone")
    values = _read_yaml(path)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in _SECTIONS and value:
            changes |= {f"{name}.{field}": inside for field, inside in value.items()}
        else:
            changes[name] = value
    base: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if EXTENDS in changes:
        base, origins = _read_chain(_find_base(changes.pop(EXTENDS), path), (*below, path))
    # What goes wrong in a section as a whole is this file's too.
    said = {name: str(path) for name in [*changes, *values] if name != EXTENDS}
    return _changed(base, changes), origins | said


_SECTIONS = tuple(name for name, field in Recipe.model_fields.items() if settings_in(field.annotation))


def _find_base(name: object, path: Path) -> Path:
    if not isinstance(name, str):
        raise RequestError(f"{EXTENDS} in {path} should name a built-in recipe or a YAML file, not {name!r}")
    try:
        return _find(name, path.parent)
    except RequestError as error:
        raise RequestError(f"{path} extends what cannot be found: {str(error)[:1].lower()}{str(error)[1:]}") from None


def _find(name_or_file: str | Path, directory: Path = Path()) -> Path:
    builtins = builtin_recipes()
    name = str(name_or_file)
    if name in builtins:
        return builtins[name]
    path = directory / name_or_file
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, builtins, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the built-in ones are {', '.join(builtins)}"
    raise RequestError(f"there is no recipe file or built-in recipe {str(path if directory.name else name)!r}: {hint}")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as a recipe: {error}") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise RequestError(f"{path} is not valid YAML: {problem}{line}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RequestError(f"{path} is not a recipe: it should hold `key: value` lines, such as `kv_ratio: 0.5`")
    return values
