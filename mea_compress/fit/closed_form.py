"""Closed-form fit of one layer: factor its key and value heads from weights or calibration statistics."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from mea_compress.compositions.base import CompositionOptions, configured, side_choice
from mea_compress.compositions.groups import cluster, compose_groups
from mea_compress.fit.observation import CacheStatistics, cached_heads
from mea_compress.heads.composed import Array, FactoredHeads, join_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads, ComposedLayer
from mea_compress.layers.read import read_composed, read_heads
from mea_compress.layers.store import rounded
from mea_compress.planning.types import LayerPlan, Plan


def compose(
    plan: Plan, layer: LayerPlan, statistics: LayerStatistics | CacheStatistics | None
) -> tuple[ComposedLayer, dict[str, float]]:
    """Fit the closed form of one layer.

    Args:
        plan: Checkpoint, fit, methods and their options.
        layer: The layer, as the plan has it or with another split.
        statistics: Of its inputs; None with the ``weights`` fit.

    Returns:
        The composed layer, and for each side the share of the heads' squared weights that is lost in the dtype that
        they will be stored in.

    Raises:
        RequestError: A weight is not finite, or the method cannot do what is asked.
    """
    if isinstance(statistics, CacheStatistics):
        return _compose_at_cache(plan, layer, statistics)
    # Weight-only fits change k_proj and v_proj alone: q_proj and o_proj are not read.
    source, recipe = plan.source, plan.recipe
    grouped = recipe.kv_groups > 1
    heads = original = read_heads(source, layer.layer, with_queries=layer.needs_queries)
    if grouped:
        heads, statistics = cluster(heads, statistics, recipe.fit, recipe.kv_groups)
    sides = {}
    for side, opposite in (("key", "value"), ("value", "key")):
        spec = layer.spec.side(side)
        if spec == layer.before.side(side):
            continue
        fitter = getattr(configured(side_choice(recipe, side, spec.composition), recipe), f"{side}s")
        other = layer.spec.side(opposite).components
        options = CompositionOptions(spec.components, recipe.fit, other, plan.decisions.rotary_components)
        if grouped:
            factored, heads = compose_groups(fitter, heads, statistics, options, recipe.kv_groups)
        else:
            factored, heads = fitter(heads, statistics, options)
        sides[side] = replace(factored, composition=spec.composition)
    for side in {"key", "value"} - set(sides):
        kept = read_composed(source, layer.layer, side)
        if kept.form.identity:  # heads may have come into another order
            kept = replace(kept, projection=join_heads(getattr(heads, side)))
        sides[side] = kept
    composed = ComposedLayer(
        sides["key"],
        sides["value"],
        query=None if heads.query is original.query else heads.query,
        output=None if heads.output is original.output else heads.output,
        head_norm=None if heads.head_norm is original.head_norm else heads.head_norm,
        order=heads.order,
    )
    dtype = plan.decisions.stored_dtype
    lost = {
        f"{side}_relative_error": _lost(heads, _as_stored(sides[side], dtype, side), side) for side in ("key", "value")
    }
    return composed, {name: value for name, value in lost.items() if value is not None}


def _compose_at_cache(
    plan: Plan, layer: LayerPlan, statistics: CacheStatistics
) -> tuple[ComposedLayer, dict[str, float]]:
    """Fit encoders and decoders of a layer whose attention stays as it is.

    Returns:
        The composed layer, and for each side the share of the heads' energy under the calibration text that is lost.
    """
    recipe, geometry = plan.recipe, plan.source.geometry(layer.layer)
    assert geometry is not None
    sides, lost = {}, {}
    for side in ("key", "value"):
        spec, moments = layer.spec.side(side), getattr(statistics, side)
        heads = cached_heads(geometry, side, statistics)
        if spec == layer.before.side(side):
            sides[side] = FactoredHeads(spec.form, geometry.heads, geometry.dim(side), join_heads(getattr(heads, side)))
            lost[f"{side}_relative_error"] = 0.0
            continue
        fitter = getattr(configured(side_choice(recipe, side, spec.composition), recipe), f"{side}s")
        # Real combinations are aligned by changes of basis in q_proj and o_proj, which stay as they are here.
        fit = "activations" if spec.form.scalar else recipe.fit
        factored, _ = fitter(heads, moments, CompositionOptions(spec.components, fit))
        factored = replace(factored, form=spec.form, composition=spec.composition)
        sides[side] = factored
        stored = _as_stored(factored, plan.decisions.stored_dtype, side)
        kept = stored.expansion() @ stored.projection - join_heads(getattr(heads, side))
        whole = float(moments.moment[:-1, :-1].trace())
        error = float(((kept @ moments.moment) * kept).sum())
        lost[f"{side}_relative_error"] = max(0.0, error) / max(whole, 1e-300)
    return ComposedLayer(sides["key"], sides["value"], block=asdict(geometry)), lost


def _as_stored(factored: FactoredHeads, dtype: str, side: str) -> FactoredHeads:
    def stored(array: Array | None, name: str) -> Any:
        return None if array is None else rounded(array, dtype, name).astype(np.float64)

    rows, latent = (stored(rows, f"{side[0]}_proj") for rows in (factored.projection, factored.latent))
    weight = stored(factored.weight, f"{side}_composition")
    return replace(factored, projection=rows, weight=weight, latent=latent)


def _lost(heads: AttentionHeads, factored: FactoredHeads, side: str) -> float | None:
    """Return the share of the heads' squared weights that is lost; None where heads have factors elsewhere."""
    target = getattr(heads, side)
    if factored.form.repeats:  # the heads' own factors went into q_proj or o_proj
        return None
    if factored.form.scalar:  # inner products of heads and components are enough
        assert factored.weight is not None
        rows = target.reshape(len(target), -1)
        components = factored.projection.reshape(-1, rows.shape[1])
        whole = float(np.linalg.norm(rows)) ** 2
        mixing = factored.weight.T  # (H, C)
        gained = (rows @ components.T * mixing).sum() - ((mixing @ (components @ components.T)) * mixing).sum() / 2
        return max(0.0, whole - 2 * float(gained)) / max(whole, 1e-300)
    lost = whole = 0.0
    for expected, rebuilt in zip(target, factored.each_head(), strict=True):
        if side == "key" and factored.form.weighted_keys and heads.key_norm is not None:
            rebuilt = rebuilt / heads.key_norm[:, None]
        lost += float(np.square(expected - rebuilt).sum())
        whole += float(np.square(expected).sum())
    return lost / max(whole, 1e-300)
