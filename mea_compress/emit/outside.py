"""Forms from outside the package: one file each, which compressed checkpoints carry beside the modeling code."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from mea_compress import modeling
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import OWN_FORMS, Form

FORM_FILES: dict[str, Path] = {}
"""The files of the forms that were registered in this process, by the form's name."""
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def form_file(name: str) -> str:
    """Return the name of the file that brings a form, ``my_form_mea.py`` for the form ``my-form``."""
    return f"{name.replace('-', '_')}_mea.py"


def register_form(file: Path | str) -> Form:
    """Make a form known in this process, and have checkpoints that use it carry its file.

    The file is run as a module of `mea_compress.modeling`, and next to attention_mea.py in every checkpoint that
    carries it, so it imports from its siblings relatively and from no other file of this package. It calls
    ``attention_mea.register_form(form, module)`` when it is imported, and has

    - ``FORM``, the `Form`;
    - ``expansion``, the linear map of one side from components to heads as a NumPy array (H * d, width), float64,
      given a `FactoredHeads`: the reference that the module is verified against.

    Args:
        file: ``NAME_mea.py``, where NAME is the form's name with ``_`` for ``-``.

    Raises:
        RequestError: It is no such file.
    """
    import numpy as np
    import torch

    from mea_compress.heads.composed import EXPANSIONS, FactoredHeads
    from mea_compress.modeling.reference import RECONSTRUCT

    path = Path(file).resolve()
    name = f"{modeling.__name__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RequestError(f"{file} cannot be imported; give the Python file of a form")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    form = getattr(module, "FORM", None)
    if not isinstance(form, Form) or not callable(getattr(module, "expansion", None)):
        raise RequestError(f"{file} has no FORM or no expansion; define both")
    if not _NAME.fullmatch(form.name) or path.name != form_file(form.name):
        raise RequestError(f"{file} brings the form {form.name}; name the form in lower case and its file after it")

    def reconstruct(composition: Any, components: Any, heads: int) -> Any:
        weight, head_dim = composition.weight.detach().double().numpy(), composition.sizes.head_dim
        side = FactoredHeads(form, heads, head_dim, np.zeros((components.shape[1], 1)), weight)
        return (components @ torch.from_numpy(side.expansion()).T.to(components)).unflatten(-1, (heads, head_dim))

    EXPANSIONS[form.name], RECONSTRUCT[form.name] = module.expansion, reconstruct
    FORM_FILES[form.name] = path
    return form


def outside_forms(directory: Path) -> list[str]:
    """Return the forms that a checkpoint's layers have and this release does not bring, as config.json names them."""
    try:
        layers = json.loads((directory / "config.json").read_text(encoding="utf-8"))["mea"]["layers"]
        names = {layer.get(f"{side}_form") for layer in layers if layer for side in ("key", "value")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(name for name in names if isinstance(name, str) and _NAME.fullmatch(name) and name not in OWN_FORMS)
