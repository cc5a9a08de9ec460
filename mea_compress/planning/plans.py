"""Plan what happens to every layer of a checkpoint, and say what a checkpoint is; reads headers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mea_compress.architectures import Checkpoint, open_checkpoint
from mea_compress.checkpoint.dtypes import TORCH_NAMES
from mea_compress.checkpoint.hub import local_directory, repository_of
from mea_compress.emit.code import CarriedCode, carried_code
from mea_compress.errors import RequestError
from mea_compress.planning.budget import allocate, explicit, is_profile, read_widths
from mea_compress.planning.decisions import choose_compositions, decide, decide_layer, needs_queries, stored_dtype
from mea_compress.planning.profiles import Profile, read_profile
from mea_compress.planning.sizes import cached_bytes, layer_parameters, layer_window, whole_costs
from mea_compress.planning.types import LayerPlan, LayerSpec, Plan, cache_sizes, composed_at
from mea_compress.recipe import Recipe, budget_file, make_recipe, select_layers
from mea_compress.report.showing import Shown
from mea_compress.report.tables import inspection_report


def plan(source: Path | str, *, recipe: Recipe | Path | str | None = None, **settings: Any) -> Plan:
    """Plan a compression: components, cache bytes and parameters of every layer. Reads headers only.

    Args:
        source: A checkpoint directory or hub id.
        recipe: A `Recipe`, a built-in recipe's name or a YAML file; None for the defaults.
        **settings: Fields of `Recipe` that win over it, such as ``kv_ratio=0.5``.

    Raises:
        RequestError: The checkpoint is not usable or the recipe asks for what it cannot give.

    Example:
        >>> plan("SRC", kv_ratio=0.5).to_json()["kv_bytes_per_token"]
        {'before': 512, 'after': 256}
    """
    return make_plan(source, make_recipe(recipe, settings))


def make_plan(source: Path | str, recipe: Recipe) -> Plan:
    """Return the plan for a checkpoint directory or hub id.

    Raises:
        RequestError: The checkpoint is not usable or the recipe asks for what it cannot give.
    """
    return plan_source(open_checkpoint(local_directory(source)), recipe)


def plan_source(source: Checkpoint, recipe: Recipe) -> Plan:
    """Return the plan for an opened checkpoint.

    Raises:
        RequestError: The recipe asks for what the checkpoint cannot give.
    """
    chosen = set(select_layers(_which_layers(recipe), source.config.num_hidden_layers))
    keys, values, choice = choose_compositions(source, recipe)
    layers = []
    for layer, section in enumerate(source.config.mea["layers"]):
        before, geometry = LayerSpec.of(section), source.geometry(layer)
        spec = before
        if layer in chosen and geometry is not None:
            spec = decide_layer(source, recipe, geometry, keys, values, before)
        layers.append(_layer_plan(source, recipe, layer, before, spec))
    decisions = decide(source, recipe, layers, choice)
    planned = Plan(source, recipe, tuple(layers), decisions, whole_costs(source, recipe, decisions, layers))
    file = budget_file(recipe)
    if file is None:
        return planned
    if is_profile(file):
        return plan_budget(planned, read_profile(file))
    return _with_specs(planned, explicit(planned, read_widths(file)))


def equal_widths(plan: Plan) -> Plan:
    """Return the plan of the same recipe with `budget` uniform, which may divide a layer's share between its sides."""
    equal = plan_source(plan.source, plan.recipe.model_copy(update={"budget": "uniform"}))
    return replace(equal, recipe=plan.recipe)


def plan_budget(plan: Plan, profile: Profile) -> Plan:
    """Return the plan with the widths that a profile says cost least.

    Args:
        plan: The plan, with the same widths in every chosen layer.
        profile: What each width of each layer costs.

    Raises:
        RequestError: The profile is of another model or other methods, or the share of the cache is too small.
    """
    specs, predicted = allocate(plan, profile)
    return replace(_with_specs(plan, specs), profile=profile, predicted_kl=predicted)


def plan_after_fit(plan: Plan, sections: Mapping[int, Mapping[str, Any]]) -> Plan:
    """Return the plan with the key/value split that fitting chose.

    Args:
        plan: The plan.
        sections: Entries of the ``mea`` section of the layers that were composed.
    """
    return _with_specs(plan, {layer: LayerSpec.of(section) for layer, section in sections.items()})


