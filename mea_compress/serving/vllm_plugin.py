"""The entry point ``vllm.general_plugins``: makes vLLM load every compressed checkpoint with the cache it was made for.

vLLM calls `register` in each of its processes. Nothing of vLLM is changed: a configuration and an architecture that it
does not know are registered, by the ways that it has for this.
"""

from mea_compress.modeling import register as register_with_transformers

_MODELS = "mea_compress.serving.vllm_model"


def register() -> None:
    """Make compressed checkpoints known to vLLM and to the transformers in its process. Safe to repeat."""
    from vllm import ModelRegistry

    from mea_compress.modeling.configuration_mea import CONFIGS

    register_with_transformers()
    for config in CONFIGS:
        family = config.__name__.removesuffix("Config")
        served = "ServedMoeForCausalLM" if family.endswith("Moe") else "ServedForCausalLM"
        ModelRegistry.register_model(f"{family}ForCausalLM", f"{_MODELS}:{served}")


__all__ = ["register"]
