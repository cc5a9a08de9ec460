"""Bytes and parameters of what is planned, from headers and specs alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from mea_compress.architectures import Checkpoint
from mea_compress.architectures.checkpoint import FLOATS
from mea_compress.architectures.families import LayerGeometry, Shapes, language_settings
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.checkpoint.system import has_bfloat16_products
from mea_compress.compositions.base import method_allocates_alike, side_choice
from mea_compress.errors import RequestError
from mea_compress.exporting.engines import engine_warning
from mea_compress.exporting.form import export_cost, stock_form, uniform_rotary_components
from mea_compress.modeling.section_mea import cached_width
from mea_compress.planning.heal_memory import heal_weight_bytes
from mea_compress.planning.types import Costs, Decisions, LayerPlan, LayerSpec
from mea_compress.recipe import Recipe

# What computing takes beside weights, statistics and activations: verification's small model, buffers, allocator.
_WORKING_BYTES = 100 << 20
# Hidden states of all calibration tokens beyond this many bytes live in a file instead of memory.
SPILL_BYTES = 4 << 30
# Tokens that a layer is run on at once.
TOKENS_PER_STEP = 4096
# Queries of a sequence whose attention is evaluated: each costs as much as a head as wide as the model.
SAMPLED_QUERIES = 64
# Queries that q_proj is fitted to the scores of, for each channel of the model, and what their moments may take.
_SCORED_QUERIES = 16
SCORE_BYTES = 1 << 30
# Tokens of a step of distillation. Many small steps gain more of the same text than a few large ones: SmolLM2-135M at
# half of its cache goes from KL 0.277 to 0.139 in 48 steps of 1,024 tokens; 20 of 4,096 take it from 0.159 to 0.120.
HEALING_TOKENS = 1024
# Those of them that are run at once through the whole model; gradients of several add up.
HEALING_MICRO_TOKENS = 1024
# Sequences of such a step at most.
_HEALING_SEQUENCES = 16


def fits_scores(source: Checkpoint, recipe: Recipe, layer: LayerPlan) -> bool:
    """Return whether a layer's q_proj is fitted again, to the scores of the original's queries."""
    changed = layer.spec.key != layer.before.key
    return changed and recipe.fit == "aligned" and not source.at_cache and not source.config.mea["qk_norm"]


def scored_sequences(source: Checkpoint, length: int) -> int:
    """Return how many sequences of so many tokens q_proj is fitted to the scores of, if there are as many."""
    queries = min(_SCORED_QUERIES * source.config.hidden_size, SCORE_BYTES // (4 * source.head_dim**2))
    return ceil(queries / min(length, SAMPLED_QUERIES))


def _score_bytes(source: Checkpoint, sequences: int, length: int) -> int:
    """Return the memory of fitting q_proj to the scores of so many sequences: moments, and what makes them."""
    config, count = source.config, min(sequences, scored_sequences(source, length))
    queries, inner = count * min(length, SAMPLED_QUERIES), config.num_attention_heads * source.head_dim
    one = 4 * queries * source.head_dim**2  # of a head; those that share keys are solved for together
    moments = min(one * (config.num_attention_heads // config.num_key_value_heads), max(SCORE_BYTES, one))
    keys = 2 * config.num_key_value_heads * source.head_dim * length * count
    return moments + 4 * (queries * (inner + 2 * config.hidden_size) + keys)


def layer_window(source: Checkpoint, layer: int) -> int | None:
    """Return the tokens that a layer with sliding-window attention sees, or None."""
    config = source.config
    types = getattr(config, "layer_types", None)
    sliding = types is None or types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


def cached_bytes(source: Checkpoint, layer: int, spec: LayerSpec, dtype: str) -> int:
    """Return the cache bytes per token of a layer in a dtype (as safetensors calls it), 0 if it caches no heads."""
    geometry = source.geometry(layer)
    if geometry is None:
        return 0
    beside = spec.key.form.beside(geometry.heads, source.config.mea["qk_norm"])
    return DTYPE_BITS[dtype] // 8 * (sum(_widths(geometry, spec)) + beside)


def layer_parameters(source: Checkpoint, layer: int, spec: LayerSpec) -> int:
    """Return how many numbers the tensors hold that make a layer's keys and values."""
    return sum(prod(shape) for shape in stored_shapes(source, layer, spec).values())


