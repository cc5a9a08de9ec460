"""What will happen to every layer, in bytes and parameters; from headers alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from mea_compress.architectures import Source, open_source
from mea_compress.architectures.checkpoint import FLOATS
from mea_compress.architectures.families import Shapes
from mea_compress.checkpoint.dtypes import DTYPE_BITS, DTYPE_NAMES, TORCH_NAMES
from mea_compress.compositions.base import (
    DEFAULT_METHODS,
    method_allocates_uniformly,
    method_form,
    method_name,
    method_needs_queries,
    side_choice,
)
from mea_compress.emit.code import carried_code
from mea_compress.errors import RequestError
from mea_compress.export.form import growth, stock_form
from mea_compress.modeling.section_mea import Form, cached_width, side_form, side_section
from mea_compress.recipe import Recipe, select_layers

CONTEXTS = (8_192, 32_768, 131_072)
"""Tokens at which the whole cache is shown."""
# What computing takes beside weights, statistics and activations: verification's small model, buffers, allocator.
_WORKING_BYTES = 100 << 20


# Calibration text where the recipe names no amount: this many tokens, in sequences of this length at most.
_CALIBRATION_TOKENS = 1 << 17
_CALIBRATION_SEQUENCE = 1024
# Hidden states of all calibration tokens beyond this many bytes live in a file instead of memory.
SPILL_BYTES = 4 << 30


# Whole models up to this many bytes of weights are loaded and run before they are published.
WHOLE_MODEL_BYTES = 32 << 20


def calibration_shape(source: Source, recipe: Recipe) -> tuple[int, int]:
    """Calibration sequences and their length.

    Raises:
        RequestError: The recipe's sequences are longer than the model's context.
    """
    context = source.config.max_position_embeddings or _CALIBRATION_SEQUENCE
    length = recipe.sequence_length or min(context, _CALIBRATION_SEQUENCE)
    if length > context:
        raise RequestError(f"--sequence-length {length} is beyond the model's context of {context}; give a smaller one")
    return recipe.sequences or max(1, _CALIBRATION_TOKENS // length), length


def cache_sizes(layers: Iterable[tuple[int, int, int | None]], batch: int) -> list[dict[str, int]]:
    """Bytes of the whole cache at every one of `CONTEXTS`.

    Args:
        layers: Bytes per token before and after, and the sliding window in tokens where there is one.
        batch: Number of sequences.
    """
    layers = list(layers)
    sizes = []
    for tokens in CONTEXTS:
        seen = [(before, after, min(tokens, window or tokens)) for before, after, window in layers]
        before, after = (batch * sum(layer[side] * layer[2] for layer in seen) for side in (0, 1))
        sizes.append({"tokens": tokens, "batch": batch, "before": before, "after": after})
    return sizes


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part of the plan.

    Attributes:
        layer: Its number.
        compressed: Whether anything happens to it.
        key_composition: How its keys are composed afterwards.
        value_composition: How its values are composed afterwards.
        key_components: Component heads of keys that are cached afterwards.
        value_components: Component heads of values that are cached afterwards.
        key_form: How its keys are stored, cached and read afterwards.
        value_form: The same of its values.
        bytes_before: Cache bytes per token in the source.
        bytes_after: Cache bytes per token afterwards.
        parameters_before: Numbers in the tensors that make its keys and values, in the source.
        parameters_after: Numbers in those tensors afterwards.
        window: Tokens that it caches at most, or None.
    """

    layer: int
    compressed: bool
    key_composition: str
    value_composition: str
    key_components: float
    value_components: float
    key_form: Form
    value_form: Form
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    window: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry of ``layers`` in `plan --json`."""
        return {
            "layer": self.layer,
            "key_components": self.key_components,
            "value_components": self.value_components,
            "key_composition": self.key_composition,
            "value_composition": self.value_composition,
            "kv_bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
        }


@dataclass(frozen=True)
class Plan:
    """All layers, and the model as a whole.

    Attributes:
        layers: In order.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        output_bytes: Size of the emitted weights on disk.
        disk_bytes: Most that is on disk while the work goes on.
        memory_bytes: Memory to expect above what importing the libraries takes.
        choice: Why these compositions, where the recipe left it open; empty where it named them.
        stock_export: What a stock export costs and saves, or the ``reason`` why there is none.
    """

    layers: tuple[LayerPlan, ...]
    parameters_before: int
    parameters_after: int
    output_bytes: int
    disk_bytes: int
    memory_bytes: int
    choice: str = ""
    stock_export: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Cache bytes per token of the source."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Cache bytes per token of what is emitted."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self, batch: int = 1) -> dict[str, Any]:
        """`plan --json`; `batch` sequences are counted where whole caches are shown."""
        return {
            "kv_bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "layers": [layer.to_json() for layer in self.layers],
            "cache": cache_sizes(((one.bytes_before, one.bytes_after, one.window) for one in self.layers), batch),
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory_bytes,
            "stock_export": self.stock_export,
        }


def make_plan(directory: Path, recipe: Recipe) -> Plan:
    """The plan for a checkpoint directory; reads headers only.

    Raises:
        RequestError: The checkpoint is not usable or the recipe asks for what it cannot give.
    """
    return plan_source(open_source(directory), recipe)


def plan_source(source: Source, recipe: Recipe) -> Plan:
    """The plan for an opened checkpoint."""
    config = source.config
    heads, head_dim = config.num_key_value_heads, source.head_dim
    chosen = set(select_layers(recipe.layers, config.num_hidden_layers))
    keys, values, choice = choose_compositions(source, recipe)
    layers = []
    for layer, spec in enumerate(config.mea["layers"]):
        after = before = _Sides.of(spec)
        if layer in chosen:
            asked = (recipe.key_components, recipe.value_components)
            key = _side("key", keys, asked[0], recipe.kv_ratio, before, heads, head_dim)
            after = _Sides(*key, *_side("value", values, asked[1], recipe.kv_ratio, before, heads, head_dim))
            _check_joint(after)
            _check_groups(recipe, before, after, heads)
        layers.append(_layer_plan(source, recipe, layer, before, after))
    if splits_itself(recipe, method_form(keys), method_form(values)):
        choice = "; ".join([*filter(None, [choice]), "keys and values divide a layer's budget as trial fits say"])
    return _whole_plan(source, recipe, layers, choice)


def realised_plan(source: Source, recipe: Recipe, plan: Plan, sections: dict[int, dict[str, Any]]) -> Plan:
    """The plan as it was carried out: fitting may have divided a layer's budget between keys and values otherwise.

    Args:
        source: The opened checkpoint.
        recipe: The recipe of the plan.
        plan: The plan.
        sections: Entries of the ``mea`` section of the layers that were composed.
    """
    layers = list(plan.layers)
    for layer, section in sections.items():
        before = _Sides.of(source.config.mea["layers"][layer])
        layers[layer] = _layer_plan(source, recipe, layer, before, _Sides.of(section))
    return _whole_plan(source, recipe, layers, plan.choice)


def splits_itself(recipe: Recipe, keys: Form, values: Form) -> bool:
    """Whether fitting may divide the budget of a layer between keys and values: nobody said how, and both sides can."""
    open_budget = recipe.split == "auto" and recipe.key_components is None and recipe.value_components is None
    refined = recipe.refine != 0 if recipe.fit == "aligned" else bool(recipe.refine)
    both = (keys.fractional and values.fractional) or (keys.scalar and values.scalar)
    return open_budget and refined and both and recipe.kv_groups == 1 and not keys.joint and (recipe.kv_ratio or 1) < 1


def refinement_steps(source: Source, recipe: Recipe) -> int:
    """Optimiser steps of a layer's refinement: asked for, or by the model's size where the fit has it on."""
    if recipe.refine is not None:
        return recipe.refine
    if recipe.fit != "aligned":
        return 0
    # Wide layers cost more a step and are moved further by each.
    return max(100, min(300, 300 * 512 // source.config.hidden_size))


def needs_text(source: Source, recipe: Recipe) -> bool:
    """Whether a fit looks at anything but weights."""
    return recipe.fit != "weights" or refinement_steps(source, recipe) > 0


def needs_whole_layer(recipe: Recipe, layer: LayerPlan) -> bool:
    """Whether a fit looks at more of a layer's attention than keys and values; without it no more than these change."""
    if recipe.fit != "weights" or recipe.kv_groups > 1:
        return True
    chosen = (choice for choice in (recipe.key_composition, recipe.value_composition) if choice is not None)
    fitted = (layer.key_composition, layer.value_composition)
    return any(method_needs_queries(choice, recipe) for choice in chosen if method_name(choice) in fitted)


