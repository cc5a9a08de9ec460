"""What follows from a checkpoint and a recipe together; the plan asks once, and nobody asks again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from mea_compress.architectures import Checkpoint
from mea_compress.architectures.families import LayerGeometry
from mea_compress.checkpoint.dtypes import DTYPE_NAMES
from mea_compress.checkpoint.system import gpu_bytes, memory_bytes
from mea_compress.compositions.base import (
    DEFAULT_METHODS,
    method_form,
    method_name,
    method_needs_queries,
    method_shares_allocation,
    side_choice,
)
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import ENCODED, Form, cached_width
from mea_compress.planning.sizes import healing_batch, healing_bytes
from mea_compress.planning.types import Decisions, LayerPlan, LayerSpec, SideSpec
from mea_compress.recipe import Recipe, budget_file

# Calibration text where the recipe names no amount: this many tokens, in sequences of this length at most.
_CALIBRATION_TOKENS = 1 << 17
_CALIBRATION_SEQUENCE = 1024
# Whole models up to this many bytes of weights are loaded and run before they are published.
WHOLE_MODEL_BYTES = 32 << 20
# Teacher and student are distilled in memory where they take no more of it than this share.
_MEMORY_SHARE = 0.6
# Hidden size from which layers that are healed are not refined before.
_WIDE = 512
# Steps of 4 K tokens: KL falls fastest in the first of them (0.19 to 0.11 in 25, to 0.084 in 100 on SmolLM2-135M).
_HEALING_STEPS = {"fast": 0, "balanced": 240, "best": 960}
HEALING_EPOCHS = 3
"""Times that a distillation of nobody's number of steps sees its text at most: more of it is learned by heart."""


def decide(source: Checkpoint, recipe: Recipe, layers: Sequence[LayerPlan], choice: str) -> Decisions:
    """Decide what the whole work needs, once its layers are planned."""
    sequences, length = calibration_shape(source, recipe)
    healing = healing_steps(source, recipe, layers, sequences, length)
    steps = refinement_steps(source, recipe, healing > 0)
    calibrated = recipe.fit != "weights" or steps > 0
    measured = measures_budget(recipe, source) and any(layer.compressed for layer in layers)
    searched = (
        not measured
        and budget_file(recipe) is None
        and recipe.fit == "aligned"
        and any(layer.compressed and _can_split(recipe, layer.spec) for layer in layers)
    )
    if measured:
        choice = "; ".join([*filter(None, [choice]), "widths of layers, keys and values by what each of them costs"])
    if searched:
        choice = "; ".join([*filter(None, [choice]), "keys and values divide a layer's budget as trial fits say"])
    return Decisions(
        needs_calibration=calibrated,
        sequences=sequences,
        sequence_length=length,
        refinement_steps=steps,
        measures_budget=measured,
        shares_rotary_allocation=_shares_allocation(recipe, layers, source.at_cache),
        searches_kv_split=searched,
        stored_dtype=stored_dtype(source, recipe),
        has_static_shapes=not calibrated
        and not healing
        and recipe.dtype is None
        and not any(layer.needs_queries for layer in layers if layer.compressed),
        # What stored fp8 is run as depends on the machine.
        verifies_whole_model=source.weight_bytes <= WHOLE_MODEL_BYTES and not source.quantised,
        choice=choice,
        healing_steps=healing,
        healing_asked_for=healing > 0 and recipe.heal != "auto",
    )


def _shares_allocation(recipe: Recipe, layers: Sequence[LayerPlan], at_cache: bool) -> bool:
    """Return whether rotary pairs get the same components in all layers, chosen for all of them together.

    Raises:
        RequestError: It was asked for, and the model is composed at its cache.
    """
    keys = [layer.spec.key for layer in layers if layer.compressed and layer.spec.key.form.per_pair]
    shares = bool(keys) and method_shares_allocation(side_choice(recipe, "key", keys[0].composition), recipe)
    if shares and at_cache:
        raise RequestError(
            "`rotary_allocation` shared is for stock exports, and a model that is composed at its cache has none; use "
            "energy"
        )
    return shares


