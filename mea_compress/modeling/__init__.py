"""MEA as a transformers model."""

# Family prefixes of the classes in configuration_mea.py and modeling_mea.py.
FAMILIES = ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")


def register() -> None:
    """Makes ``AutoModelForCausalLM.from_pretrained`` load MEA checkpoints without remote code. Safe to repeat."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from mea_compress.modeling import configuration_mea, modeling_mea

    for family in FAMILIES:
        config = getattr(configuration_mea, f"Mea{family}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling_mea, f"Mea{family}Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(modeling_mea, f"Mea{family}ForCausalLM"), exist_ok=True)