def known_beforehand(source: Source, recipe: Recipe, plan: Plan) -> bool:
    """Whether the plan alone says which tensors a fit makes and of which shapes (those of `stored_shapes`)."""
    if needs_text(source, recipe) or recipe.dtype is not None:
        return False
    return not any(needs_whole_layer(recipe, layer) for layer in plan.layers)


def stored_shapes(source: Source, layer: LayerPlan) -> Shapes:
    """The tensors that a layer's keys and values are stored as, by their names below ``self_attn.``, in order."""
    config, heads, head_dim = source.config, source.config.num_key_value_heads, source.head_dim
    sides = (
        ("key", layer.key_form, cached_width(layer.key_components, head_dim)),
        ("value", layer.value_form, cached_width(layer.value_components, head_dim)),
    )
    shapes: Shapes = {}
    for side, _, width in sides:
        shapes[f"{side[0]}_proj.weight"] = (width, config.hidden_size)
        if config.mea["bias"][side]:
            shapes[f"{side[0]}_proj.bias"] = (width,)
    for side, form, width in sides:
        shape = form.shape(width, sides[0][2] + sides[1][2], heads, head_dim)
        if shape is not None:
            shapes[f"{side}_composition.weight"] = shape
    return shapes


def _layer_plan(source: Source, recipe: Recipe, layer: int, before: "_Sides", after: "_Sides") -> LayerPlan:
    config = source.config
    heads, head_dim, hidden = config.num_key_value_heads, source.head_dim, config.hidden_size
    bias, norm = config.mea["bias"], config.mea["qk_norm"]
    size_before, size_after = DTYPE_BITS[source.dtype] // 8, DTYPE_BITS[stored_dtype(source, recipe)] // 8
    return LayerPlan(
        layer,
        after != before,
        key_composition=after.keys,
        key_components=after.key_components,
        value_composition=after.values,
        value_components=after.value_components,
        key_form=after.key_form,
        value_form=after.value_form,
        bytes_before=_cached_bytes(before, heads, head_dim, size_before, norm),
        bytes_after=_cached_bytes(after, heads, head_dim, size_after, norm),
        parameters_before=_parameters(before, heads, head_dim, hidden, bias),
        parameters_after=_parameters(after, heads, head_dim, hidden, bias),
        window=layer_window(source, layer),
    )


