"""Models with Multi-head Explicit Attention (MEA, arXiv 2601.19611) as transformers models.

Every class is a stock one whose attention is that of attention_mea.py: the cache that ``generate`` fills holds
components only. This file needs nothing but torch and transformers and is copied into every checkpoint that uses it.
"""

import warnings
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .attention_mea import Composition, MeaAttention
from .configuration_mea import CONFIGS
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
    # How a family's checkpoints are stored (experts one by one) and run (fused) holds under this model type too.
    stock_type = config.model_type.removeprefix("mea_")  # type: ignore[attr-defined]
    conversion = get_checkpoint_conversion_mapping(stock_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(f"mea_{stock_type}", conversion, overwrite=True)


__all__: list[str] = []
for _config in CONFIGS:
    _add_family(_config)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