def measures_budget(recipe: Recipe, source: Checkpoint) -> bool:
    """Return whether widths are chosen by a measured profile: where that was asked for, or nothing speaks against it.

    At the cache it is done where it was asked for alone.

    Args:
        recipe: What was asked for.
        source: The checkpoint.

    Raises:
        RequestError: It was asked for and the rest of the recipe leaves nothing to choose, or no text to measure on.
    """
    obstacles = [
        (source.at_cache and not source.is_alike, "the layers of this model differ in the heads that they cache"),
        (recipe.fit == "weights", "`fit` weights reads no text to measure on"),
        (recipe.kv_ratio is None, "there is no `kv_ratio` to divide"),
        (
            recipe.key_components is not None or recipe.value_components is not None,
            "`key_components` and `value_components` say the widths",
        ),
        (recipe.sequences == 1, "`sequences` 1 leaves none to measure on"),
        (recipe.kv_groups > 1, "`kv_groups` needs widths that are alike"),
        (recipe.split == "even", "`split` even says how keys and values divide it"),
        (recipe.rotary_allocation != "energy", "`rotary_allocation` is for widths that are alike"),
    ]
    found = [reason for holds, reason in obstacles if holds]
    if recipe.budget == "measured" and found:
        raise RequestError(f"`budget` measured cannot be: {found[0]}; leave one of them out")
    asked = ("measured",) if source.at_cache else (None, "measured")
    return not found and recipe.budget in asked and recipe.kv_ratio != 1


def deadline_of(recipe: Recipe) -> float | None:
    """Return when all of a fit that begins now is to be over, on the clock of `time.monotonic`; None for whenever."""
    return None if recipe.time_limit is None else time.monotonic() + 60 * recipe.time_limit