def _whole_plan(source: Source, recipe: Recipe, layers: list[LayerPlan], choice: str) -> Plan:
    infos = source.reader.tensors.values()
    total = sum(prod(info.shape) for info in infos)
    grown = sum(layer.parameters_after - layer.parameters_before for layer in layers)
    size = DTYPE_BITS[stored_dtype(source, recipe)] // 8
    output = sum(size * prod(info.shape) if recipe.dtype and info.dtype in FLOATS else info.nbytes for info in infos)
    output += size * grown
    config = source.config
    attention = 2 * config.num_attention_heads * source.head_dim * config.hidden_size  # queries and output
    composed = [layer for layer in layers if layer.compressed]
    scratch = sum(layer.parameters_after + (attention if recipe.fit != "weights" else 0) for layer in composed)
    pairs = 2 * config.num_key_value_heads * source.head_dim * config.hidden_size
    memory = 8 * 4 * pairs
    if recipe.fit != "weights":  # one decoder layer in float32, its statistics, and the hidden states of the text
        prefix = source.family.layer.format(layer=0)
        decoder = sum(prod(info.shape) for info in infos if info.name.startswith(prefix))
        memory += 4 * decoder + 8 * 4 * attention + 8 * 4 * config.hidden_size**2
        # The text as the original has it before and behind a layer, and as the compressed layers send it.
        memory += 3 * min(SPILL_BYTES, 4 * config.hidden_size * prod(calibration_shape(source, recipe)))
        if recipe.text is None:  # text is sampled from the whole model, before the fit
            memory = max(memory, sum(info.nbytes for info in infos))
    largest = max((prod(info.shape) for info in infos), default=0)
    memory += (4 + size) * largest if recipe.dtype else 0
    return Plan(
        tuple(layers),
        total,
        total + grown,
        output,
        output + size * scratch,
        memory + _WORKING_BYTES,
        choice,
        _stock_export(source, recipe, layers, size),
    )


