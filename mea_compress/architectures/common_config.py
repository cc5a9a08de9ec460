"""Fast path for common config.json files, without importing transformers.

`read_common_config` accepts only settings that it knows, each plainly well-formed. For anything else it returns None,
and the configuration class of the family, which stays the authority, is asked instead
(`mea_compress.architectures.checkpoint.model_configuration`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from mea_compress.architectures.families import Family
from mea_compress.modeling.section_mea import complete_section

_LARGEST = 1 << 31
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Numbers that each kind of RoPE must have beside its base.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes and settings of a model that compression depends on, under the names that transformers gives them.

    What a family does not have keeps its default.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any]
    head_dim: int | None = None
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None
    decoder_sparse_step: int | None = None
    mlp_only_layers: list[int] | None = None
    mea: dict[str, Any] = field(default_factory=dict)


def read_common_config(fields: Mapping[str, Any], family: Family) -> ModelShape | None:
    """Return the shape of a model from its configuration, or None where something is missing or not quite usual.

    Args:
        fields: config.json without ``model_type``, ``architectures`` and ``auto_map``, with a ``mea`` section.
        family: Of the checkpoint.
    """
    family_required, family_optional = _FAMILY_SETTINGS[family.model_type]
    required = _REQUIRED | family_required
    known = required | _OPTIONAL | family_optional
    if not required.keys() <= fields.keys() <= known.keys():
        return None
    if not all(known[name](value) for name, value in fields.items()):
        return None
    depth, hidden, query_heads = (fields[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if hidden % query_heads or query_heads % fields["num_key_value_heads"]:
        return None
    head_dim = fields.get("head_dim")
    if head_dim is None and family.model_type in ("llama", "mistral"):
        head_dim = hidden // query_heads
    rope = _rope(fields, family, head_dim or hidden // query_heads)
    layer_types, window = fields.get("layer_types"), fields.get("sliding_window")
    if "use_sliding_window" in required:
        window = window if fields["use_sliding_window"] else None
    if family.model_type in ("qwen2", "qwen3") and layer_types is None:
        first = depth if window is None else fields["max_window_layers"]
        layer_types = [_LAYER_TYPES[layer >= first] for layer in range(depth)]
    if rope is None or (layer_types is not None and len(layer_types) != depth):
        return None
    settings = {name: fields[name] for name in ModelShape.__dataclass_fields__ if name in fields}
    settings |= {"rope_parameters": rope, "head_dim": head_dim, "sliding_window": window, "layer_types": layer_types}
    if family.model_type == "qwen3_moe":
        counts = [fields[name] for name in ("num_experts", "num_local_experts") if name in fields]
        if len(counts) != 1:  # transformers saves the second name and published files have the first
            return None
        settings["num_experts"] = counts[0]
    shape = ModelShape(**settings)
    flag = fields.get("attention_bias", False)
    bias = {"query": flag, "key": flag, "value": flag, "output": flag}
    if family.model_type == "qwen2":
        bias = {"query": True, "key": True, "value": True, "output": False}
    try:
        return replace(shape, mea=complete_section(fields["mea"], shape, qk_norm=family.qk_norm, bias=bias))
    except Exception:  # the class says what is wrong with the section
        return None


def _rope(fields: Mapping[str, Any], family: Family, head_dim: int) -> dict[str, Any] | None:
    """Return ``rope_parameters`` as the class completes them, or None."""
    rope = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    if "rope_theta" in fields:
        rope.setdefault("rope_theta", fields["rope_theta"])
    partial = fields.get("partial_rotary_factor", 1.0 if family.model_type == "phi3" else None)
    if partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    kind = rope.setdefault("rope_type", "default")
    if kind not in _ROPE or (family.model_type == "phi3" and kind != "default"):
        return None
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    numbers = {"rope_theta", *_ROPE[kind]}
    if not numbers <= rope.keys() <= numbers | {"rope_type", "partial_rotary_factor"}:
        return None
    if not all(_number(rope[name]) and 1 <= rope[name] <= _LARGEST for name in numbers):
        return None
    if kind == "llama3" and not (
        rope["low_freq_factor"] < rope["high_freq_factor"] and _size(rope["original_max_position_embeddings"])
    ):
        return None
    share = rope.get("partial_rotary_factor", 1.0)
    if not _number(share):
        return None
    rotary_dim = int(head_dim * share)
    return rope if 2 <= rotary_dim <= head_dim and rotary_dim % 2 == head_dim % 2 == 0 else None


def _size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str


def _positive(value: Any) -> bool:
    return type(value) is float and 0 < value < 1


def _share(value: Any) -> bool:
    return type(value) is float and 0 <= value < 1


def _token(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value <= _LARGEST)


def _tokens(value: Any) -> bool:
    return _token(value) or (isinstance(value, list) and all(type(token) is int and _token(token) for token in value))


def _optional(known: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or known(value)


def _among(names: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _each(known: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(known, value))


def _section(value: Any) -> bool:
    return isinstance(value, dict)


_Known = dict[str, Callable[[Any], bool]]
_REQUIRED: _Known = {
    "num_hidden_layers": _size,
    "num_attention_heads": _size,
    "num_key_value_heads": _size,
    "hidden_size": _size,
    "intermediate_size": _size,
    "vocab_size": _size,
    "max_position_embeddings": _size,
    "rms_norm_eps": _positive,
    "tie_word_embeddings": _flag,
    "mea": _section,
}
# Compression asks nothing of most of these, but the class would refuse some values.
_OPTIONAL: _Known = {
    "head_dim": _size,
    "hidden_act": _among(_ACTIVATIONS),
    "attention_dropout": _share,
    "rope_parameters": _optional(_section),
    "rope_scaling": _optional(_section),
    "rope_theta": _number,
    "dtype": _among(_DTYPES),
    "torch_dtype": _among(_DTYPES),
    "initializer_range": _positive,
    "use_cache": _flag,
    "transformers_version": _text,
    "_name_or_path": _text,
    "bos_token_id": _token,
    "eos_token_id": _tokens,
    "pad_token_id": _token,
}
_WINDOW: _Known = {"sliding_window": _optional(_size)}
_CHOSEN_WINDOW: _Known = _WINDOW | {"use_sliding_window": _flag, "max_window_layers": _size}
_TYPES: _Known = {"layer_types": _optional(_each(_among(_LAYER_TYPES)))}
_BIAS: _Known = {"attention_bias": _flag}
_EXPERTS: _Known = {
    "moe_intermediate_size": _size,
    "decoder_sparse_step": _size,
    "num_experts_per_tok": _size,
    "mlp_only_layers": _each(lambda value: type(value) is int),
}
_ROUTING: _Known = {
    "num_experts": _size,
    "num_local_experts": _size,
    "norm_topk_prob": _flag,
    "output_router_logits": _flag,
    "router_aux_loss_coef": _share,
    "max_window_layers": _size,
}
_FAMILY_SETTINGS: dict[str, tuple[_Known, _Known]] = {
    "llama": ({}, _BIAS | {"mlp_bias": _flag, "pretraining_tp": _size}),
    "mistral": (_WINDOW, {}),
    "qwen2": (_CHOSEN_WINDOW, _TYPES),
    "qwen3": (_CHOSEN_WINDOW | {"head_dim": _size}, _TYPES | _BIAS),
    "qwen3_moe": (_WINDOW | {"use_sliding_window": _flag} | _EXPERTS, _BIAS | _ROUTING),
    "phi3": (
        _WINDOW,
        _BIAS
        | {
            "embd_pdrop": _share,
            "resid_pdrop": _share,
            "original_max_position_embeddings": _size,
            "partial_rotary_factor": _number,
        },
    ),
}
"""Settings that a family must have, those of `_REQUIRED` apart, and others that it may have."""
