"""MEA as a transformers model."""


def register() -> None:
    """Makes ``AutoModelForCausalLM.from_pretrained`` load MEA checkpoints without remote code. Safe to repeat."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from mea_compress.modeling import configuration_mea, modeling_mea

    for config in configuration_mea.CONFIGS:
        family = config.__name__.removeprefix("Mea").removesuffix("Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling_mea, f"Mea{family}Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(modeling_mea, f"Mea{family}ForCausalLM"), exist_ok=True)
