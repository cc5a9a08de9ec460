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
