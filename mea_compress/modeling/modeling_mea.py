"""Models with Multi-head Explicit Attention (MEA, arXiv 2601.19611) as transformers models.

Every class is a stock one whose attention is that of attention_mea.py: the cache that ``generate`` fills holds
components only. This file needs nothing but torch and transformers and is copied into every checkpoint that uses it.
"""

import warnings
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from .attention_mea import Composition, MeaAttention
from .configuration_mea import (
    MeaLlamaConfig,
    MeaMistralConfig,
    MeaPhi3Config,
    MeaQwen2Config,
    MeaQwen3Config,
    MeaQwen3MoeConfig,
)
from .section_mea import TESTED_TRANSFORMERS


def _warn_if_untested(installed: str) -> None:
    """Warn where a release of transformers is older or newer than those that this code was tried with."""
    oldest, newest = map(Version, TESTED_TRANSFORMERS)
    # Later patches of the newest release are taken to be what it is.
    if not (oldest <= Version(installed) and Version(installed).release[:2] <= newest.release[:2]):
        warnings.warn(
            f"MEA's modeling code was tested with transformers {oldest} to {newest} and this is {installed}: "
            "compare generate with use_cache=True and False before relying on it",
            stacklevel=2,
        )


_warn_if_untested(transformers.__version__)


class MeaMixin(nn.Module):
    """Initialises what a model of this file has and a stock one has not."""

    def _init_weights(self, module: nn.Module) -> None:
        stock: Any = super()
        stock._init_weights(module)
        if isinstance(module, Composition):
            module.reset()


class MeaModelMixin(MeaMixin):
    """A stock decoder whose attention is MEA's."""

    def __init__(self, config: Any):
        super().__init__(config)
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            layer.self_attn = MeaAttention(config, index)
            # Keys that are cached before RoPE are rotated when they are read. Not a submodule: it belongs to the model.
            object.__setattr__(layer.self_attn, "rotary", self.rotary_emb)
        self.post_init()  # type: ignore[operator]


class MeaForCausalLMMixin(MeaMixin):
    """A stock causal language model over an MEA decoder."""

    decoder: type

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.decoder(config)
        self.post_init()  # type: ignore[operator]


class MeaLlamaModel(MeaModelMixin, LlamaModel):
    """Llama's decoder with explicit attention; the native MEA model."""

    config_class = MeaLlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": MeaAttention}


class MeaLlamaForCausalLM(MeaForCausalLMMixin, LlamaForCausalLM):
    """Llama with explicit attention; the native MEA language model."""

    config_class = MeaLlamaConfig
    decoder = MeaLlamaModel


class MeaMistralModel(MeaModelMixin, MistralModel):
    """Mistral's decoder with explicit attention."""

    config_class = MeaMistralConfig
    _can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": MeaAttention}


class MeaMistralForCausalLM(MeaForCausalLMMixin, MistralForCausalLM):
    """Mistral with explicit attention."""

    config_class = MeaMistralConfig
    decoder = MeaMistralModel


class MeaQwen2Model(MeaModelMixin, Qwen2Model):
    """Qwen2's decoder with explicit attention."""

    config_class = MeaQwen2Config
    _can_record_outputs = {"hidden_states": Qwen2DecoderLayer, "attentions": MeaAttention}


class MeaQwen2ForCausalLM(MeaForCausalLMMixin, Qwen2ForCausalLM):
    """Qwen2 with explicit attention."""

    config_class = MeaQwen2Config
    decoder = MeaQwen2Model


class MeaQwen3Model(MeaModelMixin, Qwen3Model):
    """Qwen3's decoder with explicit attention."""

    config_class = MeaQwen3Config
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer, "attentions": MeaAttention}


class MeaQwen3ForCausalLM(MeaForCausalLMMixin, Qwen3ForCausalLM):
    """Qwen3 with explicit attention."""

    config_class = MeaQwen3Config
    decoder = MeaQwen3Model


class MeaQwen3MoeModel(MeaModelMixin, Qwen3MoeModel):
    """Qwen3-MoE's decoder with explicit attention."""

    config_class = MeaQwen3MoeConfig
    _can_record_outputs = {
        "router_logits": Qwen3MoeModel._can_record_outputs["router_logits"],
        "hidden_states": Qwen3MoeDecoderLayer,
        "attentions": MeaAttention,
    }


class MeaQwen3MoeForCausalLM(MeaForCausalLMMixin, Qwen3MoeForCausalLM):
    """Qwen3-MoE with explicit attention."""

    config_class = MeaQwen3MoeConfig
    decoder = MeaQwen3MoeModel


class MeaPhi3Model(MeaModelMixin, Phi3Model):
    """Phi-3's decoder with explicit attention."""

    config_class = MeaPhi3Config
    _can_record_outputs = {"hidden_states": Phi3DecoderLayer, "attentions": MeaAttention}


class MeaPhi3ForCausalLM(MeaForCausalLMMixin, Phi3ForCausalLM):
    """Phi-3 with explicit attention."""

    config_class = MeaPhi3Config
    decoder = MeaPhi3Model


# Experts are stored one by one and run fused: the family's own conversion, under this model type.
register_checkpoint_conversion_mapping("mea_qwen3_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)

__all__ = [
    "MeaLlamaForCausalLM",
    "MeaLlamaModel",
    "MeaMistralForCausalLM",
    "MeaMistralModel",
    "MeaPhi3ForCausalLM",
    "MeaPhi3Model",
    "MeaQwen2ForCausalLM",
    "MeaQwen2Model",
    "MeaQwen3ForCausalLM",
    "MeaQwen3Model",
    "MeaQwen3MoeForCausalLM",
    "MeaQwen3MoeModel",
]