def _check_groups(recipe: Recipe, before: "_Sides", after: "_Sides", heads: int) -> None:
    """Heads and components must divide into the groups that are asked for, and no composition may lie across them."""
    groups = recipe.kv_groups
    if groups == 1:
        return
    for side, now, kind, form, count, kept in (
        ("key", before.keys, after.keys, after.key_form, after.key_components, before.key_components),
        ("value", before.values, after.values, after.value_form, after.value_components, before.value_components),
    ):
        if (kind, count) == (now, kept):
            if not form.identity:
                raise RequestError(f"--kv-groups {groups} needs {side}s that are composed anew; compress the original")
        elif form.joint:
            raise RequestError(
                f"--kv-groups {groups} cannot divide the one latent that joint keys and values read; choose other "
                "compositions, or leave --kv-groups out"
            )
        elif heads % groups or count % groups:
            options = [str(n) for n in range(1, heads + 1) if heads % n == 0 and count % n == 0]
            remedy = f"choose one of {', '.join(options)}" if options else "leave it out, or choose other components"
            raise RequestError(
                f"--kv-groups {groups} does not divide {heads} heads and {count} {side} components; {remedy}"
            )


def _stock_export(source: Source, recipe: Recipe, layers: list[LayerPlan], itemsize: int) -> dict[str, Any]:
    """What a stock export of the planned layers costs and saves."""
    sections = []
    for layer, spec in zip(layers, source.config.mea["layers"], strict=True):
        section = dict(spec)
        if layer.compressed:
            key = side_section("key", layer.key_composition, layer.key_components, layer.key_form)
            section = key | side_section("value", layer.value_composition, layer.value_components, layer.value_form)
            if recipe.kv_groups > 1:
                section["groups"] = recipe.kv_groups
            choice = side_choice(recipe, "key", layer.key_composition)
            if layer.key_form.per_pair and method_allocates_uniformly(choice, recipe):
                section["rotary_components"] = [layer.key_components] * (source.head_dim // 2)
        sections.append(section)
    try:
        form = stock_form(source, sections)
    except RequestError as error:
        return {"reason": str(error)}
    cost = growth(source, form, itemsize, [layer.window for layer in layers])
    return {"key_value_heads": form.groups, "head_dim": form.head_dim, **cost.to_json()}


@dataclass(frozen=True)
class _Sides:
    keys: str
    key_components: float
    key_form: Form
    values: str
    value_components: float
    value_form: Form

    @staticmethod
    def of(spec: dict[str, Any]) -> "_Sides":
        return _Sides(
            spec["key_composition"],
            spec["key_components"],
            side_form(spec, "key"),
            spec["value_composition"],
            spec["value_components"],
            side_form(spec, "value"),
        )


def _side(
    side: str,
    kind: str,
    count: int | None,
    ratio: float | None,
    before: "_Sides",
    heads: int,
    head_dim: int,
) -> tuple[str, float, Form]:
    """Composition, components and form of one side of a chosen layer; one that nothing is said about stays as it is."""
    kind_now, components_now, form_now = (
        (before.keys, before.key_components, before.key_form)
        if side == "key"
        else (before.values, before.value_components, before.value_form)
    )
    if count is None and ratio is None:
        return kind_now, components_now, form_now
    form = method_form(kind)
    components = _components(count, side, ratio, components_now, heads, form.step(head_dim))
    if form.repeats and heads % components:
        raise RequestError(
            f"--{side}-composition {kind} needs a number of components that divides the {heads} key/value heads, "
            f"not {components}"
        )
    return kind, components, form


def _check_joint(sides: _Sides) -> None:
    if sides.key_form.joint != sides.value_form.joint:
        raise RequestError(
            "joint keys and joint values read one latent: give both --key-composition joint and "
            "--value-composition joint"
        )


def layer_window(source: Source, layer: int) -> int | None:
    """Tokens that a layer with sliding-window attention sees, or None."""
    config = source.config
    types = getattr(config, "layer_types", None)
    sliding = types is None or types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


def choose_compositions(source: Source, recipe: Recipe) -> tuple[str, str, str]:
    """Compositions of keys and values, and the reason where the recipe left them open.

    The best that decodes without rebuilding keys: a complex composition commutes with RoPE, and o_proj reads values
    through their latent. Both stay exact under a key norm (its scalars are cached) and under a head norm.
    """
    chosen = (recipe.key_composition, recipe.value_composition)
    keys, values = (None if choice is None else method_name(choice) for choice in chosen)
    reasons = []
    if keys is None:
        keys = DEFAULT_METHODS["key"]
        extra = ", with one norm scalar a head cached beside them" if source.config.mea["qk_norm"] else ""
        reasons.append(f"frequency keys: the closest that decode without being rebuilt (they commute with RoPE){extra}")
    if values is None:
        values = DEFAULT_METHODS["value"]
        reasons.append("latent values: the closest at these bytes, read through o_proj")
    return keys, values, "; ".join(reasons)


def stored_dtype(source: Source, recipe: Recipe) -> str:
    """Safetensors name of the dtype that composed layers are stored in."""
    return DTYPE_NAMES[recipe.dtype] if recipe.dtype else source.dtype


def _components(
    count: int | None, side: str, ratio: float | None, now: float, heads: int, step: Fraction
) -> int | float:
    """Components of one side: as asked for, or the ratio's share of the component heads that the source caches now."""
    if count is not None:
        if not 1 <= count <= heads:
            raise RequestError(
                f"--{side}-components {count} is impossible: the model has {heads} key/value heads, choose 1 to {heads}"
            )
        return count
    assert ratio is not None
    cached = Fraction(now)
    exact = Fraction(ratio).limit_denominator(10_000) * cached
    if exact % step or exact < step:
        below = max(exact // step, 1) * step
        near = sorted({float(below / cached), float(min(below + step, cached) / cached)})
        raise RequestError(
            f"--kv-ratio {ratio:g} is {float(exact):g} of {now:g} cached {side} heads; the nearest possible are "
            f"{' and '.join(f'{value:.6g}' for value in near)}, or name counts with --key-components and "
            "--value-components"
        )
    return int(exact) if exact.denominator == 1 else float(exact)


def _cached_bytes(sides: _Sides, heads: int, head_dim: int, itemsize: int, qk_norm: bool) -> int:
    scalars = heads if qk_norm and sides.key_form.caches_norm_scalars else 0
    widths = [cached_width(components, head_dim) for components in (sides.key_components, sides.value_components)]
    return itemsize * (sum(widths) + scalars)


def _parameters(sides: _Sides, heads: int, head_dim: int, hidden: int, bias: dict[str, bool]) -> int:
    total = 0
    widths = [cached_width(components, head_dim) for components in (sides.key_components, sides.value_components)]
    for side, form, width in (("key", sides.key_form, widths[0]), ("value", sides.value_form, widths[1])):
        total += width * (hidden + bias[side])
        shape = form.shape(width, sum(widths), heads, head_dim)
        total += prod(shape) if shape else 0
    return total


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        source: The opened checkpoint.
        layers: As a plan that changes nothing.
        parameters: Of the whole model.
    """

    source: Source
    layers: tuple[LayerPlan, ...]
    parameters: int

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes per token."""
        return sum(layer.bytes_before for layer in self.layers)

    def to_json(self, batch: int = 1) -> dict[str, Any]:
        """`inspect --json`; `batch` sequences are counted where whole caches are shown."""
        source, config = self.source, self.source.config
        code = {"code": carried_code(source.reader.directory).to_json()} if source.native else {}
        return {
            "model_type": source.raw_config["model_type"],
            **code,
            "family": source.family.model_type,
            "layers": len(self.layers),
            "hidden_size": config.hidden_size,
            "query_heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": source.head_dim,
            "rotary_dim": source.rotary_dim,
            "qk_norm": config.mea["qk_norm"],
            "head_norm": config.mea["head_norm"],
            "dtype": TORCH_NAMES[source.dtype],
            "context_length": config.max_position_embeddings,
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


def inspect_checkpoint(directory: Path) -> Inspection:
    """What a checkpoint directory holds; reads headers only.

    Raises:
        RequestError: The checkpoint is not usable.
    """
    source = open_source(directory)
    unchanged = plan_source(source, Recipe())
    return Inspection(source, unchanged.layers, unchanged.parameters_before)
