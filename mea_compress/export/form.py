"""Whether a compressed checkpoint is a stock one, and with which heads; from configurations alone.

A query times a composed key is another query times the cached components: q · (E k) = (Eᵀ q) · k, and o_proj reads
composed values as (W_O E) v. Where E commutes with RoPE, folding it into q_proj and o_proj leaves plain grouped-query
attention over what is cached: `groups` key/value heads, each as wide as its components, whose rotary frequencies are
those of its lanes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from mea_compress.architectures import Source
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import side_form

if TYPE_CHECKING:
    import torch

FORMATS = ("stock", "llama")
# RoPE types whose frequencies do not depend on how long a sequence is.
_STEADY = ("default", "linear", "llama3", "yarn", "proportional")
# The frequency of a channel that does not turn; its wavelength must be a finite float32.
_STILL = 1e-30
_SERVE = "serve the compressed checkpoint itself with trust_remote_code"


@dataclass(frozen=True)
class StockForm:
    """The attention of the exported checkpoint, the same in every layer.

    Attributes:
        groups: ``num_key_value_heads``.
        head_dim: Channels of one of those heads.
        lanes: The source's rotary pair that each rotary pair of such a head turns like, (head_dim / 2,).
        own_rope: Whether RoPE is the source's own; otherwise frequencies are written down.
    """

    groups: int
    head_dim: int
    lanes: tuple[int, ...]
    own_rope: bool


@dataclass(frozen=True)
class Growth:
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

    def to_json(self) -> dict[str, Any]:
        """Part of `plan --json` and `export --json`."""
        return {
            "query_and_output_width": self.factor,
            "weight_bytes_added": self.weight_bytes,
            "kv_bytes_saved_per_token": self.kv_bytes_per_token,
            "saves_memory_from_tokens": self.tokens,
        }


def side_groups(spec: Mapping[str, Any], side: str) -> int:
    """Separate groups of heads that one side of a layer is composed in."""
    if side_form(spec, side).plain:
        return spec[f"{side}_components"]
    return spec.get("groups", 1)


def stock_form(source: Source, layers: Sequence[Mapping[str, Any]], target: str = "stock") -> StockForm:
    """The form in which layers can be exported.

    Args:
        source: The checkpoint, for its shapes.
        layers: Of the ``mea`` section, or planned for it; planned frequency keys may leave ``rotary_components`` out
            where only the weights decide.
        target: One of `FORMATS`.

    Raises:
        RequestError: No stock class computes the same; the message says why, and the nearest that works.
    """
    section, head_dim = source.config.mea, source.head_dim
    if section["head_norm"]:
        raise RequestError(
            f"a head norm on the attention's output is no part of {source.family.model_type}'s attention; {_SERVE}"
        )
    components = _same_width(layers)
    for index, spec in enumerate(layers):
        if not side_form(spec, "key").commutes_with_rope:
            raise RequestError(
                f"layer {index} has {spec['key_composition']} keys, which are rebuilt before RoPE and cannot be folded "
                "into queries; compress with --key-composition frequency --rotary-budget uniform (the recipe "
                "serve-anywhere)"
            )
    groups = gcd(*(side_groups(spec, side) for spec in layers for side in ("key", "value")))
    if section["qk_norm"] and (groups != components or not all(side_form(spec, "key").plain for spec in layers)):
        raise RequestError(
            "the norm on composed keys (QK-norm) does not commute with their composition; compress with "
            f"--key-composition pool --value-composition pool, or {_SERVE}"
        )
    lanes = _same_lanes(source, layers, groups)
    whole = source.rotary_dim == head_dim or all(side_form(spec, "key").plain for spec in layers)
    form = StockForm(groups, 2 * len(lanes), lanes, whole and lanes == tuple(range(head_dim // 2)))
    _check_target(source, form, target)
    return form


def _same_width(layers: Sequence[Mapping[str, Any]]) -> int:
    """Components of every layer, keys and values alike."""
    first = layers[0]["key_components"]
    for index, spec in enumerate(layers):
        for side in ("key", "value"):
            count = spec[f"{side}_components"]
            if count != first:
                what = "values" if side == "value" and spec["key_components"] == first else f"layer {index}"
                raise RequestError(
                    f"{what} cache{'s' if what != 'values' else ''} {count} component heads where keys of layer 0 "
                    f"cache {first}, and a stock model has one head size; compress with --layers all and one "
                    "--kv-ratio, or the same --key-components and --value-components"
                )
    return first


def _same_lanes(source: Source, layers: Sequence[Mapping[str, Any]], groups: int) -> tuple[int, ...]:
    """The rotary pairs of one exported head, ascending."""
    lanes = None
    for index, spec in enumerate(layers):
        uniform = (spec["key_components"],) * (source.head_dim // 2)
        counts = spec.get("rotary_components") if side_form(spec, "key").per_pair else uniform
        found = None
        if counts is not None and not any(count % groups for count in counts):
            found = tuple(pair for pair, count in enumerate(counts) for _ in range(count // groups))
        if found is None or (lanes is not None and found != lanes):
            raise RequestError(
                f"layer {index} deals its key components out to rotary pairs in its own way, and a stock model has one "
                "list of frequencies for all heads and layers; compress with --rotary-budget uniform (the recipe "
                "serve-anywhere)"
            )
        lanes = found
    assert lanes is not None
    return lanes


def _check_target(source: Source, form: StockForm, target: str) -> None:
    config, name = source.config, source.family.model_type
    if target not in FORMATS:
        raise RequestError(f"there is no export format {target!r}; choose one of {', '.join(FORMATS)}")
    if not form.own_rope:
        _check_steady(source)
    if target == "llama":
        types = getattr(config, "layer_types", None) or ["sliding_attention"]
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        sliding = window < config.max_position_embeddings and "sliding_attention" in types
        if config.mea["qk_norm"] or (source.rotary_dim != source.head_dim and form.own_rope):
            raise RequestError(f"a {name} checkpoint cannot be written as Llama; export it with --format stock")
        if sliding:
            raise RequestError(
                f"Llama has no sliding window and this {name} checkpoint has one; export it with --format stock"
            )
    elif not source.family.stock_export and not form.own_rope:
        raise RequestError(
            f"transformers' {name} takes no heads of another size than the hidden size gives; export it with --format "
            "llama, or compress with --key-composition pool --value-composition pool"
        )


def rotary(source: Source) -> tuple[torch.Tensor, float]:
    """Inverse frequency of every rotary pair (head_dim / 2,), float64, and the factor on cos and sin.

    Taken from transformers' own module, so that every scaling is what the source runs with. Channels that RoPE leaves
    alone have a frequency too small to turn anything.

    Raises:
        RequestError: Frequencies depend on the length of the sequence.
    """
    import torch

    _check_steady(source)
    family = source.family
    code = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    module = getattr(code, f"{family.prefix}RotaryEmbedding")(source.model_config)
    turning = module.inv_freq.double().clamp(min=_STILL)
    still = torch.full((source.head_dim // 2 - len(turning),), _STILL, dtype=torch.float64)
    return torch.cat((turning, still)), float(module.attention_scaling)


def _check_steady(source: Source) -> None:
    parameters = source.config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    same = kind == "longrope" and parameters["short_factor"] == parameters["long_factor"]
    if kind not in _STEADY and not same:
        raise RequestError(
            f"the rotary frequencies of this checkpoint change with the length of the sequence (rope_type {kind}) and "
            "cannot be written down for wider heads; compress with --key-composition pool --value-composition pool, "
            f"or {_SERVE}"
        )


def growth(source: Source, form: StockForm, itemsize: int, windows: Sequence[int | None]) -> Growth:
    """Weights against cache of an export.

    Args:
        source: The checkpoint, for its shapes.
        form: Of the export.
        itemsize: Bytes of a number, in weights and cache.
        windows: Tokens that each layer caches at most, or None.
    """
    config, bias = source.config, source.config.mea["bias"]
    hidden, head_dim = config.hidden_size, source.head_dim
    wider = config.num_attention_heads * (form.head_dim - head_dim)
    less = config.num_key_value_heads * head_dim - form.groups * form.head_dim
    numbers = wider * (2 * hidden + bias["query"]) - less * (2 * hidden + bias["key"] + bias["value"])
    added, saved = itemsize * numbers * len(windows), 2 * itemsize * less
    return Growth(form.head_dim / head_dim, added, saved * len(windows), _first_saving(added, saved, windows))


def _first_saving(added: int, saved: int, windows: Sequence[int | None]) -> int | None:
    """The first context length at which layers that save so many bytes a token make up for bytes added."""
    if added <= 0:
        return 0
    low, high = 0, 1 << 40
    while low < high:
        tokens = (low + high) // 2
        if saved * sum(min(tokens, window or tokens) for window in windows) >= added:
            high = tokens
        else:
            low = tokens + 1
    return low if low < 1 << 40 else None


def rope_parameters(source: Source, form: StockForm) -> dict[str, Any]:
    """``rope_parameters`` with every frequency written down, the same for short and long sequences.

    The base is 1, so that a factor is 1 over the frequency it stands for.
    """
    frequencies, _ = rotary(source)
    factors = [float(1 / frequencies[pair]) for pair in form.lanes]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": source.config.max_position_embeddings,
    }
