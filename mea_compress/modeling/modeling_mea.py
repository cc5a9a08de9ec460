"""Models with Multi-head Explicit Attention (MEA, arXiv 2601.19611) as transformers models.

Every class is a stock one whose attention is that of attention_mea.py: the cache that ``generate`` fills holds
components only. This file needs nothing but torch and transformers and is copied into every checkpoint that uses it.
"""

import warnings
from functools import cache as remember
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .attention_mea import Composition, MeaAttention
from .configuration_mea import CONFIGS, family_config
from .encoded_mea import compose_block
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

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse at once what `generate_batch` would begin; its pages are made for the heads that the queries see.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) keeps heads in pages, and "
            "this model caches components: use generate, or export the checkpoint and serve that"
        )


def _add_family(config: type) -> None:
    """Make the two classes of a family, the stock ones over MEA's attention, from its configuration."""
    prefix = config.__name__.removeprefix("Mea").removesuffix("Config")
    stock: Any = getattr(transformers, f"{prefix}Model")
    fields = {"__module__": __name__, "config_class": config}
    decoder = type(
        f"Mea{prefix}Model",
        (MeaModelMixin, stock),
        fields
        | {
            "__doc__": f"The decoder of {prefix} with explicit attention.",
            "_can_record_outputs": stock._can_record_outputs | {"attentions": MeaAttention},
        },
    )
    model = type(
        f"Mea{prefix}ForCausalLM",
        (MeaForCausalLMMixin, getattr(transformers, f"{prefix}ForCausalLM")),
        fields | {"__doc__": f"{prefix} with explicit attention.", "decoder": decoder},
    )
    decoder.register_for_auto_class("AutoModel")  # type: ignore[attr-defined]
    model.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[attr-defined]
    globals().update({kind.__name__: kind for kind in (decoder, model)})
    __all__.extend((decoder.__name__, model.__name__))
    stock_type = config.model_type.removeprefix("mea_")  # type: ignore[attr-defined]
    _store_like(stock_type, f"mea_{stock_type}")


def _store_like(stock_name: str, name: str) -> None:
    """Have checkpoints of a model type or class stored and run (experts one by one, or fused) as a stock one's are."""
    conversion = get_checkpoint_conversion_mapping(stock_name)
    if conversion is not None:
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)


class MeaEncodedMixin(MeaMixin):
    """A stock model, some of whose attention blocks compose keys and values at their cache.

    Where a language model is a part of it, these are its blocks.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        prefix: Any = self.base_model_prefix
        causal = hasattr(self, prefix)
        for spec in config.mea["layers"]:
            if spec is not None and "block" in spec:
                path = spec["block"] if causal else spec["block"].removeprefix(f"{prefix}.")
                compose_block(self.get_submodule(path), spec)
        for module in self.modules():  # each model within initialises its own parts
            kind: Any = type(module)
            if issubclass(kind, PreTrainedModel) and not issubclass(kind, MeaEncodedMixin) and _is_composed(module):
                module.__class__ = family_model(kind)
                own: Any = module.config
                if own.model_type != config.model_type:  # a language model within: its tensors are stored its own way
                    _store_like(own.model_type, type(module).__name__)
                _note_class(module)
        self.post_init()  # type: ignore[operator]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse at once what `generate_batch` would begin; see `MeaForCausalLMMixin`.

        Raises:
            ValueError: Always.
        """
        return MeaForCausalLMMixin.init_continuous_batching(self, *args, **kwargs)  # type: ignore[arg-type]


def _is_composed(model: nn.Module) -> bool:
    """Return whether a part of a model has components: towers for images and sound have none."""
    return any(isinstance(module, Composition) for module in model.modules())


def _note_class(model: Any) -> None:
    """Have transformers note what models of this one's class can record, as it does when it builds one.

    It looks that up by class when hidden states are asked for; this model was built as its stock class.
    """
    kind: Any = type(model)
    PreTrainedModel.__init__(kind.__new__(kind), model.config)


@remember
def family_model(stock: Any) -> type:
    """Return the class of any other family's model with components at the cache of its attention blocks.

    Args:
        stock: The family's own class, ``Gemma3ForCausalLM`` or ``Gemma3TextModel``.
    """
    config = family_config(stock.config_class)
    fields = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with components in its cache.",
        "config_class": config,
    }
    model: Any = type(f"Mea{stock.__name__}", (MeaEncodedMixin, stock), fields)
    composite = "text_config" in stock.config_class.sub_configs
    causal = "AutoModelForMultimodalLM" if composite else "AutoModelForCausalLM"
    model.register_for_auto_class(causal if stock.can_generate() else "AutoModel")
    _store_like(stock.config_class.model_type, config.model_type)
    _store_like(stock.__name__, model.__name__)
    return model


__all__: list[str] = []
for _config in CONFIGS:
    _add_family(_config)


def __getattr__(name: str) -> Any:
    """Return the class of a family that is not written out above, by its name."""
    stock = getattr(transformers, name.removeprefix("Mea"), None) if name.startswith("Mea") else None
    if not (isinstance(stock, type) and hasattr(stock, "base_model_prefix")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return family_model(stock)
