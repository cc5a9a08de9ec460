"""What a method is, and the registry of methods.

A method says how one side (keys or values) of a layer is fitted, and names the form that it makes: how that side is
stored, cached and read (`mea_compress.modeling.section_mea.Form`). It is a frozen dataclass, its fields are its
options, and it has a function `keys`, `values` or both, each a `Fit`::

    @register
    @dataclass(frozen=True)
    class Mine:
        name: ClassVar[str] = "mine"
        form: ClassVar[Form] = REAL
        strength: float = 1.0

        def values(self, heads, statistics, options): ...

From then on recipes and flags take it, in this process. An entry point of the group ``mea_compress.methods`` in an
installed package makes it known everywhere. A field with the metadata ``setting`` takes its value from the recipe's
setting of that name where the recipe does not say it beside the method's name.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_type_hints

from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import FORM_OF, Form

if TYPE_CHECKING:
    from mea_compress.heads.composed import FactoredHeads
    from mea_compress.heads.statistics import LayerStatistics
    from mea_compress.heads.types import AttentionHeads

ENTRY_POINTS = "mea_compress.methods"
_MODULES = {
    "head": "head",
    "frequency": "frequency",
    "latent": "latent",
    "joint": "latent",
    "pool": "pool",
    "prune": "prune",
    "share": "share",
}
BUILT_IN = tuple(_MODULES)
"""Names of the methods that come with the package."""

DEFAULT_METHODS = {"key": "frequency", "value": "latent"}
"""The closest methods that decode without keys being rebuilt, where a recipe leaves the choice open."""

Choice = str | Mapping[str, Any]
"""A method as recipes name it: its name, or a mapping of ``method`` to the name and of options to their values."""


class Choices(Protocol):
    """What a recipe says of the methods; it may have settings that are options of some of them."""

    @property
    def key_composition(self) -> Choice | None:
        """The method of keys."""
        ...

    @property
    def value_composition(self) -> Choice | None:
        """The method of values."""
        ...


@dataclass(frozen=True)
class CompositionOptions:
    """Component count and options of one fit.

    Attributes:
        components: Component heads, C; the side caches C · head_dim numbers a token, which may be part of a head
            for forms that are `fractional`.
        fit: ``weights``, ``activations`` or ``aligned``.
        other: Component heads of the other side (`joint` divides what both have).
        rotary_components: Components of each rotary pair where all layers have the same, else None.
    """

    components: float
    fit: str
    other: float = 0
    rotary_components: tuple[int, ...] | None = None

    def width(self, head_dim: int) -> int:
        """Return the numbers that the side caches a token."""
        return round(self.components * head_dim)


class Fit(Protocol):
    """Fits the keys or the values of a layer; it never sees a file or a model."""

    def __call__(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions, /
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Return the factored side, and the layer whose remaining parts fit it.

        Args:
            heads: The layer, NumPy arrays in float64.
            statistics: Of its inputs over the calibration text; None with the ``weights`` fit.
            options: Component count and fit.

        Returns:
            Components and weight of the side, and the layer, whose queries or o_proj may have changed basis.
        """
        ...


class Method(Protocol):
    """How one side of a layer is fitted: options as fields, and a `Fit` named ``keys``, ``values`` or both.

    Attributes:
        name: What recipes, flags and the ``mea`` section call it.
        form: The form that it makes.
        needs_queries: Whether it reads or changes q_proj or o_proj even with the ``weights`` fit; taken to be so where
            it is left out.
        allocates_alike: Whether every layer allocates its components to rotary pairs in one way (forms with
            `per_pair`); may be left out where it does not.
        shares_allocation: Whether that way comes from the energies of all layers together, which `energies` of the
            method gives for each; may be left out.
    """

    name: ClassVar[str]
    form: ClassVar[Form]


M = TypeVar("M", bound=type)
_methods: dict[str, type[Method]] = {}


def register(method: M) -> M:
    """Make a method known under its name; for use as a decorator of its class.

    Raises:
        RequestError: It is no method, or the name is taken.

    Example:
        >>> @register
        ... class Nameless:
        ...     pass
        Traceback (most recent call last):
        ...
        mea_compress.errors.RequestError: Nameless has no name or no form; give a method both as class attributes
    """
    name, form = getattr(method, "name", None), getattr(method, "form", None)
    if not isinstance(name, str) or not isinstance(form, Form):
        raise RequestError(f"{method.__name__} has no name or no form; give a method both as class attributes")
    if not sides(method):
        raise RequestError(f"method {name} fits neither side; give it a function keys, values or both")
    if not set(sides(method)) <= set(form.sides):
        raise RequestError(f"method {name} fits a side that the form {form.name} cannot have; choose another form")
    known = _methods.get(name)
    same = known is not None and (known.__module__, known.__qualname__) == (method.__module__, method.__qualname__)
    inside = method.__module__ == f"{__package__}.{_MODULES.get(name)}"
    if (known is not None and not same) or (name in FORM_OF and not inside):
        raise RequestError(f"the name {name} is taken by another method; choose another name")
    _methods[name] = method
    return method