def stored_shapes(source: Checkpoint, layer: int, spec: LayerSpec) -> Shapes:
    """Return the tensors that keys and values are stored as, in order, by their names below the attention block."""
    config, geometry = source.config, source.geometry(layer)
    if geometry is None:
        return {}
    widths = dict(zip(("key", "value"), _widths(geometry, spec), strict=True))
    shapes: Shapes = {}
    for side, width in widths.items():
        if source.at_cache:  # what makes heads of the layer's input stays as it is
            continue
        shapes[f"{side[0]}_proj.weight"] = (width, config.hidden_size)
        if config.mea["bias"][side]:
            shapes[f"{side[0]}_proj.bias"] = (width,)
    for side, width in widths.items():
        form, sizes = spec.side(side).form, (sum(widths.values()), geometry.heads, geometry.dim(side))
        shape = form.shape(width, *sizes)
        if shape is not None:
            shapes[f"{side}_composition.weight"] = shape
        if form.encoder_shape is not None:
            shapes[f"{side}_composition.encoder"] = form.encoder_shape(width, *sizes)
    return shapes


def _widths(geometry: LayerGeometry, spec: LayerSpec) -> tuple[int, int]:
    return (
        cached_width(spec.key.components, geometry.head_dim),
        cached_width(spec.value.components, geometry.value_dim),
    )


def whole_costs(source: Checkpoint, recipe: Recipe, decisions: Decisions, layers: Sequence[LayerPlan]) -> Costs:
    """Return what the whole work takes and gives."""
    infos = source.reader.tensors.values()
    total = sum(prod(source.reader.info(name).shape) for name in source.reader.model_names)
    grown = sum(layer.parameters_after - layer.parameters_before for layer in layers)
    size = DTYPE_BITS[decisions.stored_dtype] // 8
    output = sum(size * prod(info.shape) if recipe.dtype and info.dtype in FLOATS else info.nbytes for info in infos)
    output += size * grown
    if source.quantised and not source.at_cache:  # attention is stored in full
        for info in infos:
            if ".self_attn." not in info.name:
                continue
            if source.reader.dtype_of(info.name) != info.dtype:
                output += size * prod(info.shape) - info.nbytes
            elif source.reader.is_scale(info.name):
                output -= info.nbytes
    config = source.config
    attention = 2 * config.num_attention_heads * source.head_dim * config.hidden_size  # queries and output
    scratch = sum(layer.parameters_after + attention * layer.needs_queries for layer in layers if layer.compressed)
    healing_disk = 0
    if decisions.healing_steps:
        # The healed layers, two checkpoints of training with Adam's moments, and where it began and was best.
        trained = sum(layer.parameters_after + attention for layer in layers if layer.compressed)
        healing_disk = (size + 2 * 12 + 2 * 4) * trained
    pairs = 2 * source.first_geometry.heads * source.head_dim * config.hidden_size  # keys and values
    memory = 8 * 4 * pairs
    if decisions.needs_calibration:  # one decoder layer in float32, its statistics, and the hidden states of the text
        decoder = largest_layer(source)
        memory += 4 * decoder + 8 * 4 * attention + 8 * 4 * config.hidden_size**2
        # The text as the original has it before and behind a layer, and as the compressed layers send it.
        tokens = decisions.sequences * decisions.sequence_length
        memory += 3 * min(SPILL_BYTES, 4 * config.hidden_size * tokens)
        if recipe.fit == "aligned":  # what o_proj reads of all text, and the normal equations of its regression
            inner = config.num_attention_heads * source.head_dim
            memory += min(SPILL_BYTES, 4 * inner * tokens) + 8 * 4 * inner * (inner + config.hidden_size)
        if any(fits_scores(source, recipe, layer) for layer in layers):
            memory += _score_bytes(source, decisions.sequences, decisions.sequence_length)
        # The layer as it is composed, and what a step of it keeps for its gradients.
        memory += 4 * decoder + step_bytes(source, decisions.refinement_steps > 0)
        if decisions.refinement_steps:  # gradients, Adam's two moments, and where the weights began and were best
            memory += 5 * 4 * (attention + pairs)
        if recipe.text is None:  # text is sampled from the whole model, before the fit
            memory = max(memory, sum(info.nbytes for info in infos))
    if decisions.healing_steps:
        memory = max(memory, healing_bytes(source, layers, decisions.sequence_length))
    largest = max((prod(info.shape) for info in infos), default=0)
    memory += (4 + size) * largest if recipe.dtype else 0
    return Costs(
        parameters_before=total,
        parameters_after=total + grown,
        output_bytes=output,
        disk_bytes=output + size * scratch + healing_disk,
        memory_bytes=memory + _WORKING_BYTES,
        stock_export=_stock_export(source, recipe, layers, size),
        heal_bytes=_heal_bytes(source, layers, total, total + grown),
    )


