"""Whether a compressed checkpoint is exactly a standard GQA model, and its head layout; from configurations alone.

A query times a reconstructed key is another query times the cached components, q · (E k) = (Eᵀ q) · k, and o_proj
reads reconstructed values as (W_O E) v. Where E commutes with RoPE, folding it into q_proj and o_proj (see `fold`)
leaves standard grouped-query attention over what is cached: `groups` key/value heads, each as wide as its
components, whose rotary frequencies are those of its complex components.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from mea_compress.architectures import Checkpoint
from mea_compress.architectures.rope import length_dependent_rope
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import cached_width, side_form, uniform_components

if TYPE_CHECKING:
    import torch

FORMATS = ("stock", "llama", "gguf")
# The frequency of a channel that RoPE leaves alone; its wavelength must be a finite float32.
_NO_ROTATION = 1e-30
_SERVE = "serve the compressed checkpoint itself with trust_remote_code"
_WIDE = "the recipe serve-anywhere (--key-composition frequency --rotary-allocation shared --split even --layers all)"


@dataclass(frozen=True)
class StockForm:
    """The attention of the exported checkpoint, the same in every layer but for the number of its heads.

    Attributes:
        groups: ``num_key_value_heads``; the largest where layers differ.
        head_dim: Channels of one of those heads.
        source_pairs: For each rotary pair of such a head, the source's pair with its frequency, (head_dim / 2,).
        keeps_rope: Whether RoPE is the source's; otherwise its frequencies are written down.
        layer_groups: Key/value heads of every layer where they differ, else empty.
    """

    groups: int
    head_dim: int
    source_pairs: tuple[int, ...]
    keeps_rope: bool
    layer_groups: tuple[int, ...] = ()

    def heads(self, layer: int) -> int:
        """Return the key/value heads of a layer."""
        return self.layer_groups[layer] if self.layer_groups else self.groups


@dataclass(frozen=True)
class ExportCost:
    """What an export costs in weights and gives in cache, against the model before compression.

    Attributes:
        factor: Width of q_proj and o_proj over what it was.
        weight_bytes: Bytes of weights more than before; negative where they shrink.
        kv_bytes_per_token: Cache bytes that a token needs less.
        tokens: Context length from which memory is saved, one sequence at a time; None if never.
    """

    factor: float
    weight_bytes: int
    kv_bytes_per_token: int
    tokens: int | None

    def to_json(self) -> dict[str, float | int | None]:
        """Return the entries of `plan --json` and `export --json`."""
        return {
            "query_and_output_width": self.factor,
            "weight_bytes_added": self.weight_bytes,
            "kv_bytes_saved_per_token": self.kv_bytes_per_token,
            "saves_memory_from_tokens": self.tokens,
        }


def side_groups(spec: Mapping[str, Any], side: str) -> int:
    """Return the number of separate groups of heads that one side of a layer is composed in."""
    if side_form(spec, side).plain:
        return spec[f"{side}_components"]
    return spec.get("groups", 1)


def uniform_rotary_components(components: float, head_dim: int) -> list[int]:
    """Return the complex components of each rotary pair under ``rotary_allocation: uniform``, (head_dim / 2,).

    Args:
        components: Component heads that keys cache; part of a head is possible.
        head_dim: Channels of a head.
    """
    return uniform_components(cached_width(components, head_dim) // 2, head_dim // 2)


def stock_form(source: Checkpoint, layers: Sequence[Mapping[str, Any]], target: str = "stock") -> StockForm:
    """Return the form in which layers can be exported.

    Args:
        source: The checkpoint, for its shapes.
        layers: Of the ``mea`` section, or planned for it; planned frequency keys leave ``rotary_components`` out where
            only the weights decide.
        target: One of `FORMATS`; ``gguf`` is written from Llama's.

    Raises:
        RequestError: No stock class computes the same; the message says why, and the nearest that works.
    """
    section, head_dim = source.config.mea, source.head_dim
    if section["head_norm"]:
        raise RequestError(
            f"a head norm on the attention's output is no part of {source.family.model_type}'s attention; {_SERVE}"
        )
    for index, spec in enumerate(layers):  # first, since such keys cache their positions too and are narrower
        if not side_form(spec, "key").commutes_with_rope:
            raise RequestError(
                f"layer {index} has {spec['key_composition']} keys, which are rebuilt before RoPE and cannot be folded "
                f"into queries; compress with {_exportable(source, spec['value_components'])}"
            )
    if target == "gguf" and (counts := _counts_of_plain_heads(layers)):
        form = StockForm(max(counts), head_dim, tuple(range(head_dim // 2)), keeps_rope=True, layer_groups=counts)
        _check_target(source, form, target, max(counts))
        return form
    components = _same_width(source, layers)
    groups = gcd(*(side_groups(spec, side) for spec in layers for side in ("key", "value")))
    if section["qk_norm"] and (groups != components or not all(side_form(spec, "key").plain for spec in layers)):
        raise RequestError(
            "the norm on reconstructed keys (QK-norm) does not commute with their composition; compress with "
            f"{_pooled(source, components)}, or {_SERVE}"
        )
    pairs = _same_pairs(source, layers, groups, components)
    all_channels_rotate = source.rotary_dim == head_dim or all(side_form(spec, "key").plain for spec in layers)
    form = StockForm(groups, 2 * len(pairs), pairs, all_channels_rotate and pairs == tuple(range(head_dim // 2)))
    _check_target(source, form, target, components)
    return form


def _exportable(source: Checkpoint, components: float) -> str:
    """Return the options with which this model can be exported at about this many component heads."""
    llama_only = not source.family.stock_export
    if source.config.mea["qk_norm"] or length_dependent_rope(source.config) or (llama_only and _slides(source)):
        return _pooled(source, components)
    return f"{_WIDE} and export with --format llama" if llama_only else _WIDE


def _pooled(source: Checkpoint, components: float) -> str:
    """Return the options for pooled heads: as many as were asked for, or fewer, since they divide the heads."""
    heads = source.config.num_key_value_heads
    count = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1, components))
    return (
        f"--key-composition pool --value-composition pool --layers all --key-components {count} "
        f"--value-components {count}"
    )


def _counts_of_plain_heads(layers: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the heads of every layer where all are plain, as many values as keys, and layers differ; else nothing."""
    if not all(side_form(spec, side).plain for spec in layers for side in ("key", "value")):
        return ()
    if any(spec["key_components"] != spec["value_components"] for spec in layers):
        return ()
    counts = tuple(spec["key_components"] for spec in layers)
    return counts if len(set(counts)) > 1 else ()


