"""Compress the KV cache of a trained transformer: fewer component heads, from which its heads are reconstructed.

The whole API is here (arXiv 2601.19611; METHOD in docs)::

    import mea_compress as mc

    mc.open("SRC")                                    # what a checkpoint is
    mc.plan("SRC", kv_ratio=0.5)                      # what would become of it
    mc.profile("SRC", text="text.txt")                # what each width of each layer costs
    result = mc.compress("SRC", "OUT", kv_ratio=0.5)  # result.plan, result.fidelity, result.out
    mc.evaluate("OUT", reference="SRC", text="held-out.txt")
    mc.heal("OUT", teacher="SRC")
    mc.export("OUT", "STOCK")                         # a plain checkpoint of its family
    mc.refresh("OUT")                                 # this version's code in an older checkpoint
    mc.run("recipe.yaml")                             # all of it
    model, tokenizer = mc.load("OUT")

Every verb takes paths first and keywords behind them: ``recipe=`` or the recipe's own fields. Results print
themselves, show tables in a notebook and have ``to_json``. Importing this package is quick and loads neither PyTorch
nor transformers; whenever transformers is imported, its `from_pretrained` knows compressed checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mea_compress.modeling import register, register_with_transformers

if TYPE_CHECKING:
    from mea_compress.compression import CompressionResult, compress
    from mea_compress.emit.code import RefreshResult, refresh
    from mea_compress.errors import RequestError
    from mea_compress.exporting.stock import ExportResult, export
    from mea_compress.fit.profile import profile
    from mea_compress.healing import HealingResult, heal
    from mea_compress.loading import load
    from mea_compress.measure.evaluation import evaluate
    from mea_compress.measure.results import Evaluation, Evaluations
    from mea_compress.pipeline import PipelineResult, run
    from mea_compress.planning.plans import Inspection, open, plan
    from mea_compress.planning.profiles import Profile
    from mea_compress.planning.types import Plan
    from mea_compress.recipe import Recipe

__version__ = "0.2.0"

_ROOMS = {
    "CompressionResult": "compression",
    "Evaluation": "measure.results",
    "Evaluations": "measure.results",
    "ExportResult": "exporting.stock",
    "HealingResult": "healing",
    "Inspection": "planning.plans",
    "PipelineResult": "pipeline",
    "Plan": "planning.types",
    "Profile": "planning.profiles",
    "Recipe": "recipe",
    "RefreshResult": "emit.code",
    "RequestError": "errors",
    "compress": "compression",
    "evaluate": "measure.evaluation",
    "export": "exporting.stock",
    "heal": "healing",
    "load": "loading",
    "open": "planning.plans",
    "plan": "planning.plans",
    "profile": "fit.profile",
    "refresh": "emit.code",
    "run": "pipeline",
}
"""Where each name of the API lives; loaded when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value  # over the sub-package of the same name, which importing it has put here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


register_with_transformers()

__all__ = [
    "open",
    "plan",
    "profile",
    "compress",
    "evaluate",
    "heal",
    "export",
    "refresh",
    "run",
    "load",
    "register",
    "CompressionResult",
    "Evaluation",
    "Evaluations",
    "ExportResult",
    "HealingResult",
    "Inspection",
    "PipelineResult",
    "Plan",
    "Profile",
    "Recipe",
    "RefreshResult",
    "RequestError",
    "__version__",
]