def _heal_bytes(source: Checkpoint, layers: Sequence[LayerPlan], before: int, after: int) -> int:
    """Return the memory of `heal` by itself, as one process, activations left out."""
    config = source.config
    attention = 2 * config.num_attention_heads * source.head_dim * config.hidden_size
    trained = sum(layer.parameters_after + attention for layer in layers)
    tied = bool({**source.raw_config, **language_settings(source.raw_config)}.get("tie_word_embeddings"))
    embeddings = 0 if tied else config.vocab_size * config.hidden_size
    itemsize = DTYPE_BITS[source.dtype] // 8 if source.dtype == "BF16" else 4
    return heal_weight_bytes(before, after, trained, embeddings, itemsize)


def largest_layer(source: Checkpoint) -> int:
    """Return the numbers of the largest decoder layer."""
    if not source.at_cache:
        prefixes = [source.family.layer.format(layer=0)]
    else:
        stem = source.first_geometry.block.split(".")
        place = next(place for place, part in enumerate(stem) if part.isdecimal())
        depth = source.config.num_hidden_layers
        prefixes = [source.stored_name(".".join([*stem[:place], str(layer), ""])) for layer in range(depth)]
    sizes = dict.fromkeys(prefixes, 0)
    for info in source.reader.tensors.values():
        for prefix in prefixes:
            if info.name.startswith((prefix, prefix.partition(".")[2])):  # some leave out what stands before layers
                sizes[prefix] += prod(info.shape)
    return max(sizes.values())


def step_bytes(source: Checkpoint, gradients: bool) -> int:
    """Return the bytes of one step's activations in a decoder layer, float32; measured, and held to it by a test.

    Args:
        source: The checkpoint.
        gradients: Whether the layer is refined, so that its activations are kept.
    """
    settings, hidden = language_settings(source.raw_config), source.config.hidden_size
    inner = settings.get("intermediate_size") or 4 * hidden
    if settings.get("moe_intermediate_size"):
        inner = settings["moe_intermediate_size"] * (settings.get("num_experts_per_tok") or 1)
    # Channels a token that are alive at once: of the stream and the heads, and of the MLP.
    channels = 18 * hidden + 8 * inner if gradients else 8 * hidden + 3 * inner
    return 4 * TOKENS_PER_STEP * channels


def healing_batch(length: int) -> int:
    """Return the sequences of a given length in a step of distillation."""
    return max(1, min(_HEALING_SEQUENCES, HEALING_TOKENS // length))


def healing_bytes(source: Checkpoint, layers: Sequence[LayerPlan], length: int, on_gpu: bool = False) -> int:
    """Return the memory that a distillation takes: the original once, and what the compressed layers have beside it.

    Args:
        source: The checkpoint.
        layers: The plan of every layer.
        length: Tokens of a sequence; the logits of one are in memory at a time.
        on_gpu: Whether it is that of a GPU.
    """
    config = source.config
    wide = 2 if source.dtype == "BF16" and (on_gpu or has_bfloat16_products()) else 4
    tokens = max(HEALING_MICRO_TOKENS, length)  # that are run at once
    attention = 2 * config.num_attention_heads * source.head_dim * config.hidden_size
    trained = sum(layer.parameters_after + attention for layer in layers if layer.compressed)
    # Weights, gradients, Adam's two moments, where they began and were best; and once as products take them.
    memory = wide * sum(prod(info.shape) for info in source.reader.tensors.values()) + (6 * 4 + wide) * trained
    step = step_bytes(source, True) * tokens // TOKENS_PER_STEP  # float32
    memory += len(layers) * step * wide // 4
    memory += len(layers) * tokens * config.hidden_size * 4  # what the original's layers send
    return memory + 5 * 4 * length * config.vocab_size


def _stock_export(source: Checkpoint, recipe: Recipe, layers: Sequence[LayerPlan], itemsize: int) -> dict[str, object]:
    """Return what a stock export of the planned layers costs and saves, or why there can be none."""
    if source.at_cache:
        return {"reason": f"the attention of {source.family.model_type} stays as it is and is composed at its cache"}
    sections = []
    for layer, spec in zip(layers, source.config.mea["layers"], strict=True):
        section = dict(spec)
        if layer.compressed:
            section = layer.spec.section()
            if recipe.kv_groups > 1:
                section["groups"] = recipe.kv_groups
            key = layer.spec.key
            choice = side_choice(recipe, "key", key.composition)
            if key.form.per_pair and method_allocates_alike(choice, recipe):
                section["rotary_components"] = uniform_rotary_components(key.components, source.head_dim)
        sections.append(section)
    try:
        form = stock_form(source, sections)
    except RequestError as error:
        return {"reason": str(error)}
    cost = export_cost(source, form, itemsize, [layer.window for layer in layers])
    return {
        "key_value_heads": form.groups,
        "head_dim": form.head_dim,
        **cost.to_json(),
        "warning": engine_warning(form),
    }
