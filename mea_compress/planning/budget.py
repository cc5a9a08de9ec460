"""Widths of every layer's keys and values under one budget, from the measured cost of each (METHOD §7 and §9).

Costs of single sides add up almost exactly, so the best widths are found by dynamic programming over sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd
from pathlib import Path

import numpy as np

from mea_compress.errors import RequestError
from mea_compress.heads.composed import Array
from mea_compress.modeling.section_mea import cached_width
from mea_compress.planning.profiles import Profile
from mea_compress.planning.types import LayerPlan, LayerSpec, Plan, SideSpec

# Widths of a side that are considered, at most.
_OPTIONS = 64
# Costs below this, in nats per token, are equal to nothing: logarithms are interpolated.
_NOTHING = 1e-6
# What each side's absence counts on top, so that of widths that cost nothing the widest is taken.
_PREFERENCE = 1e-12


@dataclass(frozen=True)
class _Option:
    """One way to cache one side of a layer.

    Attributes:
        channels: Numbers a token that it caches, without what lies beside keys.
        spec: The side, or both sides where they read one latent.
        cost: KL in nats per token.
    """

    channels: int
    spec: tuple[SideSpec, ...]
    cost: float


def candidates(layer: LayerPlan, plan: Plan) -> dict[str, list[float]]:
    """Return the component heads at which each side of a layer is profiled, ascending: shares of what it caches.

    Quarters where the fit is to be fast, sixths otherwise, and of these the first, third and fifth where there is a
    time limit: what they predict of SmolLM2's best widths is within 4 % of what all do, in two thirds of the time.

    Args:
        layer: The layer as it is planned.
        plan: The plan.
    """
    parts = 4 if plan.recipe.effort == "fast" else 6
    every = 1 if parts == 4 or plan.recipe.time_limit is None else 2
    specs = (
        {"both": layer.spec.key} if layer.spec.key.form.joint else {"key": layer.spec.key, "value": layer.spec.value}
    )
    found = {}
    for side, spec in specs.items():
        before = layer.before.key if side == "both" else layer.before.side(side)
        step = spec.form.step(plan.source.head_dim)
        whole = before.components * (2 if side == "both" else 1)
        if side == "both":
            step *= 2
        counts = {round(whole * part / parts / step) * step for part in range(1, parts, every)}
        allowed = sorted(count for count in counts if 0 < count < whole and _divides(spec, count, plan))
        if allowed:
            found[side] = [int(count) if count.denominator == 1 else float(count) for count in allowed]
    return found


def with_side(layer: LayerPlan, side: str, components: float) -> LayerPlan:
    """Return a layer of which one side alone is compressed."""
    if side == "both":
        half = components / 2
        spec = LayerSpec(replace(layer.spec.key, components=half), replace(layer.spec.value, components=half))
    else:
        compressed = replace(layer.spec.side(side), components=components)
        keys = compressed if side == "key" else layer.before.key
        values = compressed if side == "value" else layer.before.value
        spec = LayerSpec(keys, values)
    return replace(layer, spec=spec)


def cost_at(profile: Profile, layer: int, side: str, components: Sequence[float], whole: float) -> Array:
    """Return the KL of one side at any widths, (N,): its logarithm is linear between what was measured.

    Beyond the narrowest measured width the curve goes on as steeply as it begins; at the whole width it costs nothing.

    Args:
        profile: What was measured.
        layer: Number of the layer.
        side: ``key``, ``value`` or ``both``.
        components: Component heads, (N,).
        whole: Component heads that the source caches.

    Raises:
        RequestError: The profile has nothing of the layer.
    """
    kept, costs = profile.curve(layer, side)
    if not kept:
        raise RequestError(
            f"the profile of {profile.source} has nothing of layer {layer}'s {side}s; measure it again with "
            "`mea-compress profile` and the same methods and layers"
        )
    x = np.array([*kept, whole])
    y = np.log(np.maximum([*costs, 0.0], _NOTHING))
    wanted = np.asarray(components, float)
    found = np.interp(wanted, x, y)
    steep = min(0.0, (y[1] - y[0]) / (x[1] - x[0]))
    below = wanted < x[0]
    found[below] = y[0] + (wanted[below] - x[0]) * steep
    return np.exp(found)


def allocate(plan: Plan, profile: Profile) -> tuple[dict[int, LayerSpec], float]:
    """Choose the widths that cost least under the plan's share of the cache.

    Args:
        plan: The plan, in which every chosen layer has the same widths.
        profile: What each side costs by width; of the same model and methods.

    Returns:
        How each chosen layer is cached, by number, and the KL in nats per token that the profile predicts.

    Raises:
        RequestError: The profile is of another model or other methods, or the share is less than the least widths take.
    """
    _check(plan, profile)
    layers = [layer for layer in plan.layers if layer.compressed]
    sides = [(layer, side) for layer in layers for side in candidates(layer, plan)]
    choices = [_options(plan, profile, layer, side) for layer, side in sides]
    budget = _channels(plan, layers)
    unit = gcd(*(option.channels for options in choices for option in options))
    taken, cost = _knapsack([[(o.channels // unit, o.cost) for o in options] for options in choices], budget // unit)
    if taken is None:
        raise RequestError(
            f"`kv_ratio` {plan.recipe.kv_ratio:g} is less than the narrowest widths of all layers take; give more"
        )
    specs = {layer.layer: layer.spec for layer in layers}
    for (layer, side), options, index in zip(sides, choices, taken, strict=True):
        chosen = options[index].spec
        key, value = specs[layer.layer].key, specs[layer.layer].value
        if side == "both":
            key, value = chosen
        elif side == "key":
            (key,) = chosen
        else:
            (value,) = chosen
        specs[layer.layer] = LayerSpec(key, value)
    return specs, cost


def predicted_cost(plan: Plan, profile: Profile) -> float:
    """Return the KL in nats per token that a profile predicts of a plan's widths.

    Args:
        plan: The plan.
        profile: What each side costs by width; of the same model and methods.
    """
    cost = 0.0
    for layer in plan.layers:
        for side in candidates(layer, plan) if layer.compressed else ():
            sides = ("key", "value") if side == "both" else (side,)
            kept, whole = (sum(spec.side(one).components for one in sides) for spec in (layer.spec, layer.before))
            cost += float(cost_at(profile, layer.layer, side, [kept], whole)[0])
    return cost


def is_profile(file: Path) -> bool:
    """Return whether a budget's file is a profile, and not a list of widths.

    Raises:
        RequestError: It cannot be read, or is no JSON.
    """
    try:
        return "points" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"{file} cannot be read as a budget ({error}); give a profile, or a list of widths"
        ) from None


def read_widths(file: Path) -> dict[int, tuple[float, float]]:
    """Read an explicit list of component heads, of keys and of values, by layer.

    Raises:
        RequestError: It cannot be read, or is no such list.
    """
    try:
        layers = json.loads(file.read_text(encoding="utf-8"))["layers"]
        return {
            int(layer["layer"]): (float(layer["key_components"]), float(layer["value_components"])) for layer in layers
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{file} cannot be read as a budget ({type(error).__name__}: {error}); give a profile, or JSON such as "
            '{"layers": [{"layer": 0, "key_components": 1.5, "value_components": 2}]}'
        ) from None


def _check(plan: Plan, profile: Profile) -> None:
    source = plan.source
    expected = {"layers": source.config.num_hidden_layers, "heads": source.heads}
    expected["head_dim"] = source.head_dim
    for name, value in expected.items():
        if getattr(profile, name) != value:
            raise RequestError(
                f"the profile is of a model with {name} {getattr(profile, name)} and this one has {value}; measure one "
                "of this model with `mea-compress profile`"
            )
    for layer in plan.layers:
        methods = (layer.spec.key.composition, layer.spec.value.composition)
        if layer.compressed and methods != (profile.key_composition, profile.value_composition):
            raise RequestError(
                f"the profile is of {profile.key_composition} keys and {profile.value_composition} values, and "
                f"{methods[0]} and {methods[1]} are planned; measure one of these with `mea-compress profile`"
            )


def _options(plan: Plan, profile: Profile, layer: LayerPlan, side: str) -> list[_Option]:
    """Return the ways to cache a side: some of its widths, and as it is."""
    spec = layer.spec.key if side == "both" else layer.spec.side(side)
    before = layer.before.key if side == "both" else layer.before.side(side)
    both, head_dim = (2 if side == "both" else 1), plan.source.head_dim
    whole = cached_width(before.components, head_dim)
    step = _step(plan, spec, whole)
    widths = [width for width in range(step, whole, step) if _divides(spec, width / head_dim, plan)]
    costs = cost_at(profile, layer.layer, side, [both * width / head_dim for width in widths], both * before.components)
    options = []
    for width, cost in zip(widths, costs.tolist(), strict=True):
        count = width // head_dim if width % head_dim == 0 else width / head_dim
        chosen = [replace(spec, components=count)]
        if side == "both":
            chosen.append(replace(layer.spec.value, components=count))
        options.append(_Option(both * width, tuple(chosen), cost + _PREFERENCE * (1 - width / whole)))
    kept = (layer.before.key, layer.before.value) if side == "both" else (before,)
    return [*options, _Option(both * whole, kept, 0.0)]


def _step(plan: Plan, spec: SideSpec, whole: int) -> int:
    """Return the channels by which widths differ: what was asked for, or so that there are not too many."""
    step = int(spec.form.step(plan.source.head_dim) * plan.source.head_dim)
    multiple = plan.recipe.width_multiple
    if multiple is not None:
        wanted = step * multiple // gcd(step, multiple)
        if wanted >= whole:
            raise RequestError(
                f"`width_multiple` {multiple} leaves no width below the {whole} channels that a side caches; give less"
            )
        return wanted
    while whole // step > _OPTIONS:
        step *= 2
    return step


def _channels(plan: Plan, layers: Sequence[LayerPlan]) -> int:
    """Return the numbers a token that all sides together may cache, without what lies beside keys."""
    config, head_dim = plan.source.config, plan.source.head_dim
    heads, norm = plan.source.heads, config.mea["qk_norm"]
    before = beside = 0
    for layer in layers:
        sides = (layer.before.key, layer.before.value)
        before += sum(cached_width(side.components, head_dim) for side in sides)
        before += layer.before.key.form.beside(heads, norm)
        beside += layer.spec.key.form.beside(heads, norm)
    assert plan.recipe.kv_ratio is not None
    return int(plan.recipe.kv_ratio * before + 1e-6) - beside


def _divides(spec: SideSpec, count: float | Fraction, plan: Plan) -> bool:
    """Return whether a form that repeats components can have so many."""
    return not spec.form.repeats or plan.source.heads % count == 0


def _knapsack(choices: Sequence[Sequence[tuple[int, float]]], budget: int) -> tuple[list[int] | None, float]:
    """Take one option of each choice so that their sizes fit the budget and their costs are least.

    Args:
        choices: Sizes and costs of the options of each choice.
        budget: Most that the sizes may add up to.

    Returns:
        The index of the option taken of each choice, None where nothing fits; and the sum of costs.
    """
    best = np.zeros(budget + 1)  # least cost of the choices so far at each sum of sizes at most
    taken = []
    for options in choices:
        costs = np.full(budget + 1, np.inf)
        index = np.zeros(budget + 1, np.int32)
        for number, (size, cost) in enumerate(options):
            if size > budget:
                continue
            tried = np.full(budget + 1, np.inf)
            tried[size:] = best[: budget + 1 - size] + cost
            better = tried < costs
            costs[better], index[better] = tried[better], number
        best = costs
        taken.append(index)
    if not np.isfinite(best[budget]):
        return None, np.inf
    left, chosen = budget, []
    for index, options in zip(reversed(taken), reversed(choices), strict=True):
        number = int(index[left])
        chosen.append(number)
        left -= options[number][0]
    return chosen[::-1], float(best[budget])


def explicit(plan: Plan, widths: Mapping[int, tuple[float, float]]) -> dict[int, LayerSpec]:
    """Return how each layer of an explicit list is cached.

    Raises:
        RequestError: A width is not possible, or a layer is not there.
    """
    specs = {}
    heads, head_dim = plan.source.heads, plan.source.head_dim
    for number, counts in widths.items():
        if not 0 <= number < len(plan.layers):
            raise RequestError(f"the budget names layer {number}, but the model has {len(plan.layers)}")
        layer = plan.layers[number]
        sides = []
        for side, count in zip(("key", "value"), counts, strict=True):
            spec, before = layer.spec.side(side), layer.before.side(side)
            width = count * head_dim
            step = float(spec.form.step(head_dim) * head_dim)
            if count == before.components:
                sides.append(before)
            elif spec.form.identity:
                raise RequestError(
                    f"the budget gives layer {number} {count:g} {side} components, and its {side}s stay as they are: "
                    "leave it out of the budget, or name a composition for them"
                )
            elif 0 < count <= heads and width % step == 0 and _divides(spec, count, plan):
                sides.append(replace(spec, components=int(count) if count == int(count) else count))
            else:
                raise RequestError(
                    f"the budget gives layer {number} {count:g} {side} components, and {spec.composition} allows up "
                    f"to {heads} in steps of {step / head_dim:g}"
                )
        specs[number] = LayerSpec(*sides)
    return specs


__all__ = ["allocate", "candidates", "cost_at", "explicit", "is_profile", "read_widths", "with_side"]
