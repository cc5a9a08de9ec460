"""One allocation of components to rotary pairs for all layers: a stock model has one list of frequencies."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import ceil

import numpy as np
from tqdm.auto import tqdm

from mea_compress.checkpoint.workspace import Workspace
from mea_compress.compositions.base import configured, side_choice
from mea_compress.compositions.frequency import allocate_components
from mea_compress.compositions.groups import cluster, divided
from mea_compress.fit.layers import CalibratedFit, stored_tokens
from mea_compress.fit.progress import fitted_tokens
from mea_compress.heads.composed import Array
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.layers.read import read_heads
from mea_compress.modeling.section_mea import cached_width
from mea_compress.planning.types import LayerPlan, Plan


def share_rotary_components(plan: Plan, workspace: Workspace, progress: bool) -> Plan:
    """Return the plan with the components of each rotary pair, the same in all layers.

    Every layer says what each component is worth to it as a share of its whole; the sums over layers are what the
    components are dealt out by.

    Args:
        plan: The plan; the keys of all layers have one width.
        workspace: Keeps what was chosen, so that a resumed run has the same.
        progress: Show a bar on stderr.
    """
    kept = workspace.result_of("allocation", "rotary_components")
    if kept is None:
        layers = [layer for layer in plan.layers if layer.compressed and layer.spec.key.form.per_pair]
        groups = plan.recipe.kv_groups
        budget = cached_width(layers[0].spec.key.components, plan.source.head_dim) // 2 // groups
        energies = np.sum(_energies(plan, layers, workspace, progress), axis=0)  # (P, H)
        kept = list(allocate_components(energies, budget))
        workspace.commit("allocation", "rotary_components", kept)
    return replace(plan, decisions=replace(plan.decisions, rotary_components=tuple(kept)))


def _energies(plan: Plan, layers: list[LayerPlan], workspace: Workspace, progress: bool) -> list[Array]:
    """Return the energies of each layer's components, (P, H) each; H is of one group where heads are in groups."""
    with tqdm(total=len(layers), desc="rotary pairs", unit="layer", disable=not progress, file=sys.stderr) as bar:
        if plan.recipe.fit == "weights":
            found = []
            for layer in layers:
                found.append(_layer_energies(plan, layer, None))
                bar.update(1)
            return found
        tokens = stored_tokens(plan, workspace, progress)
        stream = CalibratedFit(plan, tokens[: ceil(fitted_tokens(plan) / tokens.shape[1])], 0)
        found = []
        for layer in plan.layers[: layers[-1].layer + 1]:
            stream.compressed = stream.original.copy()
            if layer in layers:
                statistics = stream.pass_original(layer.layer, with_statistics=True)
                assert isinstance(statistics, LayerStatistics)
                found.append(_layer_energies(plan, layer, statistics))
                bar.update(1)
            if layer is not layers[-1]:
                stream.compressed = stream.original
                stream.advance(layer.layer, None)
        return found


def _layer_energies(plan: Plan, layer: LayerPlan, statistics: LayerStatistics | None) -> Array:
    recipe = plan.recipe
    method = configured(side_choice(recipe, "key", layer.spec.key.composition), recipe)
    heads = read_heads(plan.source, layer.layer, with_queries=layer.needs_queries)
    if recipe.kv_groups == 1:
        return method.energies(heads, statistics, recipe.fit)
    heads, statistics = cluster(heads, statistics, recipe.fit, recipe.kv_groups)
    parts = divided(heads, statistics, recipe.kv_groups)
    return np.sum([method.energies(part, seen, recipe.fit) for part, seen in parts], axis=0)


__all__ = ["share_rotary_components"]