def sides(method: type[Method]) -> tuple[str, ...]:
    """Return the sides that a method fits: ``key``, ``value`` or both."""
    return tuple(side for side in ("key", "value") if hasattr(method, f"{side}s"))


def methods() -> dict[str, type[Method]]:
    """Return every method that is known, by name: built in, registered, and from entry points."""
    built_in = {name: find_method(name) for name in BUILT_IN}
    _load_entry_points()
    return built_in | _methods


def find_method(name: str) -> type[Method]:
    """Return the method of a name.

    Raises:
        RequestError: There is none.

    Example:
        >>> find_method("prun")
        Traceback (most recent call last):
        ...
        mea_compress.errors.RequestError: there is no method 'prun'; did you mean prune?
    """
    if name not in _methods and name in _MODULES:
        importlib.import_module(f"{__package__}.{_MODULES[name]}")
    if name not in _methods:
        _load_entry_points(name)
    if name not in _methods:
        known = sorted(methods())
        near = difflib.get_close_matches(name, known, n=1)
        raise RequestError(
            f"there is no method {name!r}; "
            + (f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}, or register it first")
        )
    return _methods[name]


def _load_entry_points(name: str | None = None) -> None:
    """Import the methods that installed packages announce, or the one of a name."""
    for point in entry_points(group=ENTRY_POINTS):
        if name in (None, point.name) and point.name not in _methods:
            register(point.load())


def method_name(choice: Choice) -> str:
    """Return the name of the method that a recipe's choice means."""
    return choice if isinstance(choice, str) else str(choice["method"])


def side_choice(recipe: Choices, side: str, name: str) -> Choice:
    """Return the recipe's choice of a method for one side, or its name where the recipe leaves it to the plan."""
    choice = recipe.key_composition if side == "key" else recipe.value_composition
    return choice if choice is not None and method_name(choice) == name else name


def method_form(name: str) -> Form:
    """Return the form that a method makes; the built-in ones are not imported for it."""
    return FORM_OF[name] if name in FORM_OF else find_method(name).form


def check_choice(choice: Choice, side: str) -> None:
    """Refuse a choice of a method that cannot be carried out.

    Args:
        choice: As a recipe has it.
        side: ``key`` or ``value``.

    Raises:
        RequestError: No such method, not for this side, or not its options.
    """
    if isinstance(choice, str) and choice in BUILT_IN and side in FORM_OF[choice].sides:
        return
    if not isinstance(choice, str) and not isinstance(choice.get("method"), str):
        raise RequestError(f"names no method in {dict(choice)!r}; add one, as in {{method: prune, by: contribution}}")
    method = find_method(method_name(choice))
    if side not in sides(method):
        fitting = [name for name, other in methods().items() if side in sides(other)]
        raise RequestError(f"method {method.name} does not fit {side}s; choose one of {', '.join(fitting)}")
    configured(choice)


def configured(choice: Choice, recipe: Choices | None = None) -> Any:
    """Return the method that a choice means, with its options.

    Args:
        choice: As a recipe has it.
        recipe: Whose settings stand for options that the choice does not name; without it their defaults do.

    Raises:
        RequestError: The method has no such option, or not with this value.
    """
    method: Any = find_method(method_name(choice))
    stated = {} if isinstance(choice, str) else {key: value for key, value in choice.items() if key != "method"}
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    known = [field.name for field in fields]
    for key in stated:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) if known else 'none'}"
            raise RequestError(f"method {method.name} has no option {key}; {hint}")
    settings = {field.name: field.metadata["setting"] for field in fields if "setting" in field.metadata}
    from_recipe = {} if recipe is None else {key: getattr(recipe, name) for key, name in settings.items()}
    return method(**from_recipe | {key: _checked(method, key, value) for key, value in stated.items()})


def _checked(method: type[Method], option: str, value: object) -> object:
    """Return an option's value, which is of the type that the method declares."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(get_type_hints(method)[option]).validate_python(value)
    except ValidationError as error:
        expectation = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
        raise RequestError(f"option {option} of method {method.name} {expectation}, not {value!r}") from None


def method_allocates_alike(choice: Choice, recipe: Choices) -> bool:
    """Return whether the method allocates components to rotary pairs in the same way in every layer."""
    return bool(getattr(configured(choice, recipe), "allocates_alike", False))


def method_shares_allocation(choice: Choice, recipe: Choices) -> bool:
    """Return whether the components of rotary pairs come from the energies of all layers together."""
    return bool(getattr(configured(choice, recipe), "shares_allocation", False))


def method_needs_queries(choice: Choice, recipe: Choices) -> bool:
    """Return whether the method reads or changes q_proj or o_proj even where the fit looks at weights alone."""
    return bool(getattr(configured(choice, recipe), "needs_queries", True))