def calibration_shape(source: Checkpoint, recipe: Recipe) -> tuple[int, int]:
    """Return the number of calibration sequences and their length.

    Raises:
        RequestError: The recipe's sequences are longer than the model's context.
    """
    context = getattr(source.config, "max_position_embeddings", None) or _CALIBRATION_SEQUENCE
    length = recipe.sequence_length or min(context, _CALIBRATION_SEQUENCE)
    if length > context:
        raise RequestError(f"`sequence_length` {length} is beyond the model's context of {context}; give a smaller one")
    return recipe.sequences or max(1, _CALIBRATION_TOKENS // length), length


def refinement_steps(source: Checkpoint, recipe: Recipe, healed: bool) -> int:
    """Return the optimiser steps of a layer at most: as asked for, or by effort and the model's width.

    Where wide layers are healed end to end, refining each by itself first takes most of the time and gains least: on
    SmolLM2-135M 24 minutes of it gained what a minute of distillation does.
    """
    if recipe.refine is not None:
        return recipe.refine
    if recipe.fit != "aligned" or recipe.effort == "fast":
        return 0
    if healed and recipe.effort != "best" and source.config.hidden_size >= _WIDE:
        return 0
    # Wide layers cost more a step and are moved further by each.
    steps = max(100, min(300, 300 * 512 // source.config.hidden_size))
    return 3 * steps if recipe.effort == "best" else steps


def healing_steps(source: Checkpoint, recipe: Recipe, layers: Sequence[LayerPlan], sequences: int, length: int) -> int:
    """Return the optimiser steps of the distillation behind the fit at most: as asked for, or by effort where it fits.

    Args:
        source: The checkpoint.
        recipe: What was asked for.
        layers: The plan of every layer.
        sequences: Of the calibration.
        length: Tokens of each.
    """
    if not isinstance(recipe.heal, str) or not any(layer.compressed for layer in layers):
        return 0
    if source.quantised:
        if recipe.heal not in ("auto", "0"):
            raise RequestError(f"`heal` {recipe.heal} trains through weights that are stored in fp8 here; use `heal` 0")
        return 0
    if recipe.heal != "auto":
        return int(recipe.heal)
    if recipe.fit == "weights":  # what the weights alone give is what was asked for
        return 0
    gpu = gpu_bytes(recipe.device)
    memory = gpu or memory_bytes()
    if memory is not None and healing_bytes(source, layers, length, gpu is not None) > _MEMORY_SHARE * memory:
        return 0
    limited = recipe.time_limit is not None and recipe.effort != "fast"
    steps = _HEALING_STEPS["best" if limited else recipe.effort]
    if recipe.text is None:  # sampled text is the calibration's
        steps = min(steps, ceil(HEALING_EPOCHS * sequences / healing_batch(length)))
    return steps


def kept_healing_steps(recipe: Recipe, steps: int) -> int:
    """Return how many of the steps of distillation a limit keeps time for: the others have what is left over."""
    return min(steps, _HEALING_STEPS[recipe.effort]) if recipe.heal == "auto" else steps


def stored_dtype(source: Checkpoint, recipe: Recipe) -> str:
    """Return the safetensors name of the dtype that composed layers are stored in."""
    return DTYPE_NAMES[recipe.dtype] if recipe.dtype else source.dtype


def needs_queries(recipe: Recipe, spec: LayerSpec) -> bool:
    """Return whether a layer's fit reads q_proj and o_proj; if not, only k_proj and v_proj change."""
    if recipe.fit != "weights" or recipe.kv_groups > 1:
        return True
    chosen = (choice for choice in (recipe.key_composition, recipe.value_composition) if choice is not None)
    fitted = (spec.key.composition, spec.value.composition)
    return any(method_needs_queries(choice, recipe) for choice in chosen if method_name(choice) in fitted)


def _can_split(recipe: Recipe, spec: LayerSpec) -> bool:
    """Return whether nobody said how keys and values divide a layer's budget, and both sides can."""
    key, value = spec.key.form, spec.value.form
    open_budget = recipe.split == "auto" and recipe.key_components is None and recipe.value_components is None
    alike = (key.fractional and value.fractional) or (key.scalar and value.scalar)
    return open_budget and alike and recipe.kv_groups == 1 and not key.joint and (recipe.kv_ratio or 1) < 1


def choose_compositions(source: Checkpoint, recipe: Recipe) -> tuple[str, str, str]:
    """Choose the compositions of keys and values, and say why where the recipe left them open.

    The best that decodes without rebuilding keys: a complex composition commutes with RoPE, and o_proj reads values
    through their latent. Both stay exact under a key norm (its scalars are cached) and under a head norm.
    """
    chosen = (recipe.key_composition, recipe.value_composition)
    keys, values = (None if choice is None else method_name(choice) for choice in chosen)
    reasons = []
    if source.at_cache:
        reasons.append(_at_cache(source, recipe))
    if keys is None:
        keys = DEFAULT_METHODS["key"]
        extra = ", with one norm scalar a head cached beside them" if source.config.mea["qk_norm"] else ""
        reasons.append(f"frequency keys: the closest that decode without being rebuilt (they commute with RoPE){extra}")
    if values is None:
        values = DEFAULT_METHODS["value"]
        reasons.append("latent values: the closest at these bytes, read through o_proj")
    if chosen == (None, None) and not source.at_cache:
        reasons.append("joint, as in the recipe best-50, is closer at the same bytes and rebuilds keys at every step")
    return keys, values, "; ".join(reasons)


def _at_cache(source: Checkpoint, recipe: Recipe) -> str:
    """Say that components are made at the cache, and of which layers they are not.

    Raises:
        RequestError: The recipe asks for what cannot be had there.
    """
    name, config = source.family.model_type, source.config
    if recipe.fit == "weights":
        raise RequestError(
            f"`fit` weights looks at k_proj and v_proj, and the attention of {name} is composed at its cache; leave "
            "`fit` out, or choose activations"
        )
    if recipe.kv_groups > 1:
        raise RequestError(f"`kv_groups` divides projections, and those of {name} stay as they are; leave it out")
    if recipe.rotary_allocation == "shared":
        raise RequestError(
            f"`rotary_allocation` shared is for projections, and those of {name} stay as they are; leave it out"
        )
    if budget_file(recipe) is not None and not source.is_alike:
        raise RequestError(
            f"a `budget` from a file counts heads, and the layers of this {name} model differ in those that they "
            "cache; leave it out"
        )
    sentence = f"composed at the cache: the attention of {name} stays its own"
    left = [str(layer) for layer in range(config.num_hidden_layers) if source.geometry(layer) is None]
    if left:
        sentence += f"; no keys and values per head are cached in layers {', '.join(left)}, which are left alone"
    return sentence


def decide_layer(
    source: Checkpoint, recipe: Recipe, geometry: LayerGeometry, keys: str, values: str, before: LayerSpec
) -> LayerSpec:
    """Decide how a chosen layer is cached afterwards.

    Raises:
        RequestError: Components, compositions or groups do not fit the layer.
    """
    heads = geometry.heads
    if source.at_cache and recipe.key_composition is None and not geometry.rotary_dim:
        keys = values  # no positions are rotated, so keys are free to be whatever values are
    spec = LayerSpec(
        _decide_side("key", keys, recipe.key_components, recipe.kv_ratio, before.key, source, geometry),
        _decide_side("value", values, recipe.value_components, recipe.kv_ratio, before.value, source, geometry),
    )
    if spec.key.form.joint != spec.value.form.joint:
        raise RequestError(
            "joint keys and joint values read one latent: give both `key_composition` joint and "
            "`value_composition` joint"
        )
    _check_groups(recipe, before, spec, heads)
    return spec


def _decide_side(
    side: str,
    composition: str,
    count: int | None,
    ratio: float | None,
    before: SideSpec,
    source: Checkpoint,
    geometry: LayerGeometry,
) -> SideSpec:
    """Decide composition and components of one side; a side that nothing is said about stays as it is."""
    if count is None and ratio is None:
        return before
    heads, head_dim = geometry.heads, geometry.dim(side)
    form = method_form(composition)
    if source.at_cache:
        form = _form_at_cache(side, composition, form, source, before)
    components = _components(count, side, ratio, before.components, heads, form.step(head_dim))
    extra = form.beside(heads, False) - before.form.beside(heads, False)
    if side == "key" and extra > 0 and count is None and components < before.components:
        # The ratio is one of bytes: what positions take beside these keys is taken from the keys.
        channels = max(cached_width(components, head_dim) - extra, form.step_channels or head_dim)
        components = channels / head_dim
    if form.repeats and heads % components:
        raise RequestError(
            f"--{side}-composition {composition} needs a number of components that divides the {heads} key/value "
            f"heads, not {components}"
        )
    return SideSpec(composition, components, form)


def _form_at_cache(side: str, composition: str, form: Form, source: Checkpoint, before: SideSpec) -> Form:
    """Return the form that a composition has at the cache of an attention block that stays as it is.

    Raises:
        RequestError: It has none, or the side has been composed before.
    """
    if not before.form.identity:
        raise RequestError(
            f"{source.reader.directory} has been composed at its cache already; compress the original instead"
        )
    if form.name not in ENCODED:
        raise RequestError(
            f"--{side}-composition {composition} changes projections, and the attention of {source.family.model_type} "
            "stays as it is; choose a composition whose form has an encoder, such as the default"
        )
    return ENCODED[form.name]


def _components(
    count: int | None, side: str, ratio: float | None, cached: float, heads: int, step: Fraction
) -> int | float:
    """Return the components of one side: as asked for, or the ratio's share of the heads that the source caches."""
    if count is not None:
        if not 1 <= count <= heads:
            raise RequestError(
                f"--{side}-components {count} is impossible: the model has {heads} key/value heads, choose 1 to {heads}"
            )
        return count
    assert ratio is not None
    before = Fraction(cached)
    exact = Fraction(ratio).limit_denominator(10_000) * before
    if exact % step or exact < step:
        below = max(exact // step, 1) * step
        near = sorted({float(below / before), float(min(below + step, before) / before)})
        raise RequestError(
            f"`kv_ratio` {ratio:g} is {float(exact):g} of {cached:g} cached {side} heads; the nearest possible are "
            f"{' and '.join(f'{value:.6g}' for value in near)}, or name counts with `key_components` and "
            "`value_components`"
        )
    return int(exact) if exact.denominator == 1 else float(exact)


def _check_groups(recipe: Recipe, before: LayerSpec, spec: LayerSpec, heads: int) -> None:
    """Raise unless heads and components divide into the groups that are asked for, and nothing lies across them."""
    groups = recipe.kv_groups
    if groups == 1:
        return
    for side in ("key", "value"):
        count, form = spec.side(side).components, spec.side(side).form
        if spec.side(side) == before.side(side):
            if not form.identity:
                raise RequestError(f"`kv_groups` {groups} needs {side}s that are composed anew; compress the original")
        elif form.joint:
            raise RequestError(
                f"`kv_groups` {groups} cannot divide the one latent that joint keys and values read; choose other "
                "compositions, or leave `kv_groups` out"
            )
        elif heads % groups or count % groups:
            options = [str(n) for n in range(1, heads + 1) if heads % n == 0 and count % n == 0]
            remedy = f"choose one of {', '.join(options)}" if options else "leave it out, or choose other components"
            raise RequestError(
                f"`kv_groups` {groups} does not divide {heads} heads and {count} {side} components; {remedy}"
            )
