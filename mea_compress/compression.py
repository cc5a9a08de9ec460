"""The main job: plan, compose layer by layer, write, verify, publish."""

import hashlib
import json
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mea_compress.architectures import Source, open_source
from mea_compress.checkpoint.dtypes import TORCH_NAMES
from mea_compress.checkpoint.system import keep_freed
from mea_compress.checkpoint.workspace import Workspace, already_published, check_free, check_space, open_workspace
from mea_compress.emit.code import CODE_FILES, write_code
from mea_compress.emit.weights import check_written, write_weights, writing_beside
from mea_compress.errors import RequestError, VerificationError
from mea_compress.plan.planning import (
    WHOLE_MODEL_BYTES,
    Plan,
    inspect_checkpoint,
    known_beforehand,
    needs_text,
    plan_source,
    realised_plan,
)
from mea_compress.recipe import Recipe, to_yaml
from mea_compress.report.cards import model_card
from mea_compress.report.tables import write_json

# Room for the files that are not weights, beside them and the layers' own files.
SPARE_BYTES = 64 << 20
# What this program says of a checkpoint; it would not be true of one that is made from it.
_OWN_DOCUMENTS = ("compression.json", "recipe.yaml", "healing.json", "training.json", "export.json")


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` made.

    Attributes:
        out: The emitted checkpoint.
        plan: What was done to every layer.
        fidelity: What was measured of it; see `compression.json`.
    """

    out: Path
    plan: Plan
    fidelity: dict[str, Any]


def compress(source: Path, out: Path, recipe: Recipe, resume: bool = False, progress: bool = True) -> CompressionResult:
    """Compresses the KV cache of a checkpoint.

    OUT appears complete or not at all: it is built beside its place, checked against what was composed (see
    `_verified`), and renamed last. Tensors that do not change are copied as bytes. SRC is only read.

    Args:
        source: Checkpoint directory.
        out: New directory.
        recipe: What to do.
        resume: Take up an interrupted run.
        progress: Show progress bars on stderr.

    Raises:
        RequestError: The request, the source or the disk does not allow it; nothing is left behind.
    """
    source, out = Path(source), Path(out).absolute()
    opened = open_source(source)
    plan = plan_source(opened, recipe)
    if resume and (already_published(out) or (out / "compression.json").is_file()):
        return _published(opened, out, recipe, plan)
    check_free(out, source)
    check_space(out, plan.disk_bytes + sum(file.stat().st_size for file in _other_files(opened)) + SPARE_BYTES)
    with open_workspace(out, _fingerprint(opened, recipe), resume) as workspace:
        plan = _make_weights(opened, plan, recipe, workspace, progress)
        config = _write_config(opened, plan, recipe, workspace)
        _copy_other_files(opened, workspace.path)
        check_written(opened, plan, workspace)
        fidelity = {
            "layers": workspace.manifest.get("fidelity", {}),
            "verification": _verified(opened, plan, recipe, workspace.path, progress),
        }
        _write_documents(opened, plan, recipe, config, fidelity, workspace.path)
        workspace.publish(out)
    return CompressionResult(out, plan, fidelity)


def _published(source: Source, out: Path, recipe: Recipe, plan: Plan) -> CompressionResult:
    """What an earlier run has finished, for a run that is resumed after it."""
    try:
        same = (out / "recipe.yaml").read_text(encoding="utf-8") == to_yaml(recipe)
        fidelity = json.loads((out / "compression.json").read_text(encoding="utf-8"))["fidelity"]
        layers = json.loads((out / "config.json").read_text(encoding="utf-8"))["mea"]["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same or len(layers) != len(plan.layers):
        raise RequestError(f"{out} is finished and was made by another recipe; choose another output directory")
    sections = {one.layer: layers[one.layer] for one in plan.layers if one.compressed}
    return CompressionResult(out, realised_plan(source, recipe, plan, sections), fidelity)


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    names = ("mea-compress", "torch", "transformers", "safetensors", "numpy", "ml-dtypes")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _fingerprint(source: Source, recipe: Recipe) -> dict[str, Any]:
    digest = hashlib.sha256()
    for info in source.reader.tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape} {info.file.name} {info.offset}\n".encode())
    files = [*source.reader.files, *_other_files(source)]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest.update(repr((sorted(stats), source.raw_config)).encode())
    text = recipe.text
    calibration = [str(text), text.stat().st_size, text.stat().st_mtime_ns] if text and text.is_file() else None
    return {
        "the source": digest.hexdigest(),
        "the recipe": to_yaml(recipe),
        "the calibration text": calibration,
        "a library version": versions(),
    }


def _make_weights(source: Source, plan: Plan, recipe: Recipe, workspace: Workspace, progress: bool) -> Plan:
    """Fits the layers and writes all weights; the plan as it was carried out."""
    if known_beforehand(source, recipe, plan):
        with writing_beside(source, plan, recipe, workspace, progress) as stored:
            from mea_compress.fit.layers import fit_layers, one_thread_less  # copying goes on while NumPy is loaded

            keep_freed()
            with one_thread_less():
                fit_layers(source, plan, recipe, workspace, False, stored)
            import mea_compress.emit.verification  # noqa: F401 - loaded while files are still being written
    else:
        from mea_compress.fit.layers import fit_layers

        fit_layers(source, plan, recipe, workspace, progress)
        plan = realised_plan(source, recipe, plan, _sections(plan, workspace))
        write_weights(source, plan, recipe, workspace, progress)
    return plan


def _sections(plan: Plan, workspace: Workspace) -> dict[int, dict[str, Any]]:
    """Entries of the ``mea`` section of the layers that were composed."""
    return {one.layer: workspace.finished("layers", str(one.layer)) for one in plan.layers if one.compressed}


def _verified(source: Source, plan: Plan, recipe: Recipe, directory: Path, progress: bool) -> dict[str, Any]:
    """What was compared of the checkpoint, with what came of it.

    What a large checkpoint holds that was fitted from weights alone is compared bit for bit with what was fitted, its
    shapes with what its configuration says, and the heads' errors were taken from what is stored. Every checkpoint
    decodes with a cache as it does without, whatever release of transformers is installed.
    """
    if needs_text(source, recipe) or source.weight_bytes <= WHOLE_MODEL_BYTES:
        from mea_compress.emit.verification import verify

        return verify(directory, plan.bytes_after, progress)
    found = inspect_checkpoint(directory).bytes_per_token
    if found != plan.bytes_after:
        raise VerificationError(f"the cache holds {found} bytes per token where the plan says {plan.bytes_after}")
    from mea_compress.emit.verification import decode_layers

    return {
        "compared": "tensors of every layer, bit for bit",
        "kv_bytes_per_token": found,
        "decoding_difference": decode_layers(open_source(directory)),
    }


def _write_config(source: Source, plan: Plan, recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """config.json of the emitted checkpoint, and the code that loads it where this package is not installed."""
    family = source.family
    layers = []
    for layer, spec in zip(plan.layers, source.config.mea["layers"], strict=True):
        layers.append(workspace.finished("layers", str(layer.layer)) if layer.compressed else spec)
    config = dict(source.raw_config)
    config["model_type"] = family.emitted_type
    config["architectures"] = [f"Mea{family.prefix}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"configuration_mea.Mea{family.prefix}Config",
        "AutoModel": f"modeling_mea.Mea{family.prefix}Model",
        "AutoModelForCausalLM": f"modeling_mea.Mea{family.prefix}ForCausalLM",
    }
    config["num_key_value_heads"] = source.config.num_key_value_heads
    # What the weights are stored in is what they are loaded and cached in.
    config.pop("torch_dtype", None)
    config["dtype"] = recipe.dtype or TORCH_NAMES[source.dtype]
    config["mea"] = {**source.config.mea, "layers": layers}
    write_json(workspace.path / "config.json", config)
    write_code(workspace.path)
    return config


def _copy_other_files(source: Source, target: Path) -> None:
    """Tokenizer, chat template, generation config, licence and whatever else is not weights; the card is kept aside."""
    for file in _other_files(source):
        relative = file.relative_to(source.reader.directory)
        if relative.name in CODE_FILES or str(relative) in _OWN_DOCUMENTS:
            continue
        name = Path("README.original.md") if str(relative) == "README.md" else relative
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def _other_files(source: Source) -> list[Path]:
    return [source.reader.directory / relative for relative in source.reader.other_files()]


def _write_documents(
    source: Source, plan: Plan, recipe: Recipe, config: dict[str, Any], fidelity: dict[str, Any], target: Path
) -> None:
    recipe_yaml = to_yaml(recipe)
    (target / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    name = str(source.raw_config.get("_name_or_path") or source.reader.directory.resolve().name)
    write_json(
        target / "compression.json",
        {
            "source": name,
            "model_type": config["model_type"],
            "plan": plan.to_json(),
            "fidelity": fidelity,
            "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude={"source", "out"}),
            "versions": versions(),
        },
    )
    card = source.reader.directory / "README.md"
    original = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    summary = fidelity["verification"]
    (target / "README.md").write_text(
        model_card(name, plan.to_json(), summary, recipe_yaml, versions(), original), encoding="utf-8"
    )


__all__ = ["CompressionResult", "compress"]