def _same_width(source: Checkpoint, layers: Sequence[Mapping[str, Any]]) -> float:
    """Return the component heads of every layer, keys and values alike."""
    first = layers[0]["key_components"]
    for index, spec in enumerate(layers):
        for side in ("key", "value"):
            count = spec[f"{side}_components"]
            if count != first:
                what = "values" if side == "value" and spec["key_components"] == first else f"layer {index}"
                least = min(spec[f"{side}_components"] for spec in layers for side in ("key", "value"))
                takes_file = _counts_of_plain_heads(layers) and not _llama_obstacle(source, keeps_rope=True)
                file = "export it with --format gguf, or " if takes_file else ""
                raise RequestError(
                    f"{what} cache{'s' if what != 'values' else ''} {count} component heads where keys of layer 0 "
                    f"cache {first}, and a stock model has one head size; {file}compress with the same "
                    f"--key-components and --value-components in all layers, as by {_exportable(source, least)}"
                )
    return first


def _same_pairs(
    source: Checkpoint, layers: Sequence[Mapping[str, Any]], groups: int, components: float
) -> tuple[int, ...]:
    """Return the source's rotary pairs in one exported head, ascending."""
    shared = None
    for index, spec in enumerate(layers):
        counts: Sequence[int] | None = [spec["key_components"]] * (source.head_dim // 2)
        if side_form(spec, "key").per_pair:
            counts = spec.get("rotary_components")
        pairs = None
        if counts is not None and not any(count % groups for count in counts):
            pairs = tuple(pair for pair, count in enumerate(counts) for _ in range(count // groups))
        if pairs is None or (shared is not None and pairs != shared):
            raise RequestError(
                f"layer {index} deals its key components out to rotary pairs in its own way, and a stock model has one "
                f"list of frequencies for all heads and layers; compress with {_exportable(source, components)}"
            )
        shared = pairs
    assert shared is not None
    return shared


def _check_target(source: Checkpoint, form: StockForm, target: str, components: float) -> None:
    """Raise if the class that the format is written for cannot hold the form."""
    if target not in FORMATS:
        raise RequestError(f"there is no export format {target!r}; choose one of {', '.join(FORMATS)}")
    if not form.keeps_rope and (kind := length_dependent_rope(source.config)):
        raise RequestError(
            f"the rotary frequencies of this checkpoint change with the length of the sequence (rope_type {kind}) and "
            f"cannot be written down for wider heads; compress with {_pooled(source, components)}, or {_SERVE}"
        )
    pooled = f"compress with {_pooled(source, components)}"
    stock, llama = _stock_obstacle(source, form), _llama_obstacle(source, form.keeps_rope)
    if target == "stock" and stock is not None:
        raise RequestError(f"{stock}; {'' if llama else 'export it with --format llama, or '}{pooled}")
    if target != "stock" and llama is not None:
        raise RequestError(f"{llama}; {f'{pooled} and ' if stock else ''}export it with --format stock")


def _stock_obstacle(source: Checkpoint, form: StockForm) -> str | None:
    """Return why the family's class cannot hold the form, or None."""
    if source.family.stock_export or form.keeps_rope:
        return None
    return f"transformers' {source.family.model_type} takes no heads of another size than the hidden size gives"


def _llama_obstacle(source: Checkpoint, keeps_rope: bool) -> str | None:
    """Return why Llama's class cannot hold a form with the source's RoPE, or with another, or None."""
    config, name = source.config, source.family.model_type
    if config.mea["qk_norm"] or (source.rotary_dim != source.head_dim and keeps_rope):
        return f"a {name} checkpoint cannot be written as Llama"
    return f"Llama has no sliding window and this {name} checkpoint has one" if _slides(source) else None


def _slides(source: Checkpoint) -> bool:
    """Return whether a layer sees a window shorter than the context."""
    config = source.config
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return window < config.max_position_embeddings and "sliding_attention" in types


def rotary(source: Checkpoint) -> tuple[torch.Tensor, float]:
    """Return the inverse frequency of every rotary pair, (head_dim / 2,) float64, and the factor on cos and sin.

    Taken from transformers' own module, so that every scaling is what the source runs with. Channels that RoPE leaves
    alone have a frequency too small to rotate anything. The frequencies must not depend on the length of the sequence,
    which `stock_form` has checked.
    """
    import torch

    family = source.family
    code = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    module = getattr(code, f"{family.prefix}RotaryEmbedding")(source.model_config)
    rotating = module.inv_freq.double().clamp(min=_NO_ROTATION)
    rest = torch.full((source.head_dim // 2 - len(rotating),), _NO_ROTATION, dtype=torch.float64)
    return torch.cat((rotating, rest)), float(module.attention_scaling)


def export_cost(source: Checkpoint, form: StockForm, itemsize: int, windows: Sequence[int | None]) -> ExportCost:
    """Return what an export costs in weights and saves in cache.

    Args:
        source: The checkpoint, for its shapes.
        form: Of the export.
        itemsize: Bytes of a number, in weights and cache.
        windows: Tokens that each layer caches at most, or None.
    """
    config, bias = source.config, source.config.mea["bias"]
    hidden, head_dim = config.hidden_size, source.head_dim
    wider = config.num_attention_heads * (form.head_dim - head_dim)
    narrower = [config.num_key_value_heads * head_dim - form.heads(i) * form.head_dim for i in range(len(windows))]
    added = itemsize * len(windows) * wider * (2 * hidden + bias["query"])
    added -= itemsize * sum(narrower) * (2 * hidden + bias["key"] + bias["value"])
    saved = [2 * itemsize * numbers for numbers in narrower]
    return ExportCost(form.head_dim / head_dim, added, sum(saved), _first_saving(added, saved, windows))


def _first_saving(added: int, saved: Sequence[int], windows: Sequence[int | None]) -> int | None:
    """Return the first context length at which what layers save of a token makes up for bytes added."""
    if added <= 0:
        return 0
    low, high = 0, 1 << 40
    while low < high:
        tokens = (low + high) // 2
        if sum(bytes * min(tokens, window or tokens) for bytes, window in zip(saved, windows, strict=True)) >= added:
            high = tokens
        else:
            low = tokens + 1
    return low if low < 1 << 40 else None


def rope_settings(source: Checkpoint, form: StockForm) -> dict[str, Any]:
    """Return the RoPE settings of an export's config.json, under the names of old and new libraries.

    Libraries older than transformers 5, and engines, read ``rope_theta`` and ``rope_scaling`` in place of
    ``rope_parameters``; without them they take a base of 10000.
    """
    parameters = dict(source.config.rope_parameters) if form.keeps_rope else _written_down(source, form)
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if source.family.model_type == "phi3" and scaling["rope_type"] == "longrope":
        # Before transformers 5, Phi-3 allowed these three alone.
        scaling = {"type": "longrope"} | {name: scaling[name] for name in ("short_factor", "long_factor")}
    settings = {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"]}
    if "partial_rotary_factor" in parameters:
        settings["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return settings | {"rope_scaling": None if scaling.get("rope_type") == "default" else scaling}


def _written_down(source: Checkpoint, form: StockForm) -> dict[str, Any]:
    """Return ``rope_parameters`` with every frequency written down, the same for short and long sequences.

    The base is 1, so that a factor is 1 over the frequency it stands for.
    """
    frequencies, _ = rotary(source)
    factors = [float(1 / frequencies[pair]) for pair in form.source_pairs]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": source.config.max_position_embeddings,
    }
