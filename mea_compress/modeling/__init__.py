"""MEA as a transformers model, and its registration there."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Make ``AutoModelForCausalLM.from_pretrained`` load MEA checkpoints without remote code. Safe to repeat.

    Example:
        >>> register()
        >>> from transformers import AutoConfig
        >>> AutoConfig.for_model("mea_llama").model_type
        'mea_llama'
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from mea_compress.modeling import configuration_mea, modeling_mea

    for config in configuration_mea.CONFIGS:
        family = config.__name__.removeprefix("Mea").removesuffix("Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling_mea, f"Mea{family}Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(modeling_mea, f"Mea{family}ForCausalLM"), exist_ok=True)
    _register_other_families()


def family_classes(stock_type: str) -> tuple[Any, Any, Any]:
    """Register the classes of a family that is not written out, and return them.

    Args:
        stock_type: ``model_type`` of the family's own checkpoints.

    Returns:
        Its configuration, its base model or None, and its causal language model, with whatever else is in it.

    Raises:
        ValueError: Transformers has no causal language model of that type.
    """
    from transformers import (
        CONFIG_MAPPING,
        MODEL_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
    )

    from mea_compress.modeling.configuration_mea import family_config
    from mea_compress.modeling.modeling_mea import family_model

    try:
        stock: Any = CONFIG_MAPPING[stock_type]
    except KeyError:
        raise ValueError(f"transformers has no causal language model of model_type {stock_type!r}") from None
    causal: Any = stock_class(stock)
    config = family_config(stock)
    AutoConfig.register(f"mea_{stock_type}", config, exist_ok=True)
    for auto in (AutoModelForCausalLM, *multimodal_classes(stock)):
        auto.register(config, family_model(causal), exist_ok=True)
    base: Any = MODEL_MAPPING.get(stock, None)
    if base is not None:
        AutoModel.register(config, family_model(base), exist_ok=True)
    return config, base and family_model(base), family_model(causal)


def stock_class(kind: Any) -> Any:
    """Return the class that transformers has for language models of a class of configurations, images and all.

    Raises:
        ValueError: It has none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    multimodal = multimodal_classes(kind)
    found: Any = (MODEL_FOR_MULTIMODAL_LM_MAPPING if multimodal else MODEL_FOR_CAUSAL_LM_MAPPING).get(kind, None)
    if found is None:
        raise ValueError(f"transformers has no causal language model of model_type {kind.model_type!r}")
    return found


def multimodal_classes(kind: Any) -> list[Any]:
    """Return those of transformers' auto classes that make a model of more than text, of a class of configurations."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    if "text_config" not in kind.sub_configs:
        return []
    classes = {
        AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    return [auto for auto, mapping in classes.items() if kind in mapping]


def _register_other_families() -> None:
    """Have the classes of every other family made when one of its configurations is read; importing all takes long."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    def deferred(stock_type: str) -> type[PretrainedConfig]:
        class Deferred(PretrainedConfig):
            model_type = f"mea_{stock_type}"

            @classmethod
            def from_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
                return family_classes(stock_type)[0].from_dict(config_dict, **kwargs)

        return Deferred

    for stock_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        if f"mea_{stock_type}" not in CONFIG_MAPPING and not stock_type.startswith("mea_"):
            AutoConfig.register(f"mea_{stock_type}", deferred(stock_type))


def register_with_transformers() -> None:
    """Register now where transformers is loaded already, or else as soon as it is; loading it takes seconds."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Lets the import of transformers end with `register`; finds nothing itself.

    Where a module of this package is what imports transformers, registering waits until that module is through: half of
    it would be missing.
    """

    def __init__(self) -> None:
        self.searching = False
        self.own = 0  # modules of this package that are being loaded
        self.waiting = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders give, whose loader tells when it is through."""
        own = fullname.startswith(f"{__name__}.")
        if self.searching or not (own or fullname == "transformers"):
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_own(module: ModuleType) -> None:
            self.own += 1
            try:
                load(module)
            finally:
                self.own -= 1
            self._register()

        def load_transformers(module: ModuleType) -> None:
            load(module)
            self.waiting = True
            self._register()

        spec.loader.exec_module = load_own if own else load_transformers  # type: ignore[method-assign]
        return spec

    def _register(self) -> None:
        """Register once transformers is loaded and no module of this package is half loaded."""
        if not self.waiting or self.own:
            return
        self.waiting = False
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            register()
        except Exception as error:  # what is wrong with this package is no reason not to have transformers
            warnings.warn(f"MEA checkpoints are not known to this transformers: {error}", stacklevel=2)