def _with_specs(plan: Plan, specs: Mapping[int, LayerSpec]) -> Plan:
    """Return the plan with some layers cached in another way."""
    layers = list(plan.layers)
    for layer, spec in specs.items():
        layers[layer] = _layer_plan(plan.source, plan.recipe, layer, layers[layer].before, spec)
    keys = [layer.spec.key for layer in layers if layer.compressed and layer.spec.key.form.per_pair]
    if plan.decisions.shares_rotary_allocation and len({key.components for key in keys}) > 1:
        raise RequestError(
            "`rotary_allocation` shared needs keys of one width in all layers; leave the budget uniform, or use "
            "`rotary_allocation` energy"
        )
    costs = whole_costs(plan.source, plan.recipe, plan.decisions, layers)
    return replace(plan, layers=tuple(layers), costs=costs)


def _which_layers(recipe: Recipe) -> str:
    """Return which layers to compress, as `select_layers` takes it."""
    if recipe.budget not in ("half", "deep"):
        return recipe.layers
    if recipe.layers != "all":
        raise RequestError(f"`budget` {recipe.budget} says which layers to compress and so does `layers`; give one")
    return recipe.budget


def _layer_plan(source: Checkpoint, recipe: Recipe, layer: int, before: LayerSpec, spec: LayerSpec) -> LayerPlan:
    return LayerPlan(
        layer,
        before,
        spec,
        bytes_before=cached_bytes(source, layer, before, source.dtype),
        bytes_after=cached_bytes(source, layer, spec, stored_dtype(source, recipe)),
        parameters_before=layer_parameters(source, layer, before),
        parameters_after=layer_parameters(source, layer, spec),
        needs_queries=needs_queries(recipe, spec),
        window=layer_window(source, layer),
    )


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """What a checkpoint is.

    Attributes:
        source: The opened checkpoint.
        layers: As a plan that changes nothing.
        parameters: Of the whole model.
        code: The code that it carries, where it is one of this program's.
    """

    source: Checkpoint
    layers: Sequence[LayerPlan]
    parameters: int
    code: CarriedCode | None

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes per token."""
        return sum(layer.bytes_before for layer in self.layers)

    def to_json(self, batch: int = 1) -> dict[str, Any]:
        """Return `inspect --json`; `batch` sequences are counted where whole caches are shown."""
        source, config = self.source, self.source.config
        return {
            "model_type": source.raw_config["model_type"],
            **({"code": self.code.to_json()} if self.code else {}),
            "family": source.family.model_type,
            "layers": len(self.layers),
            "hidden_size": config.hidden_size,
            "query_heads": config.num_attention_heads,
            "key_value_heads": source.first_geometry.heads,
            "head_dim": source.head_dim,
            "rotary_dim": source.rotary_dim,
            "qk_norm": config.mea["qk_norm"],
            "head_norm": config.mea["head_norm"],
            "dtype": TORCH_NAMES[source.dtype],
            "context_length": getattr(config, "max_position_embeddings", None),
            "composed_at": composed_at(source),
            "parameters": self.parameters,
            "weight_bytes": source.weight_bytes,
            "weight_files": len(source.reader.files),
            "kv_bytes_per_token": self.bytes_per_token,
            "cache": [
                {"tokens": size["tokens"], "batch": batch, "bytes": size["before"]}
                for size in cache_sizes(((one.bytes_before, 0, one.window) for one in self.layers), batch)
            ],
            "attention": [
                layer.to_json() | {"kv_bytes_per_token": layer.bytes_before, "sliding_window": layer.window}
                for layer in self.layers
            ],
        }

    def report(self, batch: int = 1) -> str:
        """Return what people read."""
        return inspection_report(self.to_json(batch))


def open(source: Path | str) -> Inspection:
    """Open a checkpoint and say what it is: family, heads, cache bytes per token. Reads headers only.

    Raises:
        RequestError: The checkpoint is not usable.

    Example:
        >>> open("SRC").to_json()["key_value_heads"]
        4
    """
    return inspect_checkpoint(source)


def inspect_checkpoint(source: Path | str) -> Inspection:
    """Return what a checkpoint directory, or the repository of a hub id, holds.

    Raises:
        RequestError: The checkpoint is not usable.
    """
    directory = local_directory(source)
    checkpoint = open_checkpoint(directory)
    unchanged = plan_source(checkpoint, Recipe())
    code = carried_code(directory) if checkpoint.native else None
    if code is not None and code.version is None and repository_of(directory):
        code = None  # it was not downloaded
    return Inspection(checkpoint, unchanged.layers, unchanged.costs.parameters_before, code)
