"""The families that can be compressed, described as data."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mea_compress.checkpoint.fp8 import fp8_layout
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import rotary_pairs

MEA_PREFIX = "mea_"

Shapes = dict[str, tuple[int, ...]]
"""Tensors by name, with the shape that each must have."""


def gated(config: Any, layer: int) -> Shapes:
    """Return the tensors of a gated MLP with three projections."""
    inner, hidden = config.intermediate_size, config.hidden_size
    shapes: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if getattr(config, "mlp_bias", False):
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes


def fused_gated(config: Any, layer: int) -> Shapes:
    """Return the tensors of a gated MLP whose gate and up projections are stacked."""
    inner, hidden = config.intermediate_size, config.hidden_size
    return {"mlp.gate_up_proj.weight": (2 * inner, hidden), "mlp.down_proj.weight": (hidden, inner)}


def experts(config: Any, layer: int) -> Shapes:
    """Return the tensors of a mixture of gated experts, each stored apart; some layers have one MLP instead."""
    count, inner, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    if layer in config.mlp_only_layers or count < 1 or (layer + 1) % config.decoder_sparse_step:
        return gated(config, layer)
    shapes: Shapes = {"mlp.gate.weight": (count, hidden)}
    for expert in range(count):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    return shapes


@dataclass(frozen=True)
class Family:
    """How a family names the parts of its attention.

    Attributes:
        model_type: ``model_type`` in the family's config.json.
        prefix: Stem of its classes here: ``Llama`` for ``MeaLlamaConfig``.
        layer: Prefix of a layer's tensors, with ``{layer}`` for its number.
        fused: Name of one projection that holds queries, keys and values stacked, or None where they are apart.
        mlp: What a layer has but for its attention and its two norms.
        qk_norm: Whether queries and keys pass an RMSNorm over head_dim before RoPE.
        stock_export: Whether a stock checkpoint of this family can hold wider heads with other frequencies.
        at_cache: Whether its attention blocks stay as they are and are composed at their cache; nothing of the above
            is known of such a family but its type.
        class_names: Of its classes here (configuration, base model, causal language model), where they are not made
            from the stem.
        multimodal_classes: Names of transformers' auto classes that load it with its towers for images or sound, where
            the language model is a part of it.
    """

    model_type: str
    prefix: str
    layer: str = "model.layers.{layer}."
    fused: str | None = None
    mlp: Callable[[Any, int], Shapes] = gated
    qk_norm: bool = False
    stock_export: bool = True
    at_cache: bool = False
    class_names: tuple[str, str, str] | None = None
    multimodal_classes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, str, str]:
        """Names of its classes in emitted code: configuration, base model, causal language model."""
        stem = f"Mea{self.prefix}"
        return self.class_names or (f"{stem}Config", f"{stem}Model", f"{stem}ForCausalLM")

    @property
    def emitted_type(self) -> str:
        """``model_type`` of emitted checkpoints."""
        return MEA_PREFIX + self.model_type

    def attention(self, layer: int) -> str:
        """Prefix of the tensors of a layer's attention."""
        return self.layer.format(layer=layer) + "self_attn."


@dataclass(frozen=True)
class LayerGeometry:
    """Keys and values of one layer, as the queries see them.

    Attributes:
        block: Path of the attention block in the causal language model, ``model.layers.0.self_attn``.
        heads: H, key/value heads.
        head_dim: d, channels of a key.
        value_dim: Channels of a value.
        rotary_dim: Channels of a key that RoPE rotates, 0 where positions are not rotary.
        interleaved: Whether RoPE rotates neighbouring channels together instead of the halves of the rotated part.
    """

    block: str
    heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    interleaved: bool = False

    def dim(self, side: str) -> int:
        """Return the channels of a head of one side, ``key`` or ``value``."""
        return self.head_dim if side == "key" else self.value_dim

    @property
    def pairs(self) -> tuple[list[int], list[int]]:
        """The two channels of every rotary pair."""
        return rotary_pairs(self.head_dim, self.rotary_dim, self.interleaved)


FAMILIES = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3", qk_norm=True),
    Family("qwen3_moe", "Qwen3Moe", mlp=experts, qk_norm=True),
    Family("phi3", "Phi3", fused="qkv_proj", mlp=fused_gated, stock_export=False),
)

# Settings under which keys and values cannot be composed, and why.
_UNSUPPORTED_SETTINGS = {
    "kv_lora_rank": "its attention already caches a latent (MLA)",
    "quantization_config": "its weights are quantised otherwise than in fp8 with scales; save it unquantised first",
}
# The same for families that are written out: at the cache it would not matter.
_UNSUPPORTED_IN_PROJECTIONS = {"attn_logit_softcapping": "its attention logits are soft-capped"}


def language_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of the language model: a part of its own, or all of it."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def find_family(config: dict[str, Any], where: str) -> Family:
    """Return the family of a config.json.

    Args:
        config: The parsed file.
        where: Its path, for the message.

    Raises:
        RequestError: The family is unknown or the checkpoint has an attention that cannot be compressed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise RequestError(f"{where} has no model_type; use a checkpoint directory that transformers can load")
    known = {family.model_type: family for family in FAMILIES}
    stock_type = model_type.removeprefix(MEA_PREFIX)
    unsupported = _UNSUPPORTED_SETTINGS | (_UNSUPPORTED_IN_PROJECTIONS if stock_type in known else {})
    settings = {**language_settings(config), **config}
    for key, reason in unsupported.items():
        if settings.get(key) is not None and not (key == "quantization_config" and fp8_layout(config)):
            raise RequestError(f"{where}: this {model_type} checkpoint cannot be compressed, {reason} ({key})")
    family = known.get(stock_type) or _family_at_cache(stock_type, where)
    for key in ("vision_config", "audio_config"):
        if isinstance(config.get(key), dict) and not family.multimodal_classes:
            raise RequestError(
                f"{where}: this {model_type} checkpoint has more than a language model in it ({key}), and transformers "
                "has no class of the whole whose language model can be told apart; give a checkpoint of the language "
                "model alone"
            )
    return family


def _family_at_cache(model_type: str, where: str) -> Family:
    """Return any other family that transformers has a causal language model of."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    from mea_compress.modeling import family_classes, multimodal_classes

    try:
        config, base, model = family_classes(model_type)
    except ValueError:
        types = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]
        if model_type in types:
            raise RequestError(
                f"{where}: this {model_type} checkpoint cannot be compressed, its language model is a part of it that "
                "config.json does not tell apart (text_config); give a checkpoint of the language model alone"
            ) from None
        near = difflib.get_close_matches(model_type, types, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RequestError(
            f"{where}: model_type {model_type!r} cannot be compressed{hint}; give a checkpoint of a causal language "
            "model that this release of transformers knows"
        ) from None
    names = (config.__name__, (base or model).__name__, model.__name__)
    multimodal = tuple(auto.__name__ for auto in multimodal_classes(config))
    return Family(model_type, "", stock_export=False, at_cache=True, class_names=names, multimodal_classes=multimodal)
