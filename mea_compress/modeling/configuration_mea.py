"""Configuration of models with Multi-head Explicit Attention (MEA, arXiv 2601.19611).

Every class is the configuration of a stock family plus one section, ``mea``, which section_mea.py explains and checks.
This file needs nothing but transformers and is copied into every checkpoint that uses it.
"""

from functools import cache as remember
from typing import Any

import transformers
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from .section_mea import complete_section


def _no_bias(config: Any) -> dict[str, bool]:
    flag = bool(getattr(config, "attention_bias", False))
    return {"query": flag, "key": flag, "value": flag, "output": flag}


class MeaLlamaConfig(LlamaConfig):
    """Llama with a ``mea`` section; also the native MEA architecture."""

    model_type = "mea_llama"
    base_model_tp_plan = {}
    mea: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.mea = complete_section(self.mea, self, qk_norm=False, bias=_no_bias(self))


class MeaMistralConfig(MistralConfig):
    """Mistral with a ``mea`` section."""

    model_type = "mea_mistral"
    base_model_tp_plan = {}
    mea: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.mea = complete_section(self.mea, self, qk_norm=False, bias=_no_bias(self))


class MeaQwen2Config(Qwen2Config):
    """Qwen2 and Qwen2.5 with a ``mea`` section: biases on queries, keys and values."""

    model_type = "mea_qwen2"
    base_model_tp_plan = {}
    mea: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        bias = {"query": True, "key": True, "value": True, "output": False}
        self.mea = complete_section(self.mea, self, qk_norm=False, bias=bias)


class MeaQwen3Config(Qwen3Config):
    """Qwen3 with a ``mea`` section: queries and rebuilt keys are normalised."""

    model_type = "mea_qwen3"
    base_model_tp_plan = {}
    mea: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.mea = complete_section(self.mea, self, qk_norm=True, bias=_no_bias(self))


class MeaQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE with a ``mea`` section: queries and rebuilt keys are normalised."""

    model_type = "mea_qwen3_moe"
    base_model_tp_plan = {}
    mea: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.mea = complete_section(self.mea, self, qk_norm=True, bias=_no_bias(self))


class MeaPhi3Config(Phi3Config):
    """Phi-3 with a ``mea`` section; its fused projection is stored split."""

    model_type = "mea_phi3"
    base_model_tp_plan = {}
    mea: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.mea = complete_section(self.mea, self, qk_norm=False, bias=_no_bias(self))


CONFIGS = (MeaLlamaConfig, MeaMistralConfig, MeaPhi3Config, MeaQwen2Config, MeaQwen3Config, MeaQwen3MoeConfig)
"""The configurations of all families; modeling_mea.py makes their models."""

for _config in CONFIGS:
    _config.register_for_auto_class()  # save_pretrained writes the code beside what names it


@remember
def family_config(stock: Any) -> Any:
    """Return the configuration of any other family with a ``mea`` section, whose attention blocks stay as they are.

    The section is that of the language model where this is a part of the whole.

    Args:
        stock: The family's own configuration class, ``Gemma3TextConfig``.
    """

    class Config(stock):
        model_type = f"mea_{stock.model_type}"
        base_model_tp_plan = {}  # type: ignore[var-annotated]
        mea: dict | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            none = {"query": False, "key": False, "value": False, "output": False}
            language = self.get_text_config()
            self.mea = complete_section(self.mea, language, qk_norm=False, bias=none)
            language.mea = self.mea  # its attention blocks are handed this configuration

        def to_dict(self) -> dict[str, Any]:
            settings = super().to_dict()
            for part in settings.values():
                if isinstance(part, dict) and part.get("mea") == settings["mea"]:
                    del part["mea"]  # of the language model within
            return settings

    Config.__name__ = Config.__qualname__ = f"Mea{stock.__name__}"
    Config.__doc__ = f"{stock.__name__} with a ``mea`` section."
    Config.register_for_auto_class()
    return Config


def __getattr__(name: str) -> Any:
    """Return the configuration of a family that is not written out above, by its name."""
    stock = getattr(transformers, name.removeprefix("Mea"), None) if name.startswith("Mea") else None
    if not (isinstance(stock, type) and name.endswith("Config")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return family_config(stock)


__all__ = ["CONFIGS", "family_config", *(config.__name__ for config in CONFIGS)]
