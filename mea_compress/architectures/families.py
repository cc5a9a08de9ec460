"""The families that can be compressed, described as data."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mea_compress.errors import RequestError

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
    """

    model_type: str
    prefix: str
    layer: str = "model.layers.{layer}."
    fused: str | None = None
    mlp: Callable[[Any, int], Shapes] = gated
    qk_norm: bool = False
    stock_export: bool = True

    @property
    def emitted_type(self) -> str:
        """``model_type`` of emitted checkpoints."""
        return MEA_PREFIX + self.model_type

    def attention(self, layer: int) -> str:
        """Prefix of the tensors of a layer's attention."""
        return self.layer.format(layer=layer) + "self_attn."


FAMILIES = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3", qk_norm=True),
    Family("qwen3_moe", "Qwen3Moe", mlp=experts, qk_norm=True),
    Family("phi3", "Phi3", fused="qkv_proj", mlp=fused_gated, stock_export=False),
)

# Well-known families whose attention cannot be compressed here, and why.
_UNSUPPORTED_FAMILIES = {
    "gemma2": "its attention logits are soft-capped",
    "gemma3": "its layers rotate at two different bases",
    "gemma3_text": "its layers rotate at two different bases",
    "deepseek_v2": "its attention already caches a latent (MLA)",
    "deepseek_v3": "its attention already caches a latent (MLA)",
    "kimi_k2": "its attention already caches a latent (MLA)",
    "gpt_oss": "its attention has sinks",
    "gpt2": "its positions are not rotary",
    "opt": "its positions are not rotary",
    "bloom": "its positions are not rotary",
}

# Settings under which the attention of a supported family is no longer plain attention over key/value heads.
_UNSUPPORTED_SETTINGS = {
    "attn_logit_softcapping": "its attention logits are soft-capped",
    "kv_lora_rank": "its attention already caches a latent (MLA)",
    "quantization_config": "its weights are quantised; save it unquantised first",
}


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
    family = known.get(model_type.removeprefix(MEA_PREFIX))
    if family is None and model_type in _UNSUPPORTED_FAMILIES:
        raise RequestError(
            f"{where}: {model_type} checkpoints cannot be compressed, {_UNSUPPORTED_FAMILIES[model_type]}; "
            f"supported are {', '.join(known)}"
        )
    if family is None:
        near = difflib.get_close_matches(model_type, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RequestError(
            f"{where}: model_type {model_type!r} cannot be compressed{hint}; supported are {', '.join(known)} "
            f"and their {MEA_PREFIX} forms"
        )
    for key, reason in _UNSUPPORTED_SETTINGS.items():
        if config.get(key) is not None:
            raise RequestError(f"{where}: this {model_type} checkpoint cannot be compressed, {reason} ({key})")
    return family
